"""Writing a compressed model in the compressed-tensors layout, which transformers and vLLM load.

See ``hf.quantized.compressed_tensors`` for the layout. Codes and scales are written as they are, so what is loaded is the
same model; a representation that the layout does not have is refused, with the nearest that it has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, QArray, is_leaf
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.quantized.compressed_tensors import Scheme
from jaxlm.hf.quantized.matrices import pack_words
from jaxlm.hf.tensor_files import Lazy
from jaxlm.hf.writer import Part, Plan, joined

__all__ = ["compressed_tensors"]

_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
Tensors = dict[str, np.ndarray | Lazy]


def compressed_tensors(plan: Plan, kind: str, dtype: np.dtype) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of the file and the ``quantization_config`` of a model that is written by ``plan`` as a ``kind``.

    What is dense, and scales, are of the type ``dtype``. Where nothing is quantized but weights are pruned, they are
    stored as a bit mask and the values that are not zero.

    UserError where the layout does not have a representation of the model's, or nothing is compressed.
    """
    schemes = {name: _scheme(found) for name, found in plan.parts.items()}
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if not quantized:
        return _sparse(plan, dtype)
    _check_groups(plan, quantized)
    tensors: Tensors = {}
    for name in plan.parts:
        if name in quantized:
            tensors |= _matrix(plan, name, quantized[name], dtype)
        else:
            tensors[name] = plan.lazy(name, dtype)
    return tensors, _config(quantized, _linears(plan, kind))


def _linears(plan: Plan, kind: str) -> list[str]:
    """The linear maps that transformers sees, the output head included, tied or not."""
    names = {name for name, found in plan.parts.items() if found[0].path.endswith("/kernel")}
    return sorted(names | {FAMILIES[kind].head})


def _scheme(found: list[Part]) -> Scheme | None:
    """How a tensor of the file is quantized; None where it is dense. UserError where the layout has no such thing."""
    schemes = {_part_scheme(part) for part in found}
    if len(schemes) > 1:
        names = ", ".join(part.path for part in found)
        raise UserError(f"{names} are one matrix in this family and must be quantized alike, for compressed-tensors")
    return schemes.pop()


def _part_scheme(part: Part) -> Scheme | None:
    leaf = part.leaf
    if not is_leaf(leaf):
        return None
    if isinstance(leaf, Codebook | LowRank):
        what = f"a table of {2**leaf.bits} values ({leaf.kind})" if isinstance(leaf, Codebook) else "low-rank factors"
        near = "w4a16-rtn-g64" if isinstance(leaf, LowRank) or leaf.bits <= 4 else "w8a16-rtn-g64"
        raise UserError(f"{part.path} is {what}, which compressed-tensors does not have; the nearest recipe is {near}")
    if not isinstance(leaf, QArray):
        raise UserError(f"{part.path} is a {type(leaf).__name__}, which compressed-tensors does not have; merge it")
    if part.path.endswith("/table"):
        raise UserError(f"{part.path} is quantized; for compressed-tensors leave embeddings dense in the recipe")
    if "/experts/" in part.path:
        raise UserError(f"{part.path} is quantized; transformers reads experts dense only: leave them so in the recipe")
    if not part.tensor.transposed:
        raise UserError(f"{part.path} is stored as a Conv1D in this family, which compressed-tensors does not quantize")
    activations = "" if not leaf.act_bits else "dynamic" if leaf.act_scale is None else "static"
    floats = leaf.codes.dtype == _FLOAT8
    strategy = "group" if leaf.group else "channel"
    return Scheme(leaf.bits, floats, leaf.zero is None, leaf.group, 1, strategy, activations)


def _check_groups(plan: Plan, quantized: Mapping[str, Scheme]) -> None:
    """UserError where the inputs of a matrix are no whole number of groups."""
    inputs = {name: plan.parts[name][0].shape[0] for name, scheme in quantized.items() if scheme.group}
    for name, n_in in inputs.items():
        group = quantized[name].group
        if n_in % group:
            common = math.gcd(*inputs.values(), group)
            power = common & -common  # the largest power of two that divides it
            near = f"-g{power}" if power >= 16 else "-channel"
            raise UserError(
                f"{plan.parts[name][0].path} has {n_in} inputs, which are not whole groups of {group}, as "
                f"compressed-tensors asks for; the nearest recipe ends in {near} instead of -g{group}"
            )


