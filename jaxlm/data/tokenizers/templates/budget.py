"""What a chat template may use: a budget of work, from which every operation is paid before it is done.

One unit is about a byte that is written, or ten nanoseconds. What an operation costs is estimated from its arguments,
and never too low by more than a small factor: the length of the text that it makes, the number of its comparisons. So
the budget bounds both the time and the memory of a template.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jaxlm.core.errors import UserError

__all__ = [
    "MAX_LENGTH", "charge", "charge_call", "charge_filter", "charge_operator", "charge_size", "counted", "measure",
    "start_budget",
]

MAX_LENGTH = 1 << 24  # characters of a prompt, or items of anything that a template makes
_WORK = 1 << 27  # units for one prompt
_WORK_PER_BYTE = 128  # units more for each byte of the conversation
_CALL = 512  # units of a call or filter besides its arguments
_ITEM = 128  # units of an item that is made or iterated over
_SEQUENCES = (list, tuple, set, frozenset, range, type({}.keys()), type({}.values()), type({}.items()))


class _Budget:
    """The units that are left."""

    def __init__(self, units: int):
        self.units = self.left = units


_budget: ContextVar[_Budget] = ContextVar("budget")


def start_budget(variables: Any) -> None:
    """Gives a new budget for a prompt of ``variables``."""
    _budget.set(_Budget(sys.maxsize))  # a caller's own data is not measured against the budget
    _budget.set(_Budget(_WORK + _WORK_PER_BYTE * measure(variables)))


def charge(units: int) -> None:
    """Takes units from the budget.

    Raises:
        UserError: when too few are left.
    """
    budget = _budget.get()
    budget.left -= units
    if budget.left < 0:
        raise UserError(
            f"the chat template takes more than {budget.units:,} bytes and steps for this conversation; use another "
            "template"
        )


def charge_size(length: int, units: int = 1) -> None:
    """Pays for something of that many characters or items, of ``units`` each.

    Raises:
        UserError: when it would be longer than ``MAX_LENGTH``, or the budget is spent.
    """
    if length > MAX_LENGTH:
        raise UserError(f"the chat template makes something longer than {MAX_LENGTH:,}; use another template")
    charge(length * units)


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The same values; each is paid for when it comes."""
    for value in values:
        charge(_ITEM)
        yield value


def measure(value: Any) -> int:
    """About the bytes of ``str(value)``. What is in a container several times counts as often.

    Raises:
        UserError: when that is more than the budget that is left.
    """
    return _measure(value)[0]


def _measure(value: Any) -> tuple[int, int, int]:
    """Bytes, items and depth of a value."""
    if isinstance(value, str):
        return sys.getsizeof(value), 1, 0
    total, items, deepest, stack, left = 0, 0, 0, [(value, 0)], _budget.get().left
    while stack:
        each, depth = stack.pop()
        items, deepest = items + 1, max(deepest, depth)
        if isinstance(each, (str, bytes, bytearray)):
            total += sys.getsizeof(each)
        elif isinstance(each, int):
            total += 48 + each.bit_length() // 3
        else:
            total += _ITEM
            inside = _inside(each)
            total += 8 * len(inside)
            if total <= left:
                stack.extend((part, depth + 1) for part in inside)
        if total > left:
            charge(total)
    return total, items, deepest


def _inside(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, _SEQUENCES):
        return value if isinstance(value, (list, tuple, range)) else list(value)
    if isinstance(value, _namespace()):  # it prints what it holds
        return [value._Namespace__attrs]
    return ()


@lru_cache(maxsize=1)
def _namespace() -> type:
    import jinja2

    return jinja2.utils.Namespace


def _shallow(value: Any) -> int:
    """Bytes of a copy of a value that shares its items."""
    return sys.getsizeof(value) if isinstance(value, (str, bytes)) else _ITEM + 8 * _length(value)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, Mapping, *_SEQUENCES)) else 0


# Operators


