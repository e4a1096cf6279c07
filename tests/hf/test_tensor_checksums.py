"""The checksums of safetensors files: what is damaged is found, types and shapes too, also where a part is read."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.core.errors import UserError
from jaxlm.hf import tensor_checksums
from jaxlm.hf.tensor_files import WEIGHTS_FILE, TensorFiles, write_tensors
from tests.hf.damage import join_file

TENSORS = {
    "w": np.arange(96, dtype=np.float32).reshape(6, 16), "b": np.arange(3, dtype=np.float16),
    "none": np.zeros((0, 4), np.float32), "codes": np.arange(-5, 5, dtype=np.int8),
}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """(path, header, data) of a file with blocks of one row of ``w``."""
    monkeypatch.setattr(tensor_checksums, "_BLOCK", 64)
    write_tensors(tmp_path, TENSORS)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    return tmp_path / WEIGHTS_FILE, json.loads(whole[8:end]), whole[end:]


def everything(path) -> dict[str, np.ndarray]:
    files = TensorFiles(path.parent)
    return {name: files.read(name) for name in files}


def same(found: dict[str, np.ndarray]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        found[name].dtype == array.dtype and np.array_equal(found[name], array) for name, array in TENSORS.items()
    )


def test_other_libraries_read_the_file(written):
    assert same(everything(written[0])) and same(load_file(written[0]))


def test_every_byte_counts(written):
    path, header, data = written
    whole = path.read_bytes()
    refused = 0
    for at in range(len(whole)):
        path.unlink()  # some file systems wait for the disk where a file is written over
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        try:
            assert same(everything(path))
        except UserError as error:
            refused += str(path) in str(error)
    assert refused > len(whole) - 40  # but for "format" and the spaces at the end of the header


def test_a_part_is_checked_by_the_blocks_that_have_it(written):
    path, header, data = written
    at = header["w"]["data_offsets"][0] + 3 * 64 + 8  # in row 3
    path.write_bytes(join_file(header, data[:at] + b"\xff" + data[at + 1 :]))
    files = TensorFiles(path.parent)
    for rows in (slice(0, 3), slice(4, 6)):
        np.testing.assert_array_equal(files.read_slice("w", (rows,)), TENSORS["w"][rows])
    for part in ((slice(2, 4),), (slice(None), slice(9, 11)), (slice(3, 4), slice(0, 1))):
        with pytest.raises(UserError, match="'w' is damaged .*checksum"):
            files.read_slice("w", part)


@pytest.mark.parametrize("change", [
    lambda header, sums: header["w"].update(dtype="I32"),
    lambda header, sums: header["w"].update(shape=[16, 6]),
    lambda header, sums: header.update(b=header["b"] | {"dtype": "BF16"}),
    lambda header, sums: header["__metadata__"].update(jaxlm="x"),
    lambda header, sums: header["__metadata__"].pop("jaxlm.version"),
    lambda header, sums: header["__metadata__"].pop("jaxlm.checksums"),
    lambda header, sums: header["__metadata__"].update({"jaxlm.version": "3"}),
    lambda header, sums: sums.pop("header"),
    lambda header, sums: sums["tensors"].pop("w"),
    lambda header, sums: sums["tensors"].update(w=sums["tensors"]["w"][:-8]),
    lambda header, sums: sums.update(block=10**9),
])
def test_types_shapes_and_missing_checksums_count(written, change):
    path, header, data = written
    sums = json.loads(header["__metadata__"]["jaxlm.checksums"])
    change(header, sums)
    if "jaxlm.checksums" in header["__metadata__"]:
        header["__metadata__"]["jaxlm.checksums"] = json.dumps(sums)
    path.write_bytes(join_file(header, data))
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE}.*checksum"):
        everything(path)


def test_files_of_version_1_load(tmp_path):
    path = tmp_path / WEIGHTS_FILE
    sums = {name: f"{zlib.crc32(array.tobytes()):08x}" for name, array in TENSORS.items()}
    save_file(TENSORS, path, metadata={"format": "pt", "jaxlm": "", "jaxlm.crc32": json.dumps(sums)})
    assert same(everything(path))
    save_file(TENSORS | {"b": np.ones(3, np.float16)}, path, metadata={"jaxlm.crc32": json.dumps(sums)})
    with pytest.raises(UserError, match="'b' is damaged"):
        everything(path)
