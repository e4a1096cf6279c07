"""Writing a language model as a GGUF file for llama.cpp.

Weights that are already on a grid which a type of llama.cpp holds keep their codes; others are rounded to the type
asked for. Embeddings and output head are Q8_0 where the blocks are quantized, and norms and biases float32.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core.disk import room_for
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, merge_adapters
from jaxlm.core.tree import Params
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.gguf.container import BLOCKS, TYPES, encode_codes, encode_values, write_gguf
from jaxlm.hf.gguf.tokenizer import tokenizer_metadata
from jaxlm.hf.tensor_files import Lazy
from jaxlm.hf.writer import Plan, hf_config, joined, plan
from jaxlm.nn.config import DecoderConfig, ModelConfig
from jaxlm.nn.positions import slowing

__all__ = ["GGUF", "GGUF_TYPES", "export_gguf"]

GGUF = "gguf-"  # before a type, the name of a format
GGUF_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2, "q4_k": 14}  # -> what general.file_type calls it
_NARROWER = {"Q4_K": "Q5_0"}  # for rows that are no whole number of blocks, as llama.cpp does


@dataclass(frozen=True)
class _Architecture:
    """How llama.cpp names the tensors of a family, layers apart, and whether it rotates neighbouring dimensions."""

    name: str
    kind: str  # of the family
    layer: str
    outer: dict[str, str]
    inner: dict[str, str]
    neighbours: bool = False


_LLAMA = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"}, "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = (
    _Architecture("llama", "llama", "model.layers.", _OUTER, _LLAMA, neighbours=True),
    _Architecture(
        "qwen3", "qwen3", "model.layers.", _OUTER,
        _LLAMA | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    ),
    _Architecture(
        "gpt2", "gpt2", "transformer.h.",
        {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
         "lm_head": "output"},
        {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
         "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    ),
)


def export_gguf(
    path: str | Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None, kind: str
) -> tuple[Path, Counter[str]]:
    """Writes ``path``, or ``path/model.gguf`` where it does not end in .gguf, in place of an older file.

    Args:
        kind: "f16", "q8_0", "q4_0" or "q4_k": what weights that are not in codes yet become. Matrices whose rows are
            no whole number of blocks get the next type that fits: Q5_0, or F16.

    Returns:
        The file, and how many matrices are of each type.

    Raises:
        UserError: llama.cpp has no such model or tokenizer.
    """
    if kind not in GGUF_TYPES:
        raise UserError(f"{kind!r} is not a type of GGUF; choose from {', '.join(GGUF_TYPES)}")
    params = jax.tree.map(np.asarray, merge_adapters(params))
    architecture, how = _express(config, params)
    metadata = _metadata(config, architecture, how, kind)
    if tokenizer is None:
        raise UserError("the model has no tokenizer, which a GGUF file has inside; save it with one")
    metadata |= tokenizer_metadata(tokenizer, config.vocab_size)
    tensors: dict[str, tuple[str, tuple[int, ...], Lazy]] = {}
    for name in how.parts:
        theirs = _name(architecture, name)
        tensors[theirs] = _tensor(config, architecture, how, name, theirs, kind)
    if architecture.neighbours and (factors := slowing(config)) is not None:
        tensors["rope_freqs.weight"] = "F32", factors.shape, _lazy("F32", factors.shape, lambda: factors[None])
    path = Path(path).expanduser()
    path = path if path.suffix == ".gguf" else path / "model.gguf"
    _replace(path, lambda partial: write_gguf(partial, metadata, tensors))
    return path, Counter(kind for kind, shape, _ in tensors.values() if len(shape) == 2)


def _express(config: ModelConfig, params: Params) -> tuple[_Architecture, Plan]:
    """The first of the architectures that the model is one of. UserError if there is none."""
    reasons = []
    for architecture in _ARCHITECTURES:
        try:
            fields = hf_config(config, architecture.kind)
            _check(config, architecture)
            return architecture, plan(config, params, fields)
        except UserError as error:
            reasons.append(str(error))
    raise UserError(f"llama.cpp is not written for such a model: {'; '.join(reasons)}")


def _check(config: DecoderConfig, architecture: _Architecture) -> None:
    """UserError on what Hugging Face's models of that family can be and llama.cpp's cannot."""
    activation = "gelu_tanh" if architecture.name == "gpt2" else "swiglu"
    if config.activation != activation:
        raise UserError(f"llama.cpp's {architecture.name} has the activation {activation!r}, not {config.activation!r}")
    if any(config.windows):
        raise UserError(f"llama.cpp's {architecture.name} has no windows")
    if config.attention_scale and not math.isclose(config.attention_scale, config.d_head**-0.5, rel_tol=1e-6):
        raise UserError(f"attention_scale is {config.attention_scale}, which llama.cpp's {architecture.name} has not")
    if config.attention_scale_by_layer:
        raise UserError(f"attention_scale_by_layer is something that llama.cpp's {architecture.name} has not")
    scaling = config.rope_scaling
    fixed = scaling.method in (("none", "linear", "llama3", "yarn") if architecture.neighbours else ("none",))
    if config.positions == "rotary" and (not fixed or scaling.attention_factor != 1.0):
        raise UserError(f"rope_scaling of the type {scaling.method} is not written for llama.cpp's {architecture.name}")


def _metadata(config: DecoderConfig, architecture: _Architecture, how: Plan, kind: str) -> dict[str, Any]:
    prefix = architecture.name
    out: dict[str, Any] = {
        "general.architecture": prefix, "general.type": "model", "general.name": "jaxlm",
        "general.file_type": GGUF_TYPES[kind], "general.quantization_version": 2,
        f"{prefix}.context_length": config.max_positions, f"{prefix}.embedding_length": config.width,
        f"{prefix}.block_count": config.layers, f"{prefix}.feed_forward_length": config.d_ffn,
        f"{prefix}.attention.head_count": config.heads, f"{prefix}.vocab_size": config.vocab_size,
    }
    if architecture.name == "gpt2":
        return out | {f"{prefix}.attention.layer_norm_epsilon": float(config.norm_eps)}
    return out | {
        f"{prefix}.attention.head_count_kv": config.n_kv_heads, f"{prefix}.attention.key_length": config.d_head,
        f"{prefix}.attention.value_length": config.d_head, f"{prefix}.rope.dimension_count": config.d_head,
        f"{prefix}.rope.freq_base": float(config.rope_theta),
        f"{prefix}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }


def _name(architecture: _Architecture, name: str) -> str:
    module, part = name.rsplit(".", 1)
    if module in architecture.outer:
        return f"{architecture.outer[module]}.{part}"
    layer, module = module.removeprefix(architecture.layer).split(".", 1)
    return f"blk.{layer}.{architecture.inner[module]}.{part}"


def _tensor(
    config: DecoderConfig, architecture: _Architecture, how: Plan, name: str, theirs: str, kind: str
) -> tuple[str, tuple[int, ...], Lazy]:
    """The type, the shape with outputs first, and the bytes of a tensor."""
    parts = how.parts[name]
    conv = parts[0].path.endswith("/kernel") and not parts[0].tensor.transposed
    shape = how.lazy(name, np.dtype(np.float32)).shape
    shape = shape[::-1] if conv else shape
    rows = _rows(config, architecture, theirs, shape[0])

    def values() -> np.ndarray:
        array = how.lazy(name, np.dtype(np.float32)).make()
        return (array.T if conv else array)[rows]

    if len(shape) == 1:
        return "F32", shape, _lazy("F32", shape, lambda: values()[None])
    if theirs.startswith("position_embd"):
        return "F32", shape, _lazy("F32", shape, values)
    outer = theirs.startswith(("token_embd", "output"))
    wanted = "Q8_0" if outer and kind != "f16" else kind.upper()
    while shape[1] % TYPES[wanted].weights:
        wanted = _NARROWER.get(wanted, "F16")
    if kind != "f16" and (leaf := _on_grid(how, name)) is not None and (held := _holder(leaf)) is not None:
        return held, shape, _lazy(held, shape, lambda: _carried(held, joined(how, name), rows), encoded=True)
    return wanted, shape, _lazy(wanted, shape, values)


def _rows(config: DecoderConfig, architecture: _Architecture, theirs: str, count: int) -> np.ndarray | slice:
    """The order of a tensor's outputs: where llama.cpp rotates neighbouring dimensions, (0, half, 1, half + 1, ...) of
    each head's."""
    if not architecture.neighbours or theirs.split(".")[-2] not in ("attn_q", "attn_k"):
        return slice(None)
    heads = np.arange(count).reshape(-1, 2, config.d_head // 2)
    return heads.swapaxes(1, 2).reshape(-1)


def _lazy(kind: str, shape: tuple[int, ...], make: Callable[[], np.ndarray], encoded: bool = False) -> Lazy:
    size = math.prod(shape) // TYPES[kind].weights * TYPES[kind].bytes
    return Lazy((size,), np.dtype(np.uint8), make if encoded else lambda: encode_values(kind, make()))


def _on_grid(how: Plan, name: str) -> QArray | None:
    """The matrix in codes, if it is in integer ones of one grid whose groups are whole blocks."""
    leaves = [part.leaf for part in how.parts[name]]
    first = leaves[0]
    if not isinstance(first, QArray) or first.codes.dtype.kind != "i":
        return None
    grids = {_grid(leaf) if isinstance(leaf, QArray) else None for leaf in leaves}
    n_in = first.codes.shape[-1]
    if len(grids) > 1 or n_in % 32 or (first.group % 32 and first.group < n_in):
        return None
    return joined(how, name)


def _grid(leaf: QArray) -> tuple[Any, ...]:
    return leaf.bits, leaf.group, leaf.zero is None, leaf.axis, leaf.codes.dtype


def _holder(leaf: QArray) -> str | None:
    """The smallest type that holds the codes minus their zeros."""
    centred = _centred(leaf)
    low, high = centred.min(), centred.max()
    return next((kind for kind in BLOCKS if TYPES[kind].low <= low and high <= TYPES[kind].high), None)


def _centred(leaf: QArray) -> np.ndarray:
    codes = leaf.codes.astype(np.int16)
    return codes if leaf.zero is None else codes - _per(leaf.zero, leaf.group, codes.shape[1], 1).astype(np.int16)


def _per(per_group: np.ndarray, group: int, n_in: int, block: int) -> np.ndarray:
    """``[out, groups]`` as ``[out, n_in / block]``."""
    starts = np.arange(0, n_in, block)
    return per_group[:, starts // group if group else np.zeros_like(starts)]


def _carried(kind: str, leaf: QArray, rows: np.ndarray | slice) -> np.ndarray:
    scale = _per(leaf.scale, leaf.group, leaf.codes.shape[1], 32)
    return encode_codes(kind, _centred(leaf)[rows], scale[rows])


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """All of a file or nothing."""
    if path.is_dir():
        raise UserError(f"{path} is a directory; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        with room_for(str(path)):
            write(Path(name))
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
