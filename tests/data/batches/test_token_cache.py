"""The cache of tokenized text: the same as without, made once, and whole or not there, whatever happens meanwhile."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.batches import token_cache
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.token_cache import encode_cached, load_or_build
from jaxlm.data.sources.jsonl import JsonlRows
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Documents, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["the cat sat on the mat"], vocab_size=262)
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def same(a: EncodedDocuments, b: EncodedDocuments) -> bool:
    arrays = all(
        getattr(a, name).dtype == getattr(b, name).dtype and np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("ids", "lengths", "loss_mask") if getattr(b, name) is not None
    )
    return arrays and (a.loss_mask is None) == (b.loss_mask is None) and a.notes == b.notes


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"the cat {i}" * (i % 5), "prompt": f"the {i}", "completion": "mat" * (i % 7)} for i in range(50)]
    Path("x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:40]) + "3\n" + json.dumps(rows[45]))
    Path("x.txt").write_text("the cat sat on the mat\n" * 20)


@pytest.fixture
def two_workers(monkeypatch):
    monkeypatch.setattr(token_cache, "_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})


def names() -> list[str]:
    """What the cache holds but locks."""
    return [name for name in os.listdir("cache") if not name.endswith(".lock")]


SPECS = ["jsonl:x.jsonl", "instruct:x.jsonl[1:]", "text:x.txt", "tokens:t.npy"]


@pytest.mark.parametrize("spec", SPECS)
def test_the_cache_is_what_it_keeps(spec, monkeypatch):
    np.save("t.npy", np.arange(9))
    fresh = encode_documents(open_source(spec, bad_rows="report"), TOKENIZER)
    assert same(encode_cached(open_source(spec, bad_rows="report"), TOKENIZER, ""), fresh)
    assert same(encode_cached(open_source(spec, bad_rows="report"), TOKENIZER, "cache"), fresh)
    if spec.startswith("tokens"):
        assert not Path("cache").exists()
        return
    assert len(names()) == 1
    monkeypatch.setattr(token_cache, "encode_in_chunks", lambda *_: pytest.fail("encoded again"))
    again = encode_cached(open_source(spec, bad_rows="report"), TOKENIZER, "cache")
    assert same(again, fresh) and isinstance(again.ids, np.memmap)


def test_another_content_or_tokenizer_has_another_name(monkeypatch):
    other = Tokenizer.train(["the dog"], vocab_size=261)
    again = Tokenizer.train(["the cat sat on the mat"], vocab_size=262)
    assert again.fingerprint() == TOKENIZER.fingerprint() != other.fingerprint()
    for source, tokenizer, count in (
        ("jsonl:x.jsonl[:9]", TOKENIZER, 1), ("jsonl:x.jsonl[:9]", again, 1), ("jsonl:x.jsonl[:8]", again, 2),
        ("jsonl:x.jsonl[:9]", other, 3), ("instruct:x.jsonl[1:6]", TOKENIZER, 4), ("text:x.txt", TOKENIZER, 5),
    ):
        encode_cached(open_source(source), tokenizer, "cache")
        assert len(names()) == count
    Path("x.txt").write_text("the cat")
    encode_cached(open_source("text:x.txt"), TOKENIZER, "cache")
    assert len(names()) == 6
    with pytest.raises(UserError, match="x.jsonl:41: not an object"):
        encode_cached(open_source("jsonl:x.jsonl"), TOKENIZER, "cache")
    assert len(names()) == 6


def test_several_processes_make_what_one_makes(two_workers, monkeypatch):
    """Of dialogues, which have all three arrays; documents are made by several processes in the next test. None of the
    processes imports a module from the working directory."""
    spec = "instruct:x.jsonl[1:]"
    for module in ("json", "numpy", "jaxlm"):
        Path(f"{module}.py").write_text("raise SystemExit('a stranger')")
    fresh = encode_documents(open_source(spec, bad_rows="report"), TOKENIZER)
    monkeypatch.setattr(token_cache, "encode_in_chunks", lambda *_: pytest.fail("encoded here"))
    assert same(encode_cached(open_source(spec, bad_rows="report"), TOKENIZER, "cache"), fresh)
    assert "of x.jsonl are left out" in fresh.notes[0] and "lines" in fresh.notes[0]
    entry = Path("cache", *names())
    assert {file.name for file in entry.iterdir()} == {"ids", "lengths", "learned", "about.json", "notes.json"}


def test_mistakes_of_processes_are_told_as_those_of_one(two_workers):
    with pytest.raises(UserError, match="^x.jsonl:41: not an object; write one object a line$"):
        encode_cached(open_source("jsonl:x.jsonl"), TOKENIZER, "cache")
    assert names() == []
    rows = JsonlRows("x.jsonl", exits, lambda n: slice(0, n))
    with pytest.raises(RuntimeError, match="a process that tokenizes failed:\nexits"):
        encode_cached(Documents("x", rows, append_eos=True), TOKENIZER, "cache")
    assert names() == []


def exits(row) -> str:
    print("exits", file=sys.stderr, flush=True)
    os._exit(3)


def other_about(place: Path, change) -> None:
    about = json.loads((place / "about.json").read_text())
    change(about)
    (place / "about.json").write_text(json.dumps(about))


@pytest.mark.parametrize("damage", [lambda place: (place / "ids").write_bytes(b"x"),
                                    lambda place: (place / "about.json").write_text("[" * 100_000),
                                    lambda place: (place / "about.json").write_text('{"types": 3}'),
                                    lambda place: (place / "notes.json").write_text('{"a": 3}'),
                                    lambda place: other_about(place, lambda about: about["types"].update(ids="int16")),
                                    lambda place: other_about(place, lambda about: about.pop("checksum")),
                                    lambda place: (place / "about.json").write_text("{"),
                                    lambda place: (place / "lengths").unlink()])
def test_what_is_not_whole_is_made_again(damage):
    source = open_source("text:x.txt")
    fresh = encode_documents(source, TOKENIZER)
    encode_cached(source, TOKENIZER, "cache")
    damage(Path("cache", *names()))
    assert same(encode_cached(source, TOKENIZER, "cache"), fresh) and len(names()) == 1


BUILD = """
import sys, time
from pathlib import Path
import numpy as np
from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.batches.token_cache import load_or_build, write_arrays

