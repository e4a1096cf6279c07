"""Checksums of the safetensors files that jaxlm writes. They are in the ``__metadata__`` of the header:

    jaxlm.version     "2"
    jaxlm.checksums   JSON: {"header": of the rest of the header, which has the types, shapes and places of the tensors;
                      "block": bytes; "tensors": name -> of each block of its bytes, one after the other}
    jaxlm.crc32       in files of version 1, in place of both: JSON, name -> of all bytes of the tensor

Each is a CRC-32 of eight hexadecimal digits. Whoever reads a part of a tensor checks the blocks that have it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxlm.core.host_memory import host_threads
from jaxlm.core.untrusted import json_checksum, parse_json

__all__ = ["CHECKSUMS", "FileChecksums", "VERSION", "block_checksums", "checksum_metadata", "unknown_checksums"]

VERSION, CHECKSUMS = "jaxlm.version", "jaxlm.checksums"
_VERSION_1 = "jaxlm.crc32"
_BLOCK = 1 << 22  # bytes
_MIN_THREADED = 8  # blocks; fewer are not worth a thread
_NO_BLOCKS = 1 << 62  # of version 1: larger than any tensor


class FileChecksums:
    """The checksums of one file, and which blocks have been found right."""

    def __init__(self, header: Mapping[str, Any]):
        """
        Args:
            header: the parsed header of the file.

        Raises:
            ValueError: the header or its checksums are damaged.
        """
        metadata = header.get("__metadata__") or {}
        self._block, self._sums, self.covers_all = _NO_BLOCKS, {}, False
        self._checked: set[tuple[str, int]] = set()
        if VERSION in metadata or CHECKSUMS in metadata:
            stored = parse_json(metadata.get(CHECKSUMS, "null"))
            if metadata.get(VERSION) != "2" or not isinstance(stored, dict):
                raise ValueError("its checksums are damaged, or those of a newer jaxlm")
            self._block, self._sums, self.covers_all = stored.get("block"), stored.get("tensors"), True
            if type(self._block) is not int or self._block < 1 or not isinstance(self._sums, dict):
                raise ValueError("its checksums are damaged")
            if stored.get("header") != _header_checksum(header):
                raise ValueError("the checksum of its header is wrong")
        elif _VERSION_1 in metadata:
            self._sums = dict(parse_json(metadata[_VERSION_1]))

    def is_damaged(self, name: str, data: memoryview, start: int, stop: int) -> bool:
        """Whether a block of a tensor that has some of the bytes from ``start`` to ``stop`` is not what was written.

        Args:
            data: all bytes of the tensor.
        """
        if name not in self._sums:
            return self.covers_all
        if not self.covers_all and (start, stop) != (0, len(data)):
            return False  # version 1 tells only of whole tensors
        sums = _split(self._sums[name])
        if len(sums) != -(-len(data) // self._block):
            return True
        blocks = range(start // self._block, -(-stop // self._block))
        blocks = [each for each in blocks if (name, each) not in self._checked]
        found = _checksums([data[each * self._block : (each + 1) * self._block] for each in blocks])
        self._checked |= {(name, each) for each, right in zip(blocks, found, strict=True) if right == sums[each]}
        return any((name, each) not in self._checked for each in blocks)


def checksum_metadata(header: Mapping[str, Any], tensors: Mapping[str, str]) -> dict[str, Any]:
    """What the metadata says of a file with this header, which has everything else; ``tensors`` has the
    ``block_checksums`` by name."""
    metadata = {**header.get("__metadata__", {}), VERSION: "2"}
    rest = _header_checksum({**header, "__metadata__": metadata})
    return {VERSION: "2", CHECKSUMS: {"header": rest, "block": _BLOCK, "tensors": dict(tensors)}}


def block_checksums(data: memoryview) -> str:
    """The checksums of the blocks of a tensor's bytes."""
    return "".join(_checksums([data[start : start + _BLOCK] for start in range(0, len(data), _BLOCK)]))


def unknown_checksums(nbytes: int) -> str:
    """As long as the ``block_checksums`` of a tensor of this size."""
    return "0" * (8 * -(-nbytes // _BLOCK))


def _split(sums: Any) -> list[str]:
    sums = sums if isinstance(sums, str) else ""
    return [sums[start : start + 8] for start in range(0, len(sums), 8)]


def _checksums(blocks: Sequence[memoryview]) -> list[str]:
    if len(blocks) < _MIN_THREADED:
        return [f"{zlib.crc32(each):08x}" for each in blocks]
    return [f"{each:08x}" for each in host_threads().map(zlib.crc32, blocks)]


def _header_checksum(header: Mapping[str, Any]) -> str:
    metadata = {name: value for name, value in header["__metadata__"].items() if name != CHECKSUMS}
    return json_checksum({**header, "__metadata__": metadata})
