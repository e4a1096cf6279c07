"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake outside the program: a bad option, a missing or damaged file, an impossible mesh.

    The message is one line that says what is wrong and what to do. The command line prints it and exits
    with status 2; library callers catch it like any ``ValueError``.
    """
