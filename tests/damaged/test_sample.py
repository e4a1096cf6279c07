"""A sample of ``tests/benchmarks/damaged_files.py``: damaged files are read, or refused in one line."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from jaxlm.core.errors import UserError
from tests.damaged import cases
from tests.damaged.formats import FORMATS, Format
from tests.limits import Hang

SAMPLE = tuple(name for name in FORMATS if not name.startswith("SentencePiece") or name.endswith("Llama"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_a_sample_of_damaged_files():
    found = list(cases.run(2, range(5 * len(SAMPLE)), SAMPLE))
    assert [each for each in found if each[1] not in cases.GOOD] == []
    assert {result for _, result, _ in found} == {"loaded", "refused"}
    assert {case.format for case, _, _ in found} == set(SAMPLE)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_each_kind_of_fault_is_noticed(tmp_path, monkeypatch):
    def take_memory():
        with mmap.mmap(-1, 1 << 29) as pages:  # the heap may have room that was freed
            for start in range(0, len(pages), mmap.PAGESIZE):
                pages[start] = 1

    def raises(error):
        def read(path):
            if path.name == "case":
                raise error

        return read

    faults = {
        "refused": raises(UserError("x")), "traceback": raises(KeyError("x")), "hang": raises(Hang()),
        "memory": lambda path: take_memory() if path.name == "case" else None,
        "wrong": lambda path: path.name == "case",
    }
    for number, (expected, read) in enumerate(faults.items()):
        name = f"format {number}"
        monkeypatch.setitem(FORMATS, name, Format(lambda path: (path / "x").write_text("x"), read, ["x"], ["x"]))
        directory = tmp_path / str(number) / "case"
        assert cases.outcome(cases.case(0, 0, (name,)), directory)[0] == expected
