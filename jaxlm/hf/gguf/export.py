"""Writing a language model as a GGUF file for llama.cpp.

Quantized weights keep their codes where a type of llama.cpp can hold them. All other weights are rounded to the type
that was asked for. The embedding and the output head are Q8_0 in quantized files; norms and biases are float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlm.core.disk import replaced_file
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, merge_adapters
from jaxlm.core.tree import Params
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.gguf.architectures import ARCHITECTURES, Architecture
from jaxlm.hf.gguf.container import GgufTensor, write_gguf
from jaxlm.hf.gguf.description import description_metadata
from jaxlm.hf.gguf.ggml_types import CODE_TYPES, GGML_TYPES, encode_codes, encode_values
from jaxlm.hf.gguf.tokenizer import tokenizer_metadata
from jaxlm.hf.tensor_files import LazyTensor
from jaxlm.hf.writer import ExportPlan, plan_export, to_hf_config
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.nn.config import DecoderConfig, ModelConfig
from jaxlm.nn.positions import frequency_divisors

__all__ = ["GGUF_PREFIX", "GGUF_TYPES", "export_gguf"]

GGUF_PREFIX = "gguf-"  # a format of LM.export is this prefix and one of GGUF_TYPES
GGUF_TYPES = {"f16": 1, "q8_0": 7, "q4_0": 2, "q4_k": 14}  # -> the number in general.file_type
_SMALLER_BLOCKS = {"Q4_K": "Q5_0"}  # for rows that are not a whole number of blocks, as llama.cpp does


def export_gguf(
    path: str | Path, config: ModelConfig, params: Params, tokenizer: Tokenizer | None, kind: str, *,
    generation: GenerationConfig = PLAIN, source: str | Path | None = None,
) -> tuple[Path, Counter[str]]:
    """Writes ``path``, or ``path/model.gguf`` where it does not end in .gguf, in place of an older file.

    Args:
        path: the file or a directory.
        config, params, tokenizer: the model.
        kind: "f16", "q8_0", "q4_0" or "q4_k": the type of weights that have no codes yet. Matrices whose rows are not a
            whole number of blocks get the next type that fits: Q5_0, or F16.
        generation: says which tokens end a text, and how to sample.
        source: the directory that the model was read from, for its name and licence.

    Returns:
        The file, and the number of matrices of each type.

    Raises:
        UserError: llama.cpp has no such model or tokenizer.
    """
    if kind not in GGUF_TYPES:
        raise UserError(f"{kind!r} is not a type of GGUF; choose from {', '.join(GGUF_TYPES)}")
    params = jax.tree.map(np.asarray, merge_adapters(params))
    architecture, plan = _plan_export(config, params)
    if tokenizer is None:
        raise UserError("the model has no tokenizer, which a GGUF file contains; save it with one")
    metadata: dict[str, Any] = {
        "general.architecture": architecture.name, "general.type": "model",
        "general.file_type": GGUF_TYPES[kind], "general.quantization_version": 2,
        **description_metadata(source, generation), **architecture.metadata(config),
        **tokenizer_metadata(tokenizer, config.vocab_size, generation.eos_token_id or (config.eos_id,)),
    }
    encoder = _Encoder(config, architecture, plan, kind)
    tensors = {architecture.tensor_name(name): encoder.tensor(name) for name in plan.slices}
    if architecture.interleaved_rope and (factors := frequency_divisors(config)) is not None:
        tensors["rope_freqs.weight"] = _rounded("F32", factors.shape, lambda: factors[None])
    path = Path(path).expanduser()
    path = path if path.suffix == ".gguf" else path / "model.gguf"
    with replaced_file(path) as new:
        write_gguf(new, metadata, tensors)
    return path, Counter(tensor.type for tensor in tensors.values() if len(tensor.shape) == 2)


def _plan_export(config: ModelConfig, params: Params) -> tuple[Architecture, ExportPlan]:
    """The first architecture that can hold the model, and how the model is written as its Hugging Face family."""
    reasons = []
    for architecture in ARCHITECTURES:
        try:
            fields = to_hf_config(config, architecture.model_type)
            architecture.check(config)
            return architecture, plan_export(config, params, fields)
        except UserError as error:
            reasons.append(str(error))
    raise UserError(f"no architecture of llama.cpp can hold this model: {'; '.join(reasons)}")


@dataclass(frozen=True)
class _Encoder:
    """Encodes the tensors of a model; ``kind`` is that of ``export_gguf``."""

    config: DecoderConfig
    architecture: Architecture
    plan: ExportPlan
    kind: str

    def tensor(self, hf_name: str) -> GgufTensor:
        """The tensor that has this name in the Hugging Face family."""
        name, first = self.architecture.tensor_name(hf_name), self.plan.slices[hf_name][0]
        dense = self.plan.dense_tensor(hf_name, np.dtype(np.float32))
        inputs_first = first.path.endswith("/kernel") and not first.spec.transposed
        shape = dense.shape[::-1] if inputs_first else dense.shape
        rows = self._row_order(name, shape[0])

        def values() -> np.ndarray:
            array = dense.make()
            return (array.T if inputs_first else array)[rows]

        if len(shape) == 1:
            return _rounded("F32", shape, lambda: values()[None])
        if name.startswith("position_embd"):
            return _rounded("F32", shape, values)
        type_ = "Q8_0" if name.startswith(("token_embd", "output")) and self.kind != "f16" else self.kind.upper()
        while shape[1] % GGML_TYPES[type_].block_weights:
            type_ = _SMALLER_BLOCKS.get(type_, "F16")
        if self.kind != "f16" and (matrix := self._matrix_in_blocks(hf_name)) is not None:
            if (found := _type_for_codes(matrix)) is not None:
                return GgufTensor(found, shape, _lazy_bytes(
                    found, shape, lambda: _encode_matrix(found, self.plan.quantized_matrix(hf_name), rows)
                ))
        return _rounded(type_, shape, values)

    def _row_order(self, name: str, count: int) -> np.ndarray | slice:
        """The order of a tensor's outputs. Where llama.cpp rotates neighbouring dimensions, the two halves of each head
        of queries and keys are interleaved: (0, half, 1, half + 1, ...)."""
        if not self.architecture.interleaved_rope or name.split(".")[-2] not in ("attn_q", "attn_k"):
            return slice(None)
        heads = np.arange(count).reshape(-1, 2, self.config.d_head // 2)
        return heads.swapaxes(1, 2).reshape(-1)

    def _matrix_in_blocks(self, hf_name: str) -> QArray | None:
        """The matrix in codes, if it has integer codes of one grid whose groups are whole blocks; else None."""
        leaves = [part.leaf for part in self.plan.slices[hf_name]]
        first = leaves[0]
        if not isinstance(first, QArray) or first.codes.dtype.kind != "i":
            return None
        grids = {_grid(leaf) if isinstance(leaf, QArray) else None for leaf in leaves}
        n_in = first.codes.shape[-1]
        if len(grids) > 1 or n_in % 32 or (first.group % 32 and first.group < n_in):
            return None
        return self.plan.quantized_matrix(hf_name)


def _rounded(type_: str, shape: tuple[int, ...], values: Callable[[], np.ndarray]) -> GgufTensor:
    """A tensor of float32 values, which are rounded to the type."""
    return GgufTensor(type_, shape, _lazy_bytes(type_, shape, lambda: encode_values(type_, values())))


def _lazy_bytes(type_: str, shape: tuple[int, ...], make: Callable[[], np.ndarray]) -> LazyTensor:
    size = math.prod(shape) // GGML_TYPES[type_].block_weights * GGML_TYPES[type_].block_bytes
    return LazyTensor((size,), np.dtype(np.uint8), make)


def _grid(leaf: QArray) -> tuple[Any, ...]:
    return leaf.bits, leaf.group, leaf.zero is None, leaf.axis, leaf.codes.dtype


def _type_for_codes(matrix: QArray) -> str | None:
    """The smallest type that holds the codes minus their zero points."""
    codes = _centred_codes(matrix)
    low, high = codes.min(), codes.max()
    return next((t for t in CODE_TYPES if GGML_TYPES[t].min_code <= low and high <= GGML_TYPES[t].max_code), None)


def _centred_codes(matrix: QArray) -> np.ndarray:
    """Codes ``[out, in]`` minus their zero points."""
    codes = matrix.codes.astype(np.int16)
    if matrix.zero is None:
        return codes
    return codes - _per_block(matrix.zero, matrix.group, codes.shape[1], 1).astype(np.int16)


def _per_block(per_group: np.ndarray, group: int, n_in: int, block: int) -> np.ndarray:
    """``[out, groups]`` as ``[out, n_in / block]``."""
    starts = np.arange(0, n_in, block)
    return per_group[:, starts // group if group else np.zeros_like(starts)]


def _encode_matrix(type_: str, matrix: QArray, rows: np.ndarray | slice) -> np.ndarray:
    scale = _per_block(matrix.scale, matrix.group, matrix.codes.shape[1], 32)
    return encode_codes(type_, _centred_codes(matrix)[rows], scale[rows])