def _matrix(plan: Plan, name: str, scheme: Scheme, dtype: np.dtype) -> Tensors:
    """The tensors that a quantized matrix is stored as."""
    module, parts = name.removesuffix(".weight"), plan.parts[name]
    n_in, n_out = parts[0].shape[0], sum(part.shape[1] for part in parts)
    groups = n_in // scheme.group if scheme.group else 1
    half = 2 ** (scheme.bits - 1)

    def lazy(shape: tuple[int, ...], dtype: Any, make) -> Lazy:
        return Lazy(shape, np.dtype(dtype), lambda: np.ascontiguousarray(make(joined(plan, name))).astype(dtype))

    def packed(codes: np.ndarray) -> np.ndarray:
        return pack_words((codes.astype(np.int16) + half).astype(np.uint8), scheme.bits)

    tensors: Tensors = {f"{module}.weight_scale": lazy((n_out, groups), dtype, lambda leaf: leaf.scale)}
    if scheme.layout == "pack-quantized":
        tensors[f"{module}.weight_packed"] = lazy(
            (n_out, -(-n_in * scheme.bits // 32)), np.int32, lambda leaf: packed(leaf.codes)
        )
        tensors[f"{module}.weight_shape"] = np.array([n_out, n_in], np.int64)
        if not scheme.symmetric:
            tensors[f"{module}.weight_zero_point"] = lazy(
                (-(-n_out * scheme.bits // 32), groups), np.int32, lambda leaf: packed(leaf.zero.T).T
            )
        return tensors
    codes = _FLOAT8 if scheme.floats else np.int8
    tensors[f"{module}.weight"] = lazy((n_out, n_in), codes, lambda leaf: leaf.codes)
    if not scheme.symmetric:
        tensors[f"{module}.weight_zero_point"] = lazy((n_out, groups), np.int8, lambda leaf: leaf.zero)
    if scheme.activations == "static":
        tensors[f"{module}.input_scale"] = Lazy((1,), dtype, partial(_input_scale, parts, dtype))
    return tensors


def _input_scale(parts: list[Part], dtype: np.dtype) -> np.ndarray:
    scales = {float(np.asarray(part.get().act_scale).item()) for part in parts}
    if len(scales) > 1:
        raise UserError(f"{parts[0].path} and what is stored with it round their activations by different scales")
    return np.array([scales.pop()], dtype)


def _config(quantized: Mapping[str, Scheme], linears: list[str]) -> dict[str, Any]:
    """``quantization_config``: one group a scheme. A single one is for all linear maps but those that are ignored;
    several name their modules."""
    schemes = list(dict.fromkeys(quantized.values()))
    modules = {scheme: [_module(name) for name in quantized if quantized[name] == scheme] for scheme in schemes}
    groups = {
        f"group_{i}": {"targets": ["Linear"] if len(schemes) == 1 else modules[scheme], **scheme.to_json()}
        for i, scheme in enumerate(schemes)
    }
    layouts = {scheme.layout for scheme in schemes}
    # transformers lays out its modules without packing their zero points (compressed-tensors 0.18 to 0.20), and then
    # fails on them, unless it is told to expand the weights while it loads; but then it knows of one group only.
    packed_zeros = any(scheme.layout == "pack-quantized" and not scheme.symmetric for scheme in schemes)
    more = {"dequantize": True} if packed_zeros and len(schemes) == 1 else {}
    return {
        **more,
        "quant_method": "compressed-tensors", "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed", "config_groups": groups, "global_compression_ratio": None,
        "ignore": [_module(name) for name in linears if name not in quantized], "kv_cache_scheme": None,
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")


# Pruned models --------------------------------------------------------------------------------------------------------


def _sparse(plan: Plan, dtype: np.dtype) -> tuple[Tensors, dict[str, Any]]:
    """The model with masks for the matrices that they make smaller; 2:4 ones where all of them are."""
    masked = {}
    for name, found in plan.parts.items():
        if found[0].path.endswith("/kernel") and found[0].tensor.transposed:
            zero = plan.lazy(name, dtype).make() == 0
            if zero.mean() > 1 / 8 / dtype.itemsize:
                masked[name] = _two_of_four(zero), 1 - zero.mean()
    if not masked:
        raise UserError("nothing in this model is quantized or pruned; compress it first, or export it as it is")
    structured = all(two_of_four for two_of_four, _ in masked.values())
    layout = "sparse-24-bitmask" if structured else "sparse-bitmask"
    tensors: Tensors = {}
    for name in plan.parts:
        tensors |= _masked(plan, name, structured, dtype) if name in masked else {name: plan.lazy(name, dtype)}
    kept = {name: math.prod(plan.lazy(name, dtype).shape) * share for name, (_, share) in masked.items()}
    total = sum(math.prod(plan.lazy(name, dtype).shape) for name in masked)
    kernels = [name for name, found in plan.parts.items() if found[0].path.endswith("/kernel")]
    return tensors, {
        "quant_method": "compressed-tensors", "sparsity_config": {
            "format": layout, "global_sparsity": 1 - sum(kept.values()) / total,
            "sparsity_structure": "2:4" if structured else "unstructured", "targets": ["Linear"],
            "ignore": sorted({_module(name) for name in kernels if name not in masked} | {"lm_head"}),
        },
    }


def _two_of_four(zero: np.ndarray) -> bool:
    return zero.shape[1] % 4 == 0 and bool((zero.reshape(-1, 4).sum(-1) >= 2).all())


def _masked(plan: Plan, name: str, structured: bool, dtype: np.dtype) -> Tensors:
    module, dense = _module(name), plan.lazy(name, dtype).make()
    kept = dense != 0
    if structured:  # two of every four, some of them zeros
        fours = np.argsort(~kept.reshape(-1, 4), axis=-1, kind="stable")[:, :2]
        kept = np.zeros((len(fours), 4), bool)
        np.put_along_axis(kept, fours, True, axis=-1)
        kept = kept.reshape(dense.shape)
    mask = np.packbits(kept, axis=1, bitorder="little")
    values, shape = dense[kept], np.array(dense.shape, np.int64)
    if structured:
        values = values.reshape(len(dense), -1)
        return {f"{module}.compressed": values, f"{module}.bitmask": mask, f"{module}.shape": shape[:, None]}
    offsets = np.cumsum(kept.sum(1)) - kept.sum(1)
    return {
        f"{module}.compressed": values, f"{module}.bitmask": mask, f"{module}.shape": shape,
        f"{module}.row_offsets": offsets.astype(np.int64),
    }
