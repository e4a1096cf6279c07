"""The exception for mistakes that the user can fix."""


class UserError(ValueError):
    """A mistake outside the program: a bad option, a missing or damaged file, an impossible mesh.

    The message is one line that says what is wrong and what to do. The command line prints it and exits with status 2;
    code that uses the library catches it like any ``ValueError``.
    """
