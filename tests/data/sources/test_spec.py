"""Sources: what a SPEC means, and the one line that each mistake gets."""

from __future__ import annotations

import gzip
import lzma
import re
import sys
import tracemalloc
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.core.errors import UserError
from jaxlm.data.sources import compressed
from jaxlm.data.sources.slices import parse_slice
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.text_chunks import count_words_and_bytes, text_chunks
from jaxlm.data.sources.types import Bitext, Documents

TEXT = "Zwölf Boxkämpfer\r\njagen Viktor\u2028quer über\n\nden großen Deich.\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Relative paths, so that messages can be compared whole."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    opener = {"gz": gzip.open, "xz": lzma.open}.get(name.rpartition(".")[2], open)
    with opener(name, "wb") as file:
        file.write(data)
    return name


@pytest.fixture
def phrasebook(monkeypatch):
    """A phrasebook of five pairs a part, in place of the generator."""
    parts = {part: [(f"{part} {i}", f"{part}-{i}") for i in range(5)] for part in ("train", "valid", "test")}
    module = types.ModuleType("jaxlm.data.phrasebook")
    module.generate = lambda seed=0: parts
    monkeypatch.setitem(sys.modules, "jaxlm.data.phrasebook", module)


# --- what a SPEC means


def test_text_is_one_stream_to_the_character():
    source = open_source("text:" + write("x.txt", TEXT))
    assert source == Documents("text:x.txt", (TEXT,), append_eos=False)
    assert not source.synthetic


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_compressed_equals_plain(suffix):
    write("x.txt", TEXT)
    write("x.txt" + suffix, TEXT)
    assert open_source(f"text:x.txt{suffix}").texts == open_source("text:x.txt").texts
    assert open_source(f"bitext:x.txt{suffix},x.txt").src == open_source("bitext:x.txt,x.txt").src


def test_jsonl_reads_the_field_text():
    write("x.jsonl", '{"text": "a\\nb", "id": 1}\n\n{"text": ""}\n{"text": "ä"}')
    source = open_source("jsonl:x.jsonl")
    assert isinstance(source, Documents) and source.append_eos
    assert list(source.texts) == list(source.texts) == ["a\nb", "", "ä"]


def test_bitext_splits_on_newline_only():
    write("a", "one\u2028still one\rstill\x0b\x1c\n\nthree\r\n")
    write("b", "eins\nzwei\ndrei")
    source = open_source("bitext:a,b")
    assert source.src == ["one\u2028still one\rstill\x0b\x1c", "", "three"]
    assert source.tgt == ["eins", "zwei", "drei"]
    assert source.texts == source.src + source.tgt


def test_tokens_are_mapped_not_read():
    np.save("t.npy", np.arange(10, dtype=np.uint16))
    source = open_source("tokens:t.npy[2:50%]")
    assert isinstance(source.ids, np.memmap)
    assert source.ids.tolist() == [2, 3, 4]


def test_phrasebook_part_and_default(phrasebook):
    assert open_source("builtin:phrasebook", "valid").src[0] == "valid 0"
    source = open_source("builtin:phrasebook:test[1:3]", "train")
    assert isinstance(source, Bitext) and source.tgt == ("test-1", "test-2")
    assert "synthetic" in source.synthetic


