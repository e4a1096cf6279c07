"""Files of rows: indexed, mapped, cut and shared out; and every way in which a row can be bad."""

from __future__ import annotations

import gzip
import json
import os
import pickle

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.batches.encoding import encode_documents
from jaxlm.data.sources import jsonl
from jaxlm.data.sources.jsonl import JsonlRows
from jaxlm.data.sources.spec import open_source, text_row
from jaxlm.data.tokenizers.tokenizer import Tokenizer

BAD = [  # line, what is said of it
    (b'{"text": "b"', "not JSON (Expecting ',' delimiter)"),
    (b'["text"]', "not an object"),
    (b'{"txt": "b"}', 'no string under "text"'),
    (b'{"text": "\xe4"}', "invalid UTF-8 (byte 0xe4)"),
    (b'{"text": "b"}\r{"text": "c"}', "several rows separated by a bare \\r"),
    (b'{"text": "\\ud83d"}', "half of a surrogate pair, which is not a character"),
    (b'{"text": ' + b"[" * 50_000, "nested more than 100 deep"),
    (b'{"text": "b", "n": ' + b"9" * 5000 + b"}", "a number has thousands of digits"),
    (b'{"text": "' + b"x" * 3000 + b'"}', "longer than 0 MiB"),
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(path: str, cut=lambda n: slice(0, n), bad_rows="fail") -> JsonlRows[str]:
    return JsonlRows(path, text_row, cut, bad_rows)


def write(name: str, lines: list[bytes], end: bytes = b"\n") -> str:
    with (gzip.open if name.endswith("gz") else open)(name, "wb") as file:
        file.write(b"".join(line + end for line in lines))
    return name


def numbered(count: int) -> list[bytes]:
    return [json.dumps({"text": f"{i} " + "ä" * (i * 7 % 50)}, ensure_ascii=i % 2 == 0).encode() for i in range(count)]


@pytest.mark.parametrize("line, why", BAD, ids=[why for _, why in BAD])
def test_bad_rows_are_fatal_or_counted(line, why, monkeypatch):
    if line.startswith(b'{"text": "xxx'):
        monkeypatch.setattr(jsonl, "_MAX_LINE", 1000)
    write("x", [b'{"text": "a"}', line, b"", b'{"text": "d"}'])
    with pytest.raises(UserError) as caught:
        list(rows("x"))
    assert str(caught.value).startswith(f"x:2: {why}; ") and "\n" not in str(caught.value)
    some = rows("x", bad_rows="report")
    assert list(some) == list(some) == ["a", "d"]
    assert some.rejected == {2: why}
    assert some.notes() == [f"1 of 4 rows of x are left out: 1 {why} (line 2)"]
    assert list(rows("x", lambda n: slice(2, n))) == ["d"], "what is not read is no mistake"


def test_bad_rows_reach_whoever_trains():
    write("x", [b'{"text": "ab"}', b"{", b"{", *[b"3"] * 7])
    tokenizer = Tokenizer.train(["ab"], "char")
    found = encode_documents(open_source("jsonl:x", bad_rows="report"), tokenizer)
    assert found.ids.tolist() == [*tokenizer.encode("ab"), tokenizer.eos_id] and found.lengths.tolist() == [3]
    assert found.notes == (
        "9 of 10 rows of x are left out: 7 not an object (lines 4, 5, 6, 7, 8, ...); 2 not JSON (Expecting property "
        "name enclosed in double quotes) (lines 2, 3)",
    )
    with pytest.raises(UserError, match="x:2: not JSON"):
        encode_documents(open_source("jsonl:x"), tokenizer)
    write("x", [b"{", b'{"text": ""}'])
    with pytest.raises(UserError, match="'jsonl:x' holds no text; name a file with documents in it"):
        encode_documents(open_source("jsonl:x", bad_rows="report"), tokenizer)


def test_line_ends_may_mix_and_a_mark_may_come_first():
    open("x", "wb").write(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\n{"text": "c"}')
    assert list(rows("x")) == ["a", "b", "c"] and len(rows("x")) == 5
    assert [number for number, _ in rows("x").numbered()] == [1, 4, 5]


def test_the_index_is_kept_and_believed_only_where_it_fits(monkeypatch):
    monkeypatch.setattr(jsonl, "_MIN_BYTES_TO_INDEX", 0)
    monkeypatch.setattr(jsonl, "_BLOCK", 64)  # lines go across blocks
    write("x", numbered(40))
    first = rows("x")
    kept = np.load("x.index.npy")
    assert kept[5:].tolist() == [0, *np.cumsum([len(line) + 1 for line in numbered(39)])]
    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "_scan", lambda *_: pytest.fail("scanned again"))
        again = rows("x")
    assert list(again) == list(first) and again.content_key == first.content_key
    before = os.stat("x")
    write("x", numbered(41)[1:])
    os.utime("x", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = rows("x")
    assert list(changed) == [json.loads(line)["text"] for line in numbered(41)[1:]]
    assert changed.content_key != first.content_key
    kept = np.load("x.index.npy")
    np.save("y.npy", kept + (np.arange(len(kept)) == 7))  # another number is not believed
    for damage in (b"", b"\x93NUMPY", kept.tobytes(), open("y.npy", "rb").read()):
        open("x.index.npy", "wb").write(damage)
        assert list(rows("x")) == list(changed)


def test_an_index_that_cannot_be_kept_is_made_again(monkeypatch):
    monkeypatch.setattr(jsonl, "_MIN_BYTES_TO_INDEX", 0)
    write("x", numbered(5))

    def refuse(*_, **__):
        raise PermissionError

    monkeypatch.setattr(jsonl, "replaced_file", refuse)
    assert len(list(rows("x"))) == 5 and os.listdir() == ["x"]


@pytest.mark.parametrize("name", ["x", "x.gz"])
@pytest.mark.parametrize("cut", [slice(0, 37), slice(5, 30), slice(3, 4)], ids=str)
def test_parts_are_the_whole(name, cut):
    write(name, numbered(37))
    whole = rows(name, lambda n: cut)
    for n in (1, 2, 3, 50):
        parts = [pickle.loads(pickle.dumps(whole.shard(k, n))) for k in range(n)]
        assert [row for part in parts for row in part.numbered()] == list(whole.numbered())
        assert sum(part.size for part in parts) == whole.size
    sizes = [part.size for part in (rows(name).shard(k, 4) for k in range(4))]
    assert max(sizes) < 2 * min(sizes)


def test_what_is_read_has_a_name():
    write("x", numbered(9))
    write("y", numbered(9))
    assert rows("x").content_key == rows("y").content_key
    others = [
        rows("x", lambda n: slice(1, n)), JsonlRows("x", dict, lambda n: slice(0, n)), rows(write("z", numbered(8)))
    ]
    assert len({each.content_key for each in (rows("x"), *others)}) == 4