def charge_operator(operator: str, left: Any, right: Any) -> None:
    """Pays for ``left operator right``.

    Raises:
        UserError: when the result would be too long, or the budget is spent.
    """
    if operator == "%" and isinstance(left, (str, bytes)):
        _charge_format(left, right if isinstance(right, (tuple, Mapping)) else (right,), "%")
        return
    sized = [hasattr(side, "__len__") for side in (left, right)]
    if all(sized):
        charge_size(len(left) + len(right))
        escapes = hasattr(left, "__html__") or hasattr(right, "__html__")
        charge((_shallow(left) + _shallow(right)) * (6 if escapes else 1))
    elif any(sized):
        sequence, count = (left, right) if sized[0] else (right, left)
        if isinstance(count, int):
            charge_size(len(sequence) * max(0, count))
            charge(_shallow(sequence) * max(1, count))
    elif isinstance(left, int) and isinstance(right, int):  # arithmetic with long integers is slow
        bits = left.bit_length() * max(1, right) if operator == "**" else left.bit_length() + right.bit_length()
        charge_size(bits << 8)


_NUMBERS = re.compile(r"\d+")
_NESTED = re.compile(r"\{[^{}]*\{|\*")  # a width that is an argument, in format and in %


def _charge_format(form: str | bytes, values: Any, mark: str) -> None:
    """Pays for ``form % values`` and ``form.format(values)``: each field has the size of the largest value, and the
    largest width."""
    text = form.decode("latin-1") if isinstance(form, (bytes, bytearray)) else str(form)
    charge(_shallow(text) * 8)
    parts = [*values.keys(), *values.values()] if isinstance(values, Mapping) else list(values)
    numbers = [int(number[:12]) for number in _NUMBERS.findall(text)]
    if _NESTED.search(text):
        numbers += [int(part) for part in parts if isinstance(part, (int, float)) and abs(part) < 1e12]
        numbers += [int(n[:12]) for part in parts if isinstance(part, str) for n in _NUMBERS.findall(part[:64])]
    fields = text.count(mark)
    charge_size(len(text) + fields * max(map(abs, numbers), default=0))
    charge(_CALL + fields * (_CALL + 6 * max(map(measure, parts), default=0)))


# Filters and methods. A cost is computed from the value and the arguments, by position.

_Cost = Callable[..., int | None]


def _argument(args: Sequence[Any], kwargs: Mapping[str, Any], index: int, name: str, default: Any) -> Any:
    value = args[index] if len(args) > index else kwargs.get(name, default)
    return default if value is None else value


def _number(value: Any) -> int:
    return int(abs(value)) if isinstance(value, (int, float)) and abs(value) < 1e18 else len(str(value)[:64])


