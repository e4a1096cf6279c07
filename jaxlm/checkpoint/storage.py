"""Parameters as the flat arrays of a safetensors file, and back bit for bit, whatever their representation.

A dense array that nothing makes smaller is stored as itself under its path. Everything else is a few byte arrays,
``<path>/<part>/<stream>``, and an entry in the metadata:

    {"format": 1, "tensors": {"<path>": {
        "shape": the dense shape, "dtype": of a dense array
        "bits", "group", "act_bits", "axis": of a quantized array (core.leaves.QArray), "codes": their dtype if not int8
        "bits", "group", "kind", "axis", "common": of values from a table (core.leaves.Codebook)
        "a", "b": entries without checksums, the factors of a product (core.leaves.LowRank)
        "parts": {"<part>": {"layout": ..., "streams": {"<stream>": method}, "gaps": entries of the gaps stream}},
        "crc32": of the entry itself and its arrays}}}

FORMAT.md beside this file says all that another program needs to read it.

The parts are ``dense``, or ``codes``, ``scale``, ``zero``, ``act_scale`` and ``table``. See ``checkpoint.codec`` for
layouts, streams and methods. A part with the layout ``array`` is an array of its own dtype. Codes are stored minus the
zeros (minus the most common code, "common", where a table gives them their values), modulo ``2**bits``. Floats of
``scale`` and ``table`` are stored in the first type that holds all of them exactly, which the part calls its "dtype":
``exponent`` (a byte ``e`` for ``2**(e - 127)``), ``float16`` or ``float32``.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.codec import CodedStream, CorruptError
from jaxlm.checkpoint.leaf_coding import Streams, Tensors, array_name, array_suffixes, pack_leaf, unpack_leaf
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Leaf, Params, flatten, unflatten

__all__ = ["PackedWeights", "StoredTensor", "leaf_bytes", "pack_params", "tensor_bytes", "unpack_params"]

FORMAT = 1


class StoredTensor(NamedTuple):
    """A parameter in a file: its bytes, and how its parts are coded: ``codes mask (raw, huffman), scale array``."""

    nbytes: int
    coding: str


class PackedWeights:
    """Parameters as they are stored. They are packed once, when their bytes are first asked for.

    Sizes in ``plain`` storage are told without packing. Later changes of ``params`` do not show; ``holds`` tells.
    """

    def __init__(self, params: Params, storage: str = "plain"):
        self.storage = storage
        self._leaves = flatten(params)
        self._sizes: dict[str, StoredTensor] = {}

    @functools.cached_property
    def _packed(self) -> tuple[Tensors, dict[str, Any]]:
        return _pack_leaves(self._leaves, self.storage)

    @property
    def tensors(self) -> Tensors:
        """The arrays of the file by name."""
        return self._packed[0]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the file says about them, JSON-safe."""
        return self._packed[1]

    def stored(self, path: str) -> StoredTensor:
        """How the parameter at ``path`` is stored."""
        if path not in self._sizes:
            if self.storage == "plain":  # the sizes follow from the numbers of values and of zeros
                entry, streams = pack_leaf(self._leaves[path], self.storage)
            else:
                entry = self.metadata["tensors"][path]
                streams = {suffix: self.tensors[array_name(path, suffix)] for suffix in array_suffixes(entry)}
            self._sizes[path] = StoredTensor(_nbytes(streams), ", ".join(_codings(entry)))
        return self._sizes[path]

    @property
    def sizes(self) -> dict[str, StoredTensor]:
        """How each parameter is stored, by path."""
        return {path: self.stored(path) for path in self._leaves}

    def holds(self, params: Params, storage: str) -> bool:
        """Whether this is made of the very arrays of ``params``, not merely of equal ones, in that storage."""
        leaves = flatten(params)
        mine, others = jax.tree.leaves(self._leaves), jax.tree.leaves(leaves)
        same = self._leaves.keys() == leaves.keys() and len(mine) == len(others)
        return same and storage == self.storage and all(a is b for a, b in zip(mine, others, strict=True))


