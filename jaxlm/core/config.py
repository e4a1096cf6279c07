"""Configuration: frozen dataclasses, built in a Python file, changed by dotted paths and stored as JSON.

The annotations of the dataclasses are the only schema. They may be int, float, bool, str, ``Literal``,
``tuple[T, ...]``, ``T | None``, dataclasses, and unions of dataclasses with a field ``kind: Literal["..."]``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import operator
import re
import runpy
import traceback
import types
import typing
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from jaxlm.core.errors import UserError

__all__ = ["RENAMED", "current_names", "from_dict", "load_config", "override", "paths", "replace_path", "to_dict"]

# Old name of a field -> its name today. A file that was written under the old name is read as if it had the new one
# (``from_dict(..., stored=True)``, ``current_names``). Where a user writes the old name, the error names the new one.
RENAMED: Mapping[str, str] = {
    "segments": "layer_groups",
    "encoder_segments": "encoder_layer_groups",
    "decoder_segments": "decoder_layer_groups",
    "ring_from": "ring_min_keys",
    "leaks": "contamination",
    "guesses": "num_draft_tokens",  # of an engine, as the next three
    "page": "page_size",
    "pages": "num_pages",
    "chunk": "prefill_chunk",
}

T = TypeVar("T")
_BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def load_config(path: str | Path, name: str = "config") -> Any:
    """The value of ``name`` after running a Python file.

    Raises:
        UserError: when the file is missing, fails (with the line), or does not define the name.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} does not exist; name a Python file that says {name} = ...")
    try:
        found = runpy.run_path(str(path))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}{_line_of(error, path)}: {type(error).__name__}: {error}{_renamed(error)}") from error
    if name not in found:
        raise UserError(f"{path} defines no {name!r}; it must say {name} = ...")
    return found[name]


def _line_of(error: Exception, path: Path) -> str:
    """The line of the file that raised the error, as " line 3"."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    return f" line {lines[-1]}" if lines else ""


def _renamed(error: Exception) -> str:
    """What to add to a TypeError about a keyword argument that is the old name of a field."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    return f"; {found[1]!r} is called {RENAMED[found[1]]!r} now" if found and found[1] in RENAMED else ""


def override(config: T, changes: Mapping[str, Any]) -> T:
    """``config`` with fields replaced: ``override(config, {"optim.lr": "3e-4", "train.steps": 500})``.

    Strings are parsed as the annotation of the field says; other values must have its type.

    Raises:
        UserError: when a key is unknown (it names the nearest), or a value has the wrong type.
    """
    for key, value in changes.items():
        config = replace_path(config, key, value)
    return config


def replace_path(config: T, path: str, value: Any) -> T:
    """``override`` of one field."""
    return _replace(config, path.split("."), value, path, config)


def _replace(node: Any, names: list[str], value: Any, path: str, root: Any) -> Any:
    name, rest = names[0], names[1:]
    hints = _hints(type(node))
    hint = hints.get(name)
    if hint is None and RENAMED.get(name) in hints:
        raise UserError(f"{path!r} is called {RENAMED[name]!r} now")
    if hint is None:
        raise UserError(f"unknown configuration key {path!r}; the nearest is {_nearest(path, root)!r}")
    current = getattr(node, name)
    if dataclasses.is_dataclass(current):
        if not rest:
            inside = ", ".join(f"{path}.{each}" for each in list(_hints(type(current)))[:3])
            raise UserError(f"{path} is a group of settings; set one of them ({inside}, ...)")
        return dataclasses.replace(node, **{name: _replace(current, rest, value, path, root)})
    if rest:
        raise UserError(f"unknown configuration key {path!r}; the nearest is {_nearest(path, root)!r}")
    return dataclasses.replace(node, **{name: _convert(value, hint, path)})


