"""Tokenized text on disk: made once by several processes, mapped from then on, shared by all trainings.

A directory under the cache holds what one tokenizer makes of one content; its name is a digest of both. It appears in
one step when it is whole. Who finds it missing takes a lock that the kernel lets go of when its holder dies, and clears
what an earlier one left half done. Workers are processes of their own: ``python -m jaxlm.data.batches.token_cache``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from jaxlm.core.disk import replaced_directory, room_for
from jaxlm.core.errors import UserError
from jaxlm.data.batches.encoding import EncodedDocuments, check_not_empty, encode_documents, encode_in_chunks
from jaxlm.data.sources.jsonl import JsonlRows
from jaxlm.data.sources.types import Bitext, Documents, Source, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_VERSION = 1  # of what is stored: another number, another name
_FOR_A_WORKER = 1 << 23  # bytes of rows
_ARRAYS = ("ids", "lengths", "learned")


def encode_cached(source: Source, tokenizer: Tokenizer, directory: str) -> EncodedDocuments:
    """``encode``, from a cache directory where that is not "": made there if need be. UserError as ``encode``, and when
    the disk is full."""
    if not directory or isinstance(source, Tokens | Bitext):
        return encode_documents(source, tokenizer)
    rows = source.texts if isinstance(source, Documents) else source.rows
    content = rows.content + rows.bad_rows if isinstance(rows, JsonlRows) else hash_texts(rows)

    def make(new: Path) -> None:
        workers = min(_cores(), rows.size // _FOR_A_WORKER) if isinstance(rows, JsonlRows) else 1
        if workers > 1:
            notes = _in_processes(source, tokenizer, new, workers)
        else:
            write_arrays(encode_in_chunks(source, tokenizer), new)
            notes = rows.notes() if isinstance(rows, JsonlRows) else []
        (new / "notes.json").write_text(json.dumps(notes))

    encoded = load_or_build(directory, f"{type(source).__name__} {content} {tokenizer.fingerprint()}", make)
    check_not_empty(source, [encoded])
    return encoded


def _cores() -> int:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hash_texts(texts: Iterable[str]) -> str:
    """Of the content of some texts."""
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def load_or_build(directory: str, content: str, make: Callable[[Path], None]) -> EncodedDocuments:
    """What the cache has of some content, or what ``make`` writes into a new directory (``write_arrays``)."""
    root = Path(directory).expanduser()
    place = root / hashlib.blake2b(f"{_VERSION} {content}".encode(), digest_size=16).hexdigest()
    found = _read(place)
    if found is None:
        with room_for(f"the tokenized text in {root}"):
            root.mkdir(parents=True, exist_ok=True)
            with _alone(root / f"{place.name}.lock"):
                found = _read(place)  # another may have made it meanwhile
                if found is None:
                    for left in root.glob(f".{place.name}.*"):
                        shutil.rmtree(left, ignore_errors=True)
                    with replaced_directory(place) as new:
                        make(new)
                    found = _read(place)
    return found


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_arrays(parts: Iterable[EncodedDocuments], directory: Path, prefix: str = "") -> None:
    """Appends to ids, lengths and learned, each a file of numbers, and says in ``about.json`` of what type they are."""
    types: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for part in parts:
            for name in _ARRAYS:
                array = getattr(part, name)
                if array is None:
                    continue
                if name not in files:
                    files[name] = stack.enter_context(open(directory / f"{prefix}{name}", "wb"))
                    types[name] = str(array.dtype)
                files[name].write(np.ascontiguousarray(array))
    sizes = {name: (directory / f"{prefix}{name}").stat().st_size for name in types}
    (directory / f"{prefix}about.json").write_text(json.dumps({"types": types, "sizes": sizes}))


def _read(place: Path) -> EncodedDocuments | None:
    """None where it is not there, or not whole."""
    try:
        about = json.loads((place / "about.json").read_text())
        notes = place / "notes.json"
        notes = json.loads(notes.read_text()) if notes.exists() else ()
        if any((place / name).stat().st_size != size for name, size in about["sizes"].items()):
            return None
    except (OSError, ValueError):
        return None
    arrays = {
        name: np.memmap(place / name, dtype, "r") if about["sizes"][name] else np.zeros(0, dtype)
        for name, dtype in about["types"].items()
    }
    empty = {"ids": np.zeros(0, np.int32), "lengths": np.zeros(0, np.int64)}
    return EncodedDocuments(**{**empty, **arrays, "notes": tuple(notes)})


def _in_processes(source: Source, tokenizer: Tokenizer, new: Path, workers: int) -> list[str]:
    """Has parts of the rows written beside each other, joins them, and returns the notes. UserError with the first
    mistake in the order of the rows."""
    tokenizer.save(new / "tokenizer")
    rows = source.texts if isinstance(source, Documents) else source.rows
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "jaxlm.data.batches.token_cache"]
    started: list[subprocess.Popen] = []
    try:
        for k in range(workers):
            with open(new / f"{k}.log", "wb") as log:
                started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, env=environment))
            field = "texts" if isinstance(source, Documents) else "rows"
            part = dataclasses.replace(source, **{field: rows.part(k, workers)})
            with contextlib.suppress(BrokenPipeError):  # what went wrong is in its log
                started[-1].stdin.write(pickle.dumps((part, str(new), k)) + b"\n")
                started[-1].stdin.flush()  # and stays open: a worker ends when it closes
        for k, process in enumerate(started):
            process.wait()
            outcome = new / f"{k}.json"
            if process.returncode or not outcome.exists():
                raise RuntimeError(f"a process that tokenizes failed:\n{(new / f'{k}.log').read_text()}")
            told = json.loads(outcome.read_text())
            if "error" in told:
                raise UserError(told["error"])
            rows.bad.update({int(number): what for number, what in told["bad"].items()})
    finally:
        for process in started:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    _join(new, workers)
    return rows.notes()


def _join(new: Path, workers: int) -> None:
    """One file after another, each gone when it is copied: no more room is taken than that of all and the largest."""
    types, sizes = {}, {}
    for k in range(workers):
        about = json.loads((new / f"{k}.about.json").read_text())
        for name, dtype in about["types"].items():
            with open(new / name, "ab") as whole, open(new / f"{k}.{name}", "rb") as part:
                shutil.copyfileobj(part, whole, 1 << 22)
            types[name], sizes[name] = dtype, sizes.get(name, 0) + about["sizes"][name]
            (new / f"{k}.{name}").unlink()
        for left in new.glob(f"{k}.*"):
            left.unlink()
    shutil.rmtree(new / "tokenizer")
    (new / "about.json").write_text(json.dumps({"types": types, "sizes": sizes}))


def _work() -> None:
    """A worker: encodes its part of the rows, and ends when nobody waits for it any more."""
    source, directory, k = pickle.load(sys.stdin.buffer)
    sys.stdin.buffer.readline()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    new = Path(directory)
    rows = source.texts if isinstance(source, Documents) else source.rows
    try:
        with room_for(f"the tokenized text in {new.parent}"):
            write_arrays(encode_in_chunks(source, Tokenizer.load(new / "tokenizer")), new, f"{k}.")
        told = {"bad": rows.bad}
    except UserError as error:
        told = {"error": str(error)}
    (new / f"{k}.json").write_text(json.dumps(told))
    os._exit(0)  # the thread reads on


if __name__ == "__main__":
    _work()