def pack_params(params: Params, storage: str = "plain") -> tuple[Tensors, dict[str, Any]]:
    """Arrays by name and their JSON metadata.

    ``plain`` packs codes and leaves out zeros; ``huffman`` also codes every stream in the way of the fewest bytes.
    """
    return _pack_leaves(flatten(params), storage)


def _pack_leaves(leaves: Mapping[str, Leaf], storage: str) -> tuple[Tensors, dict[str, Any]]:
    tensors: Tensors = {}
    entries = {}
    for path, leaf in leaves.items():
        entry, streams = pack_leaf(leaf, storage)
        arrays = {name: each.data if isinstance(each, CodedStream) else each for name, each in streams.items()}
        entry["crc32"] = _checksum(entry, arrays)
        tensors |= {array_name(path, suffix): array for suffix, array in arrays.items()}
        entries[path] = entry
    return tensors, {"format": FORMAT, "tensors": entries}


def unpack_params(like: Params, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Params:
    """The parameters that were packed; ``like`` gives the paths and the dense shapes (it may be abstract).

    Nothing larger than the model asks for is allocated.

    Raises:
        UserError: the arrays do not fit the metadata, the metadata does not fit the model, or a checksum is wrong; the
            message names the tensor.
    """
    if meta.get("format") != FORMAT:
        raise UserError(f"the weights are in format {meta.get('format')!r}, this version reads {FORMAT}; update jaxlm")
    entries = meta.get("tensors")
    if not isinstance(entries, dict):
        raise UserError("the metadata of the weights names no tensors; copy or download the model again")
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(like).items()}
    if missing := sorted(shapes.keys() - entries.keys()):
        raise UserError(f"the weights lack {missing[0]}; the file is damaged or of another model")
    if extra := sorted(entries.keys() - shapes.keys()):
        raise UserError(f"the weights hold {extra[0]}, which the model has no place for; check config.json")
    return unflatten(like, {path: _unpack(path, shape, tensors, entries[path]) for path, shape in shapes.items()})


def tensor_bytes(size: Callable[[str], int], meta: Mapping[str, Any]) -> dict[str, int]:
    """For each path its bytes in a file; ``size`` gives those of each array by name."""
    return {
        path: sum(size(array_name(path, suffix)) for suffix in array_suffixes(entry))
        for path, entry in meta["tensors"].items()
    }


def leaf_bytes(leaf: Leaf, storage: str = "plain") -> int:
    """The bytes that ``pack_params`` would make of one leaf, told without coding them where that is possible."""
    return _nbytes(pack_leaf(leaf, storage)[1])


def _nbytes(streams: Streams) -> int:
    return sum(each.nbytes for each in streams.values())


def _codings(entry: Mapping[str, Any], within: str = "") -> list[str]:
    """How each part of an entry is coded."""
    if "a" in entry:
        return _codings(entry["a"], "a/") + _codings(entry["b"], "b/")
    out = []
    for part, fields in entry["parts"].items():
        methods = ", ".join(fields["streams"].values())
        out.append(f"{within}{part} {fields['layout']}" + (f" ({methods})" if methods else ""))
    return out


def _checksum(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
    fields = {key: value for key, value in entry.items() if key != "crc32"}
    crc = zlib.crc32(json.dumps(fields, sort_keys=True).encode())
    for suffix in array_suffixes(entry):
        crc = zlib.crc32(_bytes(arrays[suffix]).data, crc)
    return crc


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unpack(path: str, shape: tuple[int, ...], tensors: Mapping[str, np.ndarray], entry: Mapping[str, Any]) -> Leaf:
    try:
        arrays = {suffix: np.asarray(tensors[array_name(path, suffix)]) for suffix in array_suffixes(entry)}
        if _checksum(entry, arrays) != entry["crc32"]:
            raise CorruptError("its checksum is wrong")
        if tuple(entry["shape"]) != shape:
            saved = tuple(entry["shape"])
            raise UserError(f"{path} is {saved} in the weights, {shape} in the model; check config.json")
        return jax.tree.map(jnp.asarray, unpack_leaf(shape, entry, arrays))
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of a damaged entry
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged ({reason}); copy or download the model again") from None