@pytest.mark.parametrize(
    "cut, expected",
    [
        ("[:]", "0123456789"), ("[2:5]", "234"), ("[:3]", "012"), ("[8:]", "89"), ("[-3:]", "789"), ("[:-8]", "01"),
        ("[:50%]", "01234"), ("[50%:]", "56789"), ("[25%:99.9%]", "2345678"), ("[0:1000]", "0123456789"),
        ("[ 1 : 2 ]", "1"),
    ],
)
def test_slices(cut, expected):
    write("x", "0123456789")
    write("l.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(10)))
    write("l", "".join(f"{i}\n" for i in range(10)))
    np.save("t.npy", np.arange(10))
    assert open_source(f"text:x{cut}").texts == (expected,)
    assert list(open_source(f"jsonl:l.jsonl{cut}").texts) == list(expected)
    assert open_source(f"bitext:l,l{cut}").tgt == list(expected)
    assert open_source(f"tokens:t.npy{cut}").ids.tolist() == list(map(int, expected))


@given(st.integers(1, 10**9), st.integers(0, 100))
def test_percent_slices_partition(n, percent):
    """[:p%] and [p%:] share no element and miss none, for any length: exact arithmetic, rounded down."""
    head, tail = (parse_slice("", cut)[1] for cut in (f"[:{percent}%]", f"[{percent}%:]"))
    k = n * percent // 100
    if 0 < k < n:
        assert head(n) == slice(0, k) and tail(n) == slice(k, n)


def test_slice_of_unicode_counts_characters():
    write("x", "äöü€")
    assert open_source("text:x[1:50%]").texts == ("ö",)


# --- pieces and sizes


@given(st.text(alphabet=st.sampled_from("ab.'s1 \n\r\t\u2028\u00a0é"), max_size=200), st.integers(1, 20))
def test_pieces_join_and_break_only_before_a_newline_after_a_word(text, size):
    parts = list(text_chunks(text, size))
    assert "".join(parts) == text
    for left, right in zip(parts, parts[1:], strict=False):
        assert right.startswith("\n") and not left[-1].isspace() and len(left) >= size


@given(st.lists(st.text(alphabet=st.sampled_from("ab ä\n\t\u3000"))))
def test_text_size(texts):
    assert count_words_and_bytes(texts) == (sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts))


# --- mistakes


def bad(spec: str) -> str:
    with pytest.raises(UserError) as caught:
        list(getattr(open_source(spec), "texts", ()))
    message = str(caught.value)
    assert "\n" not in message and re.search("[;:]", message), "one line that says what to do"
    return message


def test_unknown_schemes_name_the_known():
    known = (
        "text:PATH, jsonl:PATH, chat:PATH, instruct:PATH, preference:PATH, tokens:PATH.npy, bitext:SRC,TGT, "
        "wmt14:FOLDER/en-de:train, tfds:NAME/CONFIG:SPLIT, builtin:phrasebook, mix:70% SPEC + 30% SPEC"
    )
    assert bad("") == f"no data given; name a source: {known}"
    assert bad("txt:x") == f"unknown data source 'txt:x': write {known}"
    write("x.txt", "hello")
    assert bad("x.txt") == f"unknown data source 'x.txt': write {known}; did you mean text:x.txt?"
    assert bad("text:") == "'text:' names no file; write text:PATH"


@pytest.mark.parametrize("spec", ["text:{}", "jsonl:{}", "tokens:{}", "bitext:{},{}"])
def test_missing_and_empty_files(spec, here):
    assert bad(spec.format("no", "no")) == "no does not exist; check the path"
    open("empty", "w").close()
    if not spec.startswith("tokens"):
        assert bad(spec.format("empty", "empty")) == "empty is empty; name a file with text in it"
        assert bad(spec.format(write("e.gz", ""), "e.gz")) == "e.gz is empty; name a file with text in it"
        assert bad(spec.format(".", ".")) == ". is a directory; name a file in it"