def paths(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field that ``override`` can set, as (dotted path, current value)."""
    for name in _hints(type(config)):
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            yield from paths(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _nearest(key: str, root: Any) -> str:
    """The known path that is most similar to ``key``, as a whole or by the name of its field."""

    def likeness(path: str) -> float:
        ratio = difflib.SequenceMatcher(None, key, path).ratio()
        return max(ratio, difflib.SequenceMatcher(None, key, path.rpartition(".")[2]).ratio())

    return max((path for path, _ in paths(root)), key=likeness)


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-safe data: dicts, lists, strings, numbers, booleans and None."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def from_dict(cls: Any, data: Mapping[str, Any], *, stored: bool = False) -> Any:
    """The inverse of ``to_dict``. ``cls`` is a dataclass, or a union of dataclasses with different ``kind``.

    Absent fields keep their defaults. ``stored`` says that the data comes from a file, which may have been written when
    fields had other names (``RENAMED``).

    Raises:
        UserError: on an unknown key, a value of the wrong type and a missing field, each by its dotted path.
    """
    return _build(cls, data, "", stored=stored)


def current_names(stored: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """Fields read from a file, under the names that they have today; ``known`` are the names that there are."""

    def today(name: str) -> str:
        return RENAMED[name] if name not in known and RENAMED.get(name) in known else name

    return {today(name): value for name, value in stored.items()}


def _build(cls: Any, data: Any, path: str, *, stored: bool = False) -> Any:
    where = path or "the configuration"
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: {data!r} is not a group of settings; write an object with named fields")
    cls = _member(cls, data, where)
    hints = _hints(cls)
    prefix = f"{path}." if path else ""
    data = current_names(data, hints) if stored else data
    for key in data:
        if RENAMED.get(key) in hints and key not in hints:
            raise UserError(f"{prefix + key!r} is called {RENAMED[key]!r} now")
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1, 0.0)[0]
            raise UserError(f"unknown configuration key {prefix + key!r}; the nearest is {prefix + near!r}")
    for field in dataclasses.fields(cls):
        if field.name not in data and field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where} lacks {field.name!r}; add it")
    return cls(**{
        key: _convert(value, hints[key], prefix + key, parse=False, stored=stored) for key, value in data.items()
    })


def _member(cls: Any, data: Mapping[str, Any], where: str) -> type:
    """The dataclass of a union whose ``kind`` is in the data."""
    members = {typing.get_args(_hints(each)["kind"])[0]: each for each in _options(cls) if "kind" in _hints(each)}
    if dataclasses.is_dataclass(cls):
        return cls
    if data.get("kind") not in members:
        raise UserError(f"{where}: kind is {data.get('kind')!r}; choose from {', '.join(members)}")
    return members[data["kind"]]


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; another type alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert(value: Any, hint: Any, path: str, *, parse: bool = True, stored: bool = False) -> Any:
    """``value`` as a value of the annotation; ``parse`` says whether strings are parsed."""
    options = _options(hint)
    if types.NoneType in options:
        if value is None or (parse and isinstance(value, str) and value.lower() == "none"):
            return None
        options = tuple(option for option in options if option is not types.NoneType)
    if any(dataclasses.is_dataclass(option) for option in options):
        if type(value) in options:
            return value
        return _build(functools.reduce(operator.or_, options), value, path, stored=stored)
    (hint,) = options
    try:
        result = (_read if parse and isinstance(value, str) else _check)(value, hint, path)
        if isinstance(result, float) and not math.isfinite(result):
            raise ValueError
        return result
    except UserError:
        raise
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"{path}: {value!r} is not {_wanted(hint)}") from None


def _read(text: str, hint: Any, path: str) -> Any:
    """A value from its text. Raises KeyError or ValueError if the text is none."""
    if typing.get_origin(hint) is Literal:
        return {str(choice): choice for choice in typing.get_args(hint)}[text]
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_convert(part.strip(), item, path) for part in text.strip("()[] ").split(",") if part.strip())
    return _BOOLS[text.lower()] if hint is bool else hint(text)


def _check(value: Any, hint: Any, path: str) -> Any:
    """A value of the right type; whole numbers count as floats, lists as tuples. Raises ValueError otherwise."""
    if typing.get_origin(hint) is Literal:
        wrong = value not in typing.get_args(hint)
    elif typing.get_origin(hint) is tuple:
        wrong = not isinstance(value, list | tuple)
        value = value if wrong else tuple(_convert(item, typing.get_args(hint)[0], path, parse=False) for item in value)
    else:
        value = float(value) if hint is float and type(value) is int else value
        wrong = type(value) is not hint
    if wrong:
        raise ValueError
    return value


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if typing.get_origin(hint) is tuple:
        return f"a list such as 1,2,3, each {_wanted(typing.get_args(hint)[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
