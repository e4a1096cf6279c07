"""Runs chat templates: Jinja programs that come with a model and write a conversation as a prompt.

A template is a program of somebody else, so it runs in Jinja's immutable sandbox, sees only plain data, and pays for
what it does from a budget (``templates.budget``). It has the functions that transformers gives to templates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.templates.budget import (
    MAX_LENGTH,
    charge,
    charge_call,
    charge_filter,
    charge_operator,
    charge_size,
    counted,
    measure,
    start_budget,
)

if TYPE_CHECKING:
    import jinja2

_MAX_SOURCE = 1 << 18  # characters of a template; published ones have up to 20,000
_NODE = 32  # units of work of a node of the template each time that it runs
_MARKS = "\ufdd0", "\ufdd1"  # code points that are no characters: before and after what the model says


def render_template(template: str, variables: Mapping[str, Any], mark_generation: bool = False) -> str:
    """What a template writes. With ``mark_generation``, marks surround its ``{% generation %}`` blocks, for
    ``generation_spans``.

    Raises:
        UserError: when the template fails, refuses the conversation, or tries something that the sandbox forbids; the
            message is one line.
    """
    import jinja2

    if len(template) > _MAX_SOURCE:
        raise UserError(f"the chat template has more than {_MAX_SOURCE:,} characters; use another template")
    try:
        plain = {name: _plain(value) for name, value in variables.items()}
        start_budget(plain)
        compiled = _compiled(template, mark_generation)
        parts, size = [], 0
        for part in compiled.generate(**plain):
            parts.append(part)
            size += len(part)
            if size > MAX_LENGTH:
                raise UserError(f"the chat template writes more than {MAX_LENGTH:,} characters; use another template")
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
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_extension(mark_generation), loopcontrols],
        finalize=_paid,
    )
    environment.filters.update(tojson=_tojson, sum=_sum)
    filters = {name: _guarded(name, filter) for name, filter in environment.filters.items()}
    environment.filters.update(filters, **_own_filters())
    environment.tests.update({name: _guarded_test(environment.tests[name]) for name in _COMPARISONS})
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, lipsum=_lipsum(environment.globals["lipsum"]),
        namespace=_namespace_class(),
    )
    return environment


def _environment_class() -> type[jinja2.Environment]:
    """Classes are made in functions, because jinja2 is imported only when a template runs."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """Has everything paid that takes time or memory: operators, calls, filters, tests, loops, and what is written.

        What Jinja does not let an environment intercept is rewritten in the template's syntax tree.
        """

        intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

        def _parse(self, *args: Any) -> Any:
            return _rewriter_class()().visit(super()._parse(*args))

        def call(*args: Any, **kwargs: Any) -> Any:
            self, _, function, *rest = args
            if _pays_itself(function):
                charge(_CALL + 8 * len(rest))
            else:
                charge_call(function, rest, kwargs)
            return ImmutableSandboxedEnvironment.call(*args, **kwargs)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            charge_operator(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def getitem(self, obj: Any, argument: Any) -> Any:
            if not isinstance(argument, (str, int)):
                charge(measure(argument))
            return super().getitem(obj, argument)

    return Environment


_CALL = 512  # units of work of a macro besides its body


def _pays_itself(function: Any) -> bool:
    """Whether a function is one of Jinja's, or one of this module, which pay for what they do."""
    from jinja2 import runtime, utils

    kinds = (runtime.Macro, runtime.LoopContext, runtime.BlockReference, utils.Cycler, utils.Joiner)
    return isinstance(function, kinds) or getattr(function, "__module__", "") == __name__