def test_damaged_archives():
    for name in ("x.gz", "x.xz"):
        write(name, TEXT * 100)
        whole = open(name, "rb").read()
        for damaged in (whole[: len(whole) // 2], b"plain text"):
            open(name, "wb").write(damaged)
            assert bad(f"text:{name}").startswith(f"{name} is damaged or not a {name[1:]} file (")


@pytest.mark.parametrize(("spec", "name"), [
    ("text:{}", "x.gz"), ("text:{}", "x.xz"), ("jsonl:{}", "x.jsonl.gz"), ("bitext:{},{}", "x.gz"),
])
def test_what_expands_without_limit_is_refused(spec, name):
    write(name, bytes(1 << 25))
    tracemalloc.start()
    assert bad(spec.format(name, name)).startswith(f"{name} expands to more than 200 times its size")
    assert tracemalloc.get_traced_memory()[1] < 1 << 25
    tracemalloc.stop()


def test_what_shrinks_well_is_read():
    write("small.gz", b"a" * (1 << 23))  # a thousand times smaller, and harmless
    assert len(open_source("text:small.gz").texts[0]) == 1 << 23
    write("x.xz", TEXT)
    whole = open("x.xz", "rb").read()
    open("x.xz", "wb").write(whole + bytes(8) + whole)  # two streams with zeros between them
    assert open_source("text:x.xz").texts == (TEXT * 2,)


def test_an_xz_file_takes_no_more_memory_than_is_usual(monkeypatch):
    write("x.xz", TEXT)
    monkeypatch.setattr(compressed, "_XZ_MEMORY", 1 << 20)  # it says that it takes eight MiB
    assert bad("text:x.xz").startswith("x.xz is damaged or not a .xz file (Memory usage limit")


def test_invalid_utf8_names_file_and_line():
    write("x", b"fine\nfine \xc3\xa4\nbad \xe4\n")
    expected = "x:3: invalid UTF-8 (byte 0xe4); convert the file to UTF-8"
    assert bad("text:x") == bad("bitext:x,x") == expected


def test_unequal_line_counts():
    write("a", "1\n2\n3\n")
    write("b", "1\n2")
    assert bad("bitext:a,b") == "a has 3 lines and b has 2; line i of one must translate line i of the other"


@pytest.mark.parametrize("paths, n", [("a", 1), ("a,", 1), (",", 0), ("a,b,c", 3)])
def test_bitext_wants_two_files(paths, n):
    assert bad(f"bitext:{paths}") == f"'bitext:{paths}' names {n} files; write bitext:SRC,TGT"


def test_jsonl_lines():
    good = '{"text": "a"}\n'
    write("x", good + "\n" + '{"text": \n')
    assert bad("jsonl:x") == "x:3: not JSON (Expecting value); write one object a line"
    assert bad("jsonl:x[1:]").startswith("x:3: "), "numbers are those of the file, whatever the slice"
    for wrong in ('{"txt": "a"}', '{"text": 5}'):
        write("x", good + wrong)
        assert bad("jsonl:x") == 'x:2: no string under "text"; write {"text": "..."} on each line'
    for wrong in ('["text"]', '"text"', "3"):
        write("x", good + wrong)
        assert bad("jsonl:x") == "x:2: not an object; write one object a line"


@pytest.mark.parametrize("cut", ["1", "a:b", "1:2:3", "-10%:", "1.5:", "%:", "", "1:2]["])
def test_bad_slices(cut):
    write("x", "0123456789")
    inside = cut.rpartition("[")[2]
    assert bad(f"text:x[{cut}]") == (
        f"bad slice [{inside}] in 'text:x[{cut}]'; write [a:b] with integers or percentages, such as [:90%]"
    )


@pytest.mark.parametrize("cut", ["5:5", "7:3", "10:", ":0%", "100%:", ":-10"])
def test_empty_slices(cut):
    write("x", "0123456789")
    assert bad(f"text:x[{cut}]") == f"the slice [{cut}] of 'text:x[{cut}]' is empty: there are 10 to choose from"


def test_tokens_must_be_a_row_of_integers():
    for array, what in ((np.zeros(3), "float64 [3]"), (np.zeros((2, 2), int), "int64 [2, 2]")):
        np.save("t.npy", array)
        assert bad("tokens:t.npy") == f"t.npy holds {what}; token ids are a one-dimensional integer array"
    np.savez("t.npz", ids=np.arange(3))
    assert bad("tokens:t.npz") == "t.npz holds an archive; token ids are a one-dimensional integer array"
    np.save("t.npy", np.zeros(0, int))
    assert bad("tokens:t.npy") == "t.npy is empty; name a file with token ids in it"
    for content in ("hello", "", b"\x93NUMPY\x01\x00"):
        write("t.npy", content)
        assert bad("tokens:t.npy").startswith("t.npy is not a plain .npy file of numbers (")
    np.save("t.npy", np.array([{}]), allow_pickle=True)
    assert bad("tokens:t.npy").startswith("t.npy is not a plain .npy file of numbers (")


def test_builtin_names(phrasebook):
    assert "'novel'" in bad("builtin:novel") and "builtin:phrasebook" in bad("builtin:novel")
    message = bad("builtin:phrasebook:dev")
    assert "'dev'" in message and "train, valid, test" in message
