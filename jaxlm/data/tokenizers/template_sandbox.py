"""Runs chat templates: Jinja programs that come with a model and write a conversation as a prompt.

A template is a program of somebody else, so it runs in Jinja's immutable sandbox, sees only plain data, and is stopped
when it loops or writes without end. It has the functions that transformers gives to templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxlm.core.errors import UserError

if TYPE_CHECKING:
    import jinja2

_MAX_LENGTH = 1 << 24  # characters of a prompt, or items of anything that a template adds up or multiplies
_MAX_STEPS = 1_000_000  # for one prompt; an iteration of a loop is one step
_CALL_STEPS = 10  # steps that a call counts for
_MARKS = "\ufdd0", "\ufdd1"  # code points that are no characters: before and after what the model says
_steps: ContextVar[int] = ContextVar("steps")  # taken so far


def render_template(template: str, variables: Mapping[str, Any], mark_generation: bool = False) -> str:
    """What a template writes. With ``mark_generation``, marks surround its ``{% generation %}`` blocks, for
    ``generation_spans``.

    Raises:
        UserError: when the template fails, refuses the conversation, or tries something that the sandbox forbids; the
            message is one line.
    """
    import jinja2

    _steps.set(0)
    try:
        compiled = _compiled(template, mark_generation)
        parts, size = [], 0
        for part in compiled.generate(**{name: _plain(value) for name, value in variables.items()}):
            parts.append(part)
            size += len(part)
            if size > _MAX_LENGTH:
                raise UserError(f"the chat template writes more than {_MAX_LENGTH:,} characters; use another template")
        return "".join(parts)
    except UserError:
        raise
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template cannot be read, line {error.lineno}: {_line(error)}; correct it") from None
    except jinja2.exceptions.SecurityError as error:
        raise UserError(f"the chat template does what it may not: {_line(error)}; do not use it") from None
    except jinja2.UndefinedError as error:
        raise UserError(f"the chat template needs something that was not given: {_line(error)}") from None
    except jinja2.TemplateError as error:  # raise_exception's
        raise UserError(f"the chat template refuses this conversation: {_line(error)}") from None
    except Exception as error:  # a program's mistake can be any
        raise UserError(
            f"the chat template fails on this conversation ({type(error).__name__}: {_line(error)}); check both"
        ) from None


def generation_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and the span (first character, end) that each pair of marks surrounded.

    Raises:
        UserError: when the marks are not in pairs.
    """
    head, *parts = text.split(_MARKS[0])
    plain, spans = head, []
    for part in parts:
        inside, found, after = part.partition(_MARKS[1])
        if not found or _MARKS[1] in after:
            raise UserError("the chat template's {% generation %} blocks are not apart; correct it")
        spans.append((len(plain), len(plain) + len(inside)))
        plain += inside + after
    if _MARKS[1] in head:
        raise UserError("a message has a character that stands for none, U+FDD1; take it out")
    return plain, spans


def _step(cost: int = 1) -> None:
    _steps.set(_steps.get() + cost)
    if _steps.get() > _MAX_STEPS:
        raise UserError(f"the chat template takes more than {_MAX_STEPS:,} steps; use another template")


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """About how long a sum or product is: the items of a sequence, or the bits of an integer (times 256, because
    arithmetic with long integers is slow); 0 for anything else."""
    sized = [hasattr(side, "__len__") for side in (left, right)]
    if all(sized):
        return len(left) + len(right)
    if any(sized):
        sequence, count = (left, right) if sized[0] else (right, left)
        return len(sequence) * count if isinstance(count, int) else 0
    if not (isinstance(left, int) and isinstance(right, int)):
        return 0
    return (left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()) << 8


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _plain(value: Any) -> Any:
    """A copy of some data in Python's own types, which is what a template may touch."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    raise UserError(f"a chat is made of texts, numbers, lists and mappings, not {type(value).__name__}")


@lru_cache(maxsize=16)
def _compiled(template: str, mark_generation: bool) -> jinja2.Template:
    return _environment(mark_generation).from_string(template)


@lru_cache(maxsize=2)
def _environment(mark_generation: bool) -> jinja2.Environment:
    from jinja2.ext import loopcontrols

    environment = _environment_class()(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(mark_generation), loopcontrols]
    )
    environment.filters.update(tojson=_tojson, counted=_counted)
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=lambda form: datetime.now().strftime(form),
        namespace=_namespace_class(),
    )
    return environment


def _environment_class() -> type[jinja2.Environment]:
    """Classes are made in functions, because jinja2 is imported only when a template runs."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """Counts iterations of loops and calls, and refuses sums and products that would fill the memory."""

        intercepted_binops = frozenset({"+", "*", "**"})

        def _parse(self, *args: Any) -> Any:
            tree = super()._parse(*args)
            for loop in tree.find_all(jinja2.nodes.For):
                loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
            return tree

        def call(self, *args: Any, **kwargs: Any) -> Any:
            _step(_CALL_STEPS)
            return super().call(*args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size_of_result(operator, left, right) > _MAX_LENGTH:
                raise UserError(f"the chat template makes something longer than {_MAX_LENGTH:,}; use another template")
            return super().call_binop(context, operator, left, right)

    return Environment


def _generation_extension(mark: bool) -> type:
    import jinja2
    from jinja2.ext import Extension

    class Generation(Extension):
        """A {% generation %} block holds what the model said; ``mark`` puts marks around it."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if mark:
                begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in _MARKS)
                body = [begin, *body, end]
            return jinja2.nodes.Scope(body, lineno=line)

    return Generation


def _namespace_class() -> type:
    import jinja2

    class Namespace(jinja2.utils.Namespace):
        """A namespace that refuses names with a leading underscore."""

        def __init__(*args: Any, **kwargs: Any):
            self, *rest = args
            values = dict(*rest, **kwargs)
            for name in values:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    return Namespace


def _raise_exception(message: Any) -> None:
    import jinja2

    raise jinja2.TemplateError(str(message))


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As in transformers; Jinja's own filter escapes <, > and &."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_name(name: Any) -> None:
    from jinja2.exceptions import SecurityError

    if str(name).startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")
