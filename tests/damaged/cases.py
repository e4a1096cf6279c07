"""One damaged file at a time: what becomes of it.

A case is a good example of a format with one file damaged; the seed and its number decide. Its outcome is ``loaded`` or
``refused``, or a fault: ``traceback`` (or the process ends), ``hang``, ``memory`` or ``wrong``: other values than
those of the good example, though there are checksums.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import random
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core.errors import UserError
from tests.damaged.formats import FORMATS
from tests.damaged.mutations import mutate
from tests.limits import Hang, limited, traced

SECONDS = 10  # of CPU time
GROWTH = 1.5  # times the memory of a process that reads the good example
_BASE = 1 << 28  # bytes that such a process has before; this one may have more, of other work
_ADDRESSES = 4 << 30  # bytes: where a case asks for more, it has failed already
GOOD = ("loaded", "refused")


@dataclasses.dataclass(frozen=True)
class Case:
    """A damaged example: its number, its format, the file, what was done, its content, and whether checksums tell."""

    number: int
    format: str
    file: str
    what: str
    content: bytes
    checked: bool


@functools.cache
def good(name: str) -> tuple[Mapping[str, bytes], str, int]:
    """The files of a good example by name, a hash of what is read, and by how much the memory of this process may grow
    while it is read damaged."""
    with tempfile.TemporaryDirectory() as root:
        FORMATS[name].make(Path(root))
        files = {str(file.relative_to(root)): file.read_bytes() for file in sorted(Path(root).rglob("*")) if
                 file.is_file() and not file.name.endswith(".lock")}
        FORMATS[name].read(Path(root))
        before = reset_peak()
        found = FORMATS[name].read(Path(root))
        grown, base = peak() - before, min(before, _BASE)
        return files, fingerprint(found, Path(root)), int(GROWTH * (base + grown)) - base


def case(seed: int, number: int, formats: tuple[str, ...] = tuple(FORMATS)) -> Case:
    rng = random.Random(f"{seed} {number}")
    name = formats[number % len(formats)]
    form, files = FORMATS[name], good(name)[0]
    file = rng.choice([each for each in files if any(fnmatch.fnmatch(each, pattern) for pattern in form.damaged)])
    what, content = mutate(rng, file, files[file])
    checked = any(fnmatch.fnmatch(Path(file).name, pattern) for pattern in form.checked)
    return Case(number, name, file, what, content, checked)


def outcome(case: Case, directory: Path) -> tuple[str, str]:
    """(outcome, more about it) of reading a case, which is written into a new directory."""
    form, (files, expected, memory) = FORMATS[case.format], good(case.format)
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.content if name == case.file else content)
    before = reset_peak()
    try:
        with limited(_ADDRESSES, SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fingerprint(form.read(directory), directory)
        result = "loaded", ""
        if case.checked and found != expected:
            result = "wrong", "other values than those that were written"
    except UserError as error:
        message = str(error)
        result = "refused", message
        if len(message.splitlines()) != 1 or len(message) > 2000:
            result = "traceback", f"not one short line: {message[:3000]!r}"
    except Hang:
        result = "hang", f"{SECONDS} seconds"
    except MemoryError:
        result = "memory", "more than 4 GiB"
    except BaseException as error:
        result = "traceback", traced(error)
    if result[0] in GOOD and peak() - before > memory:
        result = "memory", f"{peak() - before >> 20} MiB more, with the good example at most {memory >> 20} MiB"
    return result


def run(seed: int, numbers: range, formats: tuple[str, ...] = tuple(FORMATS)) -> Iterator[tuple[Case, str, str]]:
    """(case, outcome, more) of some cases."""
    with tempfile.TemporaryDirectory() as root:
        for number in numbers:
            each, directory = case(seed, number, formats), Path(root, str(number))
            yield each, *outcome(each, directory)
            shutil.rmtree(directory, ignore_errors=True)


def reset_peak() -> int:
    """The resident memory of this process, in bytes; ``peak`` is counted from now on."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The largest resident memory of this process since ``reset_peak``, in bytes."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def fingerprint(value: Any, root: Path) -> str:
    """A hash of what was read: configurations, arrays with their types, texts."""
    found = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, Mapping):
            for name in sorted(value, key=str):
                add(str(name))
                add(value[name])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        elif isinstance(value, np.ndarray | np.generic | jax.Array):
            array = np.ascontiguousarray(value)
            found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        elif dataclasses.is_dataclass(value):
            add({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        else:
            found.update(repr(value).replace(str(root), "").encode("utf-8", "surrogatepass"))
        found.update(b"\0")

    add(value)
    return found.hexdigest()
