"""The token cache: tokenized text on disk, made once by several processes, memory-mapped, and shared by all runs.
 An entry is a directory of the cache. It holds the tokens of one content by one tokenizer; its name is a hash of both.
It appears atomically, when it is complete. A process that finds it missing takes a file lock, which the kernel releases
when its holder dies, and removes what an earlier process left unfinished. Workers are processes of their own: ``python
-m jaxlm.data.batches.token_cache``.
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
from jaxlm.core.processes import module_command, module_environment
from jaxlm.core.untrusted import parse_json, read_json, seal, unseal
from jaxlm.data.batches.encoding import (
    EncodedDocuments,
    check_not_empty,
    encode_documents,
    encode_in_chunks,
    first_token_of,
)
from jaxlm.data.sources.jsonl import JsonlRows
from jaxlm.data.sources.types import Bitext, Documents, Source, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_VERSION = 1  # of the format; a part of the names of entries
_BYTES_PER_WORKER = 1 << 23  # of rows: the least that is worth a process
_FILES = {"ids": "ids", "lengths": "lengths", "loss_mask": "learned"}  # attribute of EncodedDocuments -> file
_KINDS = {"ids": "iu", "lengths": "iu", "loss_mask": "b"}  # attribute -> NumPy's letters for what its type can be


def encode_cached(source: Source, tokenizer: Tokenizer, directory: str) -> EncodedDocuments:
    """As ``encode_documents``, but from the cache in a directory, in which a missing entry is made. Without a cache if
    ``directory`` is "".

    Raises:
        UserError: as ``encode_documents``, and when the disk is full.
    """
    if not directory or isinstance(source, Tokens | Bitext):
        return encode_documents(source, tokenizer)
    rows = source.texts if isinstance(source, Documents) else source.rows
    content = rows.content_key + rows.bad_rows if isinstance(rows, JsonlRows) else hash_texts(rows)

    def build(new: Path) -> None:
        workers = min(_cores(), rows.size // _BYTES_PER_WORKER) if isinstance(rows, JsonlRows) else 1
        if workers > 1:
            notes = _encode_in_workers(source, tokenizer, new, workers)
        else:
            write_arrays(encode_in_chunks(source, tokenizer), new)
            notes = rows.notes() if isinstance(rows, JsonlRows) else []
        (new / "notes.json").write_text(json.dumps(notes))

    kind = f"{type(source).__name__}{' with special tokens' if source.parse_special else ''}"
    first = first_token_of(source, tokenizer)
    kind += f" after {first}" if first else ""
    encoded = load_or_build(directory, f"{kind} {content} {tokenizer.fingerprint()}", build)
    encoded = dataclasses.replace(encoded, first_token=first)
    check_not_empty(source, [encoded])
    return encoded


def _cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hash_texts(texts: Iterable[str]) -> str:
    """A hash of the content of some texts."""
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def load_or_build(directory: str, content: str, build: Callable[[Path], None]) -> EncodedDocuments:
    """The entry of a cache for some content, made first if it is missing.

    Args:
        directory: of the cache.
        content: names the content; entries are equal where it is equal.
        build: writes the entry into a new directory, with ``write_arrays``.

    Raises:
        UserError: when the disk is full.
    """
    root = Path(directory).expanduser()
    entry = root / hashlib.blake2b(f"{_VERSION} {content}".encode(), digest_size=16).hexdigest()
    found = _read(entry)
    if found is None:
        with room_for(f"the tokenized text in {root}"):
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{entry.name}.lock"):
                found = _read(entry)  # another process may have made it meanwhile
                if found is None:
                    for unfinished in root.glob(f".{entry.name}.*"):
                        shutil.rmtree(unfinished, ignore_errors=True)
                    with replaced_directory(entry) as new:
                        build(new)
                    found = _read(entry)
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_arrays(parts: Iterable[EncodedDocuments], directory: Path, prefix: str = "") -> None:
    """Writes the arrays of documents, part by part, into one file of raw numbers for each array (``_FILES``), and their
    types and sizes into ``about.json``. ``prefix`` begins the name of every file."""
    types: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for part in parts:
            for attribute, name in _FILES.items():
                array = getattr(part, attribute)
                if array is None:
                    continue
                if name not in files:
                    files[name] = stack.enter_context(open(directory / f"{prefix}{name}", "wb"))
                    types[name] = str(array.dtype)
                files[name].write(np.ascontiguousarray(array))
    sizes = {name: (directory / f"{prefix}{name}").stat().st_size for name in types}
    _write_about(directory / f"{prefix}about.json", types, sizes)


def _write_about(path: Path, types: dict[str, str], sizes: dict[str, int]) -> None:
    path.write_text(json.dumps(seal({"version": 2, "types": types, "sizes": sizes})))


def _read(entry: Path) -> EncodedDocuments | None:
    """An entry; None if it is missing or incomplete."""
    try:
        about = read_json(entry / "about.json")
        about = unseal(about, required="version" in about)
        notes = entry / "notes.json"
        notes = parse_json(notes.read_text(encoding="utf-8")) if notes.exists() else []
        types, sizes = about["types"], about["sizes"]
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            return None
        arrays = {}
        for attribute, name in _FILES.items():
            if name in types:
                dtype, file = np.dtype(str(types[name])), entry / name
                if dtype.kind not in _KINDS[attribute] or file.stat().st_size != sizes[name]:
                    return None
                arrays[attribute] = np.memmap(file, dtype, "r") if sizes[name] else np.zeros(0, dtype)
    except (OSError, AttributeError, KeyError, TypeError, ValueError):  # damaged, or begun and not finished
        return None
    empty = {"ids": np.zeros(0, np.int32), "lengths": np.zeros(0, np.int64)}
    found = EncodedDocuments(**{**empty, **arrays, "notes": tuple(notes)})
    fits = found.loss_mask is None or len(found.loss_mask) == len(found.ids)
    return found if fits and int(found.lengths.sum()) == len(found.ids) else None


def _encode_in_workers(source: Source, tokenizer: Tokenizer, new: Path, workers: int) -> list[str]:
    """Starts a process for each shard of the rows, which writes the shard into ``new``; joins the shards; returns the
    notes. Raises UserError with the first mistake in the order of the rows."""
    tokenizer.save(new / "tokenizer")
    rows = source.texts if isinstance(source, Documents) else source.rows
    command, environment = module_command("jaxlm.data.batches.token_cache"), module_environment(RAYON_NUM_THREADS="1")
    processes: list[subprocess.Popen] = []
    try:
        for k in range(workers):
            with open(new / f"{k}.log", "wb") as log:
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, env=environment))
            field = "texts" if isinstance(source, Documents) else "rows"
            shard = dataclasses.replace(source, **{field: rows.shard(k, workers)})
            with contextlib.suppress(BrokenPipeError):  # the worker has died; its log says why
                processes[-1].stdin.write(pickle.dumps((shard, str(new), k)) + b"\n")
                processes[-1].stdin.flush()  # stdin stays open: a worker ends when it is closed
        for k, process in enumerate(processes):
            process.wait()
            outcome = new / f"{k}.json"
            if process.returncode or not outcome.exists():
                raise RuntimeError(f"a process that tokenizes failed:\n{(new / f'{k}.log').read_text()}")
            result = json.loads(outcome.read_text())
            if "error" in result:
                raise UserError(result["error"])
            rows.rejected.update({int(number): what for number, what in result["rejected"].items()})
    finally:
        for process in processes:
            process.kill()
            process.wait()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
    _join(new, workers)
    return rows.notes()


def _join(new: Path, workers: int) -> None:
    """Concatenates the files of the shards. Each is deleted once it is copied, so that no more disk space is used than
    that of all shards and the largest one."""
    types, sizes = {}, {}
    for k in range(workers):
        about = json.loads((new / f"{k}.about.json").read_text())
        for name, dtype in about["types"].items():
            with open(new / name, "ab") as whole, open(new / f"{k}.{name}", "rb") as part:
                shutil.copyfileobj(part, whole, 1 << 22)
            types[name], sizes[name] = dtype, sizes.get(name, 0) + about["sizes"][name]
            (new / f"{k}.{name}").unlink()
        for remaining in new.glob(f"{k}.*"):
            remaining.unlink()
    shutil.rmtree(new / "tokenizer")
    _write_about(new / "about.json", types, sizes)


def _work() -> None:
    """A worker process: encodes its shard of the rows, and ends early when the process that started it has ended."""
    source, directory, k = pickle.load(sys.stdin.buffer)
    sys.stdin.buffer.readline()
    threading.Thread(target=lambda: (sys.stdin.buffer.read(), os._exit(1)), daemon=True).start()
    new = Path(directory)
    rows = source.texts if isinstance(source, Documents) else source.rows
    try:
        with room_for(f"the tokenized text in {new.parent}"):
            write_arrays(encode_in_chunks(source, Tokenizer.load(new / "tokenizer")), new, f"{k}.")
        result = {"rejected": rows.rejected}
    except UserError as error:
        result = {"error": str(error)}
    (new / f"{k}.json").write_text(json.dumps(result))
    os._exit(0)  # the thread still reads


if __name__ == "__main__":
    _work()
