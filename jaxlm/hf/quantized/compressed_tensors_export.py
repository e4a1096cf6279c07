"""Writing a compressed model in the compressed-tensors layout, which transformers and vLLM load.

``hf.quantized.compressed_tensors`` describes the layout. Codes and scales are written unchanged. A representation that
the layout does not have is an error that names the nearest recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, QArray, is_leaf
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.quantized.compressed_tensors_scheme import Scheme
from jaxlm.hf.quantized.packing import pack_int32
from jaxlm.hf.tensor_files import LazyTensor
from jaxlm.hf.writer import ExportPlan, ParamSlice

__all__ = ["running_dtype", "to_compressed_tensors"]

_MX_GROUP = 32  # inputs of MXFP4 with one exponent
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
Tensors = dict[str, np.ndarray | LazyTensor]


def to_compressed_tensors(plan: ExportPlan, model_type: str, dtype: np.dtype) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of the file and the ``quantization_config`` of a model that ``plan`` writes as a ``model_type``.

    Dense tensors and scales get the type ``dtype``. Where nothing is quantized but weights are pruned, they are stored
    as a bit mask and the values that are not zero.

    Raises:
        UserError: the layout does not have a representation of the model's, or nothing is compressed.
    """
    schemes = {name: _scheme(slices) for name, slices in plan.slices.items()}
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if not quantized:
        return _sparse(plan, dtype)
    _check_groups(plan, quantized)
    tensors: Tensors = dict(plan.buffer_tensors(dtype))
    for name in plan.slices:
        if name in quantized:
            tensors |= _matrix(plan, name, quantized[name], dtype)
        else:
            tensors[name] = plan.dense_tensor(name, dtype)
    return tensors, _config(quantized, _linear_maps(plan, model_type))


def running_dtype(quantization: Mapping[str, Any], dtype: str) -> str:
    """The type in which transformers runs a model with this ``quantization_config``, whose dense weights are of the
    type ``dtype``: compressed-tensors 0.20 expands MXFP4 to bfloat16, and the rest must fit."""
    formats = [group["format"] for group in quantization.get("config_groups", {}).values()]
    return "bfloat16" if "mxfp4-pack-quantized" in formats else dtype


def _linear_maps(plan: ExportPlan, model_type: str) -> list[str]:
    """The names of the linear maps that transformers sees, which include the output head, tied or not."""
    names = {name for name, slices in plan.slices.items() if slices[0].path.endswith("/kernel")}
    return sorted(names | {FAMILIES[model_type].head})


def _scheme(slices: list[ParamSlice]) -> Scheme | None:
    """How a tensor of the file is quantized; None where it is dense."""
    schemes = {_slice_scheme(part) for part in slices}
    if len(schemes) > 1:
        names = ", ".join(part.path for part in slices)
        raise UserError(f"{names} are one matrix in this family and must be quantized alike, for compressed-tensors")
    return schemes.pop()


def _slice_scheme(part: ParamSlice) -> Scheme | None:
    leaf = part.leaf
    if not is_leaf(leaf):
        return None
    mxfp4 = isinstance(leaf, Codebook) and leaf.kind == "mxfp4"
    if isinstance(leaf, Codebook | LowRank) and not mxfp4:
        what = f"a table of {2**leaf.bits} values ({leaf.kind})" if isinstance(leaf, Codebook) else "low-rank factors"
        near = "w4a16-rtn-g64" if isinstance(leaf, LowRank) or leaf.bits <= 4 else "w8a16-rtn-g64"
        raise UserError(f"{part.path} is {what}, which compressed-tensors does not have; the nearest recipe is {near}")
    if not isinstance(leaf, QArray | Codebook):
        raise UserError(f"{part.path} is a {type(leaf).__name__}, which compressed-tensors does not have; merge it")
    if part.path.endswith("/table"):
        raise UserError(f"{part.path} is quantized; for compressed-tensors leave embeddings dense in the recipe")
    if "/experts/" in part.path:
        raise UserError(f"{part.path} is quantized; transformers reads experts dense only: leave them so in the recipe")
    if not part.spec.transposed:
        raise UserError(f"{part.path} is stored as a Conv1D in this family, which compressed-tensors does not quantize")
    if mxfp4:
        return Scheme(4, floats=True, group=_MX_GROUP, strategy="group")
    activations = "" if not leaf.act_bits else "dynamic" if leaf.act_scale is None else "static"
    floats = leaf.codes.dtype == _FLOAT8
    strategy = "group" if leaf.group else "channel"
    return Scheme(leaf.bits, floats, leaf.zero is None, leaf.group, 1, strategy, activations)


def _check_groups(plan: ExportPlan, quantized: Mapping[str, Scheme]) -> None:
    """Raises UserError where the inputs of a matrix are not a whole number of groups."""
    inputs = {name: plan.slices[name][0].shape[0] for name, scheme in quantized.items() if scheme.group}
    for name, n_in in inputs.items():
        group = quantized[name].group
        if n_in % group:
            common = math.gcd(*inputs.values(), group)
            power = common & -common  # the largest power of two that divides it
            near = f"-g{power}" if power >= 16 else "-channel"
            instead = f"is w4a16-rtn{near}" if quantized[name].mxfp4 else f"ends in {near} instead of -g{group}"
            raise UserError(
                f"{plan.slices[name][0].path} has {n_in} inputs, which are not whole groups of {group}, as "
                f"compressed-tensors asks for; the nearest recipe {instead}"
            )