def _width(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    charge_size(_number(_argument(args, kwargs, 0, "width", 80)), 4)


def _indent(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    width = _argument(args, kwargs, 0, "width", 4)
    lines = len(str(value).splitlines()) + 1 if isinstance(value, str) else 1
    charge(_ITEM * lines)
    charge_size(lines * (len(width) if isinstance(width, str) else _number(width)), 4)


def _replace(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    old, new = _argument(args, kwargs, 0, "old", ""), _argument(args, kwargs, 1, "new", "")
    if isinstance(value, (str, bytes)) and type(old) is type(new) and isinstance(old, (str, bytes)):
        try:
            found = value.count(old)
        except TypeError:
            return
        charge(_shallow(value))
        charge_size(len(value) + found * len(new), 4)
    else:
        charge(measure(value) * max(1, measure(new)))


def _join(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    between = _argument(args, kwargs, 0, "d", "")
    charge_size(max(0, _length(value) - 1) * len(str(between)), 4)
    charge(_length(value) * _ITEM)


def _method_join(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if args:
        _join(args[0], [value], {})


def _sorted(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    count = _length(value)
    charge((measure(value) + 4 * _ITEM * count) * (1 + count.bit_length()))


def _tojson(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    size, items, depth = _measure(value)
    indent = _argument(args, kwargs, 1, "indent", 0)
    separators = kwargs.get("separators") or ()
    indented = len(indent) if isinstance(indent, str) else _number(indent)
    charge_size(items * ((depth + 1) * indented + sum(_length(each) for each in separators)))
    charge(6 * size + _CALL // 4 * items)


def _times(factor: int) -> _Cost:
    """The cost of a filter that writes or reads ``factor`` units for each byte of its value."""
    def cost(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        charge(factor * measure(value))
    return cost


def _product(factor: int) -> _Cost:
    """The cost of what may do something with each byte of its arguments for each byte of its value."""
    def cost(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        charge(measure(value) * (factor + measure([*args, *kwargs.values()])))
    return cost


def _listed(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    charge(_ITEM * _length(value))


def _strip_tags(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    text = str(value) if isinstance(value, str) else ""
    charge(6 * measure(value) * (2 + text.count("<")))


def _round(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    charge_size(_number(_argument(args, kwargs, 0, "precision", 0)) << 10)


def _fill(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _listed(value, args, kwargs)
    charge_size(_number(_argument(args, kwargs, 0, "linecount", 1)), 8)


def _format(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if isinstance(value, (str, bytes)):
        _charge_format(value, kwargs or tuple(args), "%")


_FILTERS: dict[str, _Cost] = {
    "center": _width, "indent": _indent, "replace": _replace, "join": _join, "sort": _sorted, "dictsort": _sorted,
    "groupby": _sorted, "unique": _sorted, "min": _sorted, "max": _sorted, "tojson": _tojson, "format": _format,
    "wordwrap": _product(64), "urlize": _product(128), "trim": _product(1), "truncate": _times(4), "escape": _times(6),
    "e": _times(6), "forceescape": _times(6), "xmlattr": _times(12), "urlencode": _times(64), "title": _times(64),
    "capitalize": _times(3), "upper": _times(3), "lower": _times(3), "striptags": _strip_tags, "pprint": _times(1024),
    "wordcount": _times(64), "round": _round, "batch": _fill, "slice": _listed, "list": _listed, "reverse": _listed,
    "sum": _sorted, "int": _times(4), "random": _times(1),
}
_CHEAP_FILTERS = {  # their cost does not depend on their value, which may be the whole conversation
    "default", "d", "first", "last", "length", "count", "map", "select", "reject", "selectattr", "rejectattr", "attr",
    "items", "safe", "abs",
}


def charge_filter(name: str, value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Pays for ``value | name(*args, **kwargs)``.

    Raises:
        UserError: when the result would be too long, or the budget is spent.
    """
    charge(_CALL)
    if args or kwargs:
        charge(measure([*args, *kwargs.values()]))
    if (cost := _FILTERS.get(name)) is not None:
        cost(value, args, kwargs)
    if name not in _CHEAP_FILTERS:
        charge(measure(value))


def _split(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    between = _argument(args, kwargs, 0, "sep", None)
    parts = value.count(between) + 1 if type(between) is type(value) and between else len(value) // 2 + 1
    charge(_ITEM * parts)


def _tabs(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    tabs = value.count("\t" if isinstance(value, str) else b"\t")
    charge_size(len(value) + tabs * _number(_argument(args, kwargs, 0, "tabsize", 8)), 4)


def _str_format(value: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    _charge_format(value, [*args, *kwargs.values()], "{")


_METHODS: dict[str, _Cost] = {  # of texts and bytes
    "ljust": _width, "rjust": _width, "center": _width, "zfill": _width, "expandtabs": _tabs, "replace": _replace,
    "join": _method_join, "format": _str_format, "format_map": _str_format, "translate": _product(64),
    "maketrans": _product(1), "split": _split, "rsplit": _split, "strip": _product(1), "lstrip": _product(1),
    "rstrip": _product(1), "encode": _times(4), "decode": _times(4), "upper": _times(3), "lower": _times(3),
    "title": _times(3), "capitalize": _times(3), "swapcase": _times(3), "casefold": _times(3), "hex": _product(8),
    "splitlines": lambda value, args, kwargs: charge(_ITEM * (len(value) // 2 + 1)),
}
_VIEWS = {"get", "items", "keys", "values"}  # methods of mappings, which do not touch their values


def charge_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Pays for a call of something that Python has built in; its own code pays for anything else.

    Raises:
        UserError: when the result would be too long, or the budget is spent.
    """
    charge(_CALL)
    function = getattr(function, "__wrapped__", function)  # a method ``format`` within Jinja's guard
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if args or kwargs:
        charge(measure([*args, *kwargs.values()]))
    if name == "to_bytes":
        charge_size(_number(_argument(args, kwargs, 0, "length", 1)))
    if isinstance(owner, type) or isinstance(function, type):  # dict.fromkeys, str.maketrans, dict
        charge(2 * _ITEM * sum(map(_length, args)))
    elif isinstance(owner, (str, bytes, bytearray)):
        charge(_shallow(owner))
        if (cost := _METHODS.get(name)) is not None:
            cost(owner, args, kwargs)
    elif not (isinstance(owner, dict) and name in _VIEWS):
        charge(measure(owner))