@lru_cache(maxsize=1)
def _rewriter_class() -> type:
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def paid(node: Any, name: str) -> Any:
        is_constant = isinstance(node, nodes.Const)
        return node if is_constant else nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    class Rewriter(NodeTransformer):
        """Puts filters that pay where Jinja would do something unasked. They return their value as it is."""

        def visit_Concat(self, node: Any) -> Any:
            """``a ~ b`` is a filter of the list of both."""
            self.generic_visit(node)
            return paid(nodes.List(node.nodes, lineno=node.lineno), "paid_concatenation")

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            node.expr = paid(node.expr, "paid_comparison")
            for operand in node.ops:
                operand.expr = paid(operand.expr, "paid_comparison")
            return node

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = paid(node.node, "paid_slice")
            return node

        def visit_Pair(self, node: Any) -> Any:
            self.generic_visit(node)
            node.key = paid(node.key, "paid_comparison")  # hashing takes what comparing does
            return node

        def visit_For(self, node: Any) -> Any:
            node = self._with_paid_body(node)
            node.iter = paid(node.iter, "paid_iteration")
            return node

        def _with_paid_body(self, node: Any) -> Any:
            """The body pays for its nodes and its text each time that it runs."""
            self.generic_visit(node)
            cost = sum(_NODE for _ in node.find_all(nodes.Node))
            cost += sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            run = nodes.Filter(nodes.Const(cost), "paid_run", [], [], None, None, lineno=node.lineno)
            node.body = [nodes.ExprStmt(run, lineno=node.lineno), *node.body]
            return node

        visit_Macro = visit_CallBlock = visit_Block = _with_paid_body

    return Rewriter


def _own_filters() -> dict[str, Callable[..., Any]]:
    """What ``_rewriter_class`` calls."""
    import jinja2
    from jinja2.runtime import markup_join, str_join

    @jinja2.pass_context
    def concatenation(context: Any, parts: list[Any]) -> str:
        charge(8 * measure(parts))
        charge_size(sum(len(part) for part in parts if isinstance(part, str)))
        return (markup_join if context.eval_ctx.autoescape else str_join)(parts)

    @jinja2.pass_context
    def comparison(context: Any, value: Any) -> Any:
        charge(measure(value))
        return value

    @jinja2.pass_context
    def piece(context: Any, value: Any) -> Any:
        charge(8 * len(value) if hasattr(value, "__len__") else 0)
        return value

    @jinja2.pass_context
    def iteration(context: Any, values: Any) -> Iterator[Any]:
        return counted(values)

    @jinja2.pass_context
    def run(context: Any, cost: int) -> None:
        charge(cost)

    return {
        "paid_concatenation": concatenation, "paid_comparison": comparison, "paid_slice": piece,
        "paid_iteration": iteration, "paid_run": run,
    }


_EAGER = {"sort", "join", "list", "sum", "unique", "groupby", "min", "max", "slice"}  # filters that read all items
_COMPARISONS = (
    "in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=", "gt", ">", "greaterthan", "ge", ">=",
    "upper", "lower",
)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is paid for. What it gets is a list where it would read an iterator to its end."""
    import jinja2

    pass_arg = getattr(getattr(function, "jinja_pass_arg", None), "name", None)
    first = {"eval_context": "eval_ctx", "environment": "environment"}.get(pass_arg)

    @jinja2.pass_context  # and so it does not run while the template is compiled
    def guarded(context: Any, value: Any = None, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, Iterator):
            value = list(counted(value)) if name in _EAGER else counted(value)
        charge_filter(name, value, args, kwargs)
        if pass_arg is None:
            return function(value, *args, **kwargs)
        return function(context if first is None else getattr(context, first), value, *args, **kwargs)

    return guarded


def _guarded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    import jinja2

    @jinja2.pass_context
    def guarded(context: Any, *args: Any) -> Any:
        charge(measure(args))
        return function(*args)

    return guarded


def _paid(value: Any) -> Any:
    """A value that is about to be written."""
    charge(measure(value))
    return value


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


def _strftime_now(form: str) -> str:
    charge_size(len(form), 1 << 10)
    return datetime.now().strftime(form)


def _lipsum(function: Callable[..., str]) -> Callable[..., str]:
    def lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
        charge_size(n * max, 1 << 11)
        return function(n, html, min, max)

    return lipsum


def _sum(values: Sequence[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """As Jinja's ``sum``, with each addition paid."""
    import jinja2

    if isinstance(start, (str, bytes)):
        raise TypeError("sum() cannot add texts: use join")
    environment = _environment(False)
    get = jinja2.filters.make_attrgetter(environment, attribute) if attribute is not None else None
    for value in values:
        value = value if get is None else get(value)
        charge_operator("+", start, value)
        start = start + value
    return start


def _raise_exception(message: Any) -> None:
    import jinja2

    charge(measure(message))
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