def parts():
    for i in range(3):
        yield EncodedDocuments(np.full(5, i), np.array([5]))
        if i == 1:
            Path(f"busy-{sys.argv[1]}").touch()
            time.sleep(float(sys.argv[2]))

print(load_or_build("cache", "content", lambda new: write_arrays(parts(), new)).ids.sum())
"""


def building(name: str, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", BUILD, name, str(seconds)], env=ENV, stdout=subprocess.PIPE)


def wait_for(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_a_killed_builder_leaves_nothing_that_is_believed_and_two_at_once_make_it_once():
    killed = building("a", 600)
    wait_for(Path("busy-a").exists)
    waiting = [building(name, 0.3) for name in "bc"]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [process.communicate(timeout=60)[0] for process in waiting] == [b"15\n", b"15\n"]
    assert len(list(Path().glob("busy-[bc]"))) == 1, "one builds while the other waits"
    assert len(names()) == 1, "what was half done is gone"
    assert load_or_build("cache", "content", lambda new: pytest.fail("made again")).ids.sum() == 15


def slow(row) -> str:
    with open("pids", "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.2)
    return "the cat"


PARENT = """
import os
from jaxlm.data.batches import token_cache
from jaxlm.data.sources.jsonl import JsonlRows
from jaxlm.data.sources.types import Documents
from tests.data.batches.test_token_cache import TOKENIZER, slow

token_cache._BYTES_PER_WORKER = 1
os.sched_getaffinity = lambda _: {0, 1}
token_cache.encode_cached(Documents("x", JsonlRows("x.jsonl", slow, lambda n: slice(0, 40)), True), TOKENIZER, "cache")
"""


def test_workers_of_a_killed_builder_end():
    with subprocess.Popen([sys.executable, "-c", PARENT], env=ENV) as parent:
        wait_for(lambda: Path("pids").exists() and len(set(Path("pids").read_text().split())) == 2)
        parent.kill()
    pids = set(map(int, Path("pids").read_text().split()))
    assert parent.pid not in pids
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(workers, monkeypatch):
    Path("long.jsonl").write_text('{"text": "%s"}\n' % ("cat" * 99) * 400)
    if workers == 2:
        monkeypatch.setattr(token_cache, "_BYTES_PER_WORKER", 1)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    source = open_source("jsonl:long.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(UserError, match="^no space left for the tokenized text in .*; free some and run again"):
            encode_cached(source, TOKENIZER, "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names() == []
    monkeypatch.setattr(token_cache, "_BYTES_PER_WORKER", 1 << 23)
    assert same(encode_cached(source, TOKENIZER, "cache"), encode_documents(source, TOKENIZER))


def test_ids_that_are_given_are_not_kept():
    source = Tokens("tokens:x", np.arange(5))
    assert encode_cached(source, TOKENIZER, "cache").ids is source.ids and not Path("cache").exists()
