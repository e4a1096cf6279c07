"""Chat templates: Jinja programs that come with a model and write a conversation as its prompt.

A template is somebody else's program, so it runs in Jinja's immutable sandbox, sees plain data only, and is stopped
when it loops or writes without end. What templates may use is what transformers gives them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jaxlm.core.errors import UserError

_LONGEST = 1 << 24  # characters of a prompt, or of anything that a template adds up or multiplies
_STEPS = 1_000_000  # while one prompt is written: a turn of a loop is one
_CALL = 10  # steps
_MARKS = "\ufdd0", "\ufdd1"  # which are no characters: around what the model says
_steps: ContextVar[int] = ContextVar("steps")  # taken so far


def render(template: str, variables: Mapping[str, Any], marked: bool = False) -> str:
    """What a template writes; where ``marked``, with marks around what the model says, for ``marked_spans``.

    UserError, of one line, if it fails, refuses, or does what it may not.
    """
    import jinja2

    _steps.set(0)
    try:
        compiled = _compiled(template, marked)
        parts, size = [], 0
        for part in compiled.generate(**{name: _plain(value) for name, value in variables.items()}):
            parts.append(part)
            size += len(part)
            if size > _LONGEST:
                raise UserError(f"the chat template writes more than {_LONGEST:,} characters; use another template")
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


def marked_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without its marks, and from which character to which each pair of them went. UserError where they are not
    in pairs."""
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


def choose(templates: Any, tools: bool) -> str:
    """The template to use of what tokenizer_config.json has: one, or several with names. UserError if there is none."""
    if isinstance(templates, list):
        try:
            templates = {entry["name"]: entry["template"] for entry in templates}
        except (TypeError, KeyError):
            raise UserError("chat_template in tokenizer_config.json is not a list of names and templates") from None
    if isinstance(templates, dict):
        found = (tools and templates.get("tool_use")) or templates.get("default")
        if not found:
            raise UserError(f"the tokenizer has chat templates named {', '.join(templates)} and no default; add one")
        return found
    if not isinstance(templates, str):
        raise UserError("the tokenizer has no chat template; put a chat_template.jinja beside it or use prompts")
    return templates


def _step(cost: int = 1) -> None:
    _steps.set(_steps.get() + cost)
    if _steps.get() > _STEPS:
        raise UserError(f"the chat template takes more than {_STEPS:,} steps; use another template")


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _step()
        yield value


def _size_of_result(operator: str, left: Any, right: Any) -> int:
    """About how long a sum or product is: items of a sequence, bits of a whole number (times 256, for the time that
    arithmetic with long ones takes); 0 of anything else."""
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
    """Data without methods of its own: what a template may touch."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(item) for item in value]
    raise UserError(f"a chat is made of texts, numbers, lists and mappings, not {type(value).__name__}")


@lru_cache(maxsize=16)
def _compiled(template: str, marked: bool) -> Any:
    return _environment(marked).from_string(template)


@lru_cache(maxsize=2)
def _environment(marked: bool) -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model said, for training; without ``marked`` it is only text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if marked:
                begin, end = (jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)]) for mark in _MARKS)
                body = [begin, *body, end]
            return jinja2.nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """A namespace that takes no names of Python's own."""

        def __init__(*args: Any, **kwargs: Any):
            self, *rest = args
            values = dict(*rest, **kwargs)
            for name in values:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, values)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            super().__setitem__(name, value)

    def raise_exception(message: Any) -> None:
        raise jinja2.TemplateError(str(message))

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """Jinja's own escapes <, > and &."""
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Environment(ImmutableSandboxedEnvironment):
        """Counts the turns of loops, and calls, and refuses sums and products that would fill the memory."""

        intercepted_binops = frozenset({"+", "*", "**"})

        def _parse(self, *args: Any) -> Any:
            tree = super()._parse(*args)
            for loop in tree.find_all(jinja2.nodes.For):
                loop.iter = jinja2.nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
            return tree

        def call(self, *args: Any, **kwargs: Any) -> Any:
            _step(_CALL)
            return super().call(*args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if _size_of_result(operator, left, right) > _LONGEST:
                raise UserError(f"the chat template makes something longer than {_LONGEST:,}; use another template")
            return super().call_binop(context, operator, left, right)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters.update(tojson=tojson, counted=_counted)
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=lambda form: datetime.now().strftime(form), namespace=Namespace
    )
    return environment


def _check_name(name: Any) -> None:
    from jinja2.exceptions import SecurityError

    if str(name).startswith("_"):
        raise SecurityError(f"it stores {name!r} in a namespace")