def _matrix(plan: ExportPlan, name: str, scheme: Scheme, dtype: np.dtype) -> Tensors:
    """The tensors that store a quantized matrix."""
    module, slices = _module(name), plan.slices[name]
    n_in, n_out = slices[0].shape[0], sum(part.shape[1] for part in slices)
    groups = n_in // scheme.group if scheme.group else 1
    half = 2 ** (scheme.bits - 1)

    def lazy(shape: tuple[int, ...], dtype: Any, make: Callable[[Any], np.ndarray]) -> LazyTensor:
        dtype = np.dtype(dtype)
        return LazyTensor(shape, dtype, lambda: np.ascontiguousarray(make(plan.quantized_matrix(name))).astype(dtype))

    def packed(codes: np.ndarray) -> np.ndarray:
        return pack_int32((codes.astype(np.int16) + half).astype(np.uint8), scheme.bits)

    if scheme.mxfp4:
        return {
            f"{module}.weight_packed": lazy((n_out, n_in // 2), np.uint8, _e2m1_pairs),
            f"{module}.weight_scale": lazy((n_out, groups), np.uint8, lambda leaf: np.frexp(leaf.scale)[1] + 126),
        }
    tensors: Tensors = {f"{module}.weight_scale": lazy((n_out, groups), dtype, lambda leaf: leaf.scale)}
    if scheme.format == "pack-quantized":
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
        tensors[f"{module}.input_scale"] = LazyTensor((1,), dtype, partial(_input_scale, slices, dtype))
    return tensors


def _e2m1_pairs(leaf: Codebook) -> np.ndarray:
    """Two codes of e2m1 a byte, the first in the low bits."""
    codes = leaf.codes.astype(np.uint8)
    return codes[:, ::2] | codes[:, 1::2] << 4


def _input_scale(slices: list[ParamSlice], dtype: np.dtype) -> np.ndarray:
    scales = {float(np.asarray(part.get().act_scale).item()) for part in slices}
    if len(scales) > 1:
        names = ", ".join(part.path for part in slices)
        raise UserError(f"{names} are one matrix in this family, but their activations have different scales")
    return np.array([scales.pop()], dtype)


def _config(quantized: Mapping[str, Scheme], linear_maps: list[str]) -> dict[str, Any]:
    """``quantization_config``, with a group for each scheme. A single group is for all linear maps that are not
    ignored; several groups name their modules."""
    schemes = list(dict.fromkeys(quantized.values()))
    modules = {scheme: [_module(name) for name in quantized if quantized[name] == scheme] for scheme in schemes}
    groups = {
        f"group_{i}": {"targets": ["Linear"] if len(schemes) == 1 else modules[scheme], **scheme.to_json()}
        for i, scheme in enumerate(schemes)
    }
    formats = {scheme.format for scheme in schemes}
    # With compressed-tensors 0.18 to 0.20, transformers allocates zero points that are not packed, and then fails to
    # load packed ones. It works with "dequantize", which expands weights on loading, but then only one group may exist.
    packed_zeros = any(scheme.format == "pack-quantized" and not scheme.symmetric for scheme in schemes)
    more = {"dequantize": True} if packed_zeros and len(schemes) == 1 else {}
    return {
        **more,
        "quant_method": "compressed-tensors", "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed", "config_groups": groups, "global_compression_ratio": None,
        "ignore": [_module(name) for name in linear_maps if name not in quantized], "kv_cache_scheme": None,
    }


def _module(name: str) -> str:
    return name.removesuffix(".weight")


# Pruned models --------------------------------------------------------------------------------------------------------


def _sparse(plan: ExportPlan, dtype: np.dtype) -> tuple[Tensors, dict[str, Any]]:
    """The model with a bit mask for each matrix that it makes smaller, in the 2:4 format where all of them are 2:4."""
    masked = {}
    for name, slices in plan.slices.items():
        if slices[0].path.endswith("/kernel") and slices[0].spec.transposed:
            zero = plan.dense_tensor(name, dtype).make() == 0
            if zero.mean() > 1 / 8 / dtype.itemsize:
                masked[name] = _two_of_four(zero), 1 - zero.mean()
    if not masked:
        raise UserError("nothing in this model is quantized or pruned; compress it first, or export it as it is")
    structured = all(two_of_four for two_of_four, _ in masked.values())
    layout = "sparse-24-bitmask" if structured else "sparse-bitmask"
    tensors: Tensors = dict(plan.buffer_tensors(dtype))
    for name in plan.slices:
        dense = plan.dense_tensor(name, dtype)
        tensors |= _masked(name, dense.make(), structured) if name in masked else {name: dense}
    sizes = {name: math.prod(plan.dense_tensor(name, dtype).shape) for name in masked}
    kept = sum(sizes[name] * share for name, (_, share) in masked.items())
    kernels = [name for name, slices in plan.slices.items() if slices[0].path.endswith("/kernel")]
    return tensors, {
        "quant_method": "compressed-tensors", "sparsity_config": {
            "format": layout, "global_sparsity": 1 - kept / sum(sizes.values()),
            "sparsity_structure": "2:4" if structured else "unstructured", "targets": ["Linear"],
            "ignore": sorted({_module(name) for name in kernels if name not in masked} | {"lm_head"}),
        },
    }


def _two_of_four(zero: np.ndarray) -> bool:
    return zero.shape[1] % 4 == 0 and bool((zero.reshape(-1, 4).sum(-1) >= 2).all())


def _masked(name: str, dense: np.ndarray, structured: bool) -> Tensors:
    """The tensors that store a pruned matrix."""
    module, kept = _module(name), dense != 0
    if structured:  # exactly two of every four are stored, even if some of these are zero
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
