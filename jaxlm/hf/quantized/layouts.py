"""Opening the weights of a Hugging Face directory, quantized ones included: by what made them, a layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.hf.quantized.compressed_tensors import find_compressed
from jaxlm.hf.quantized.gptq_awq import find_awq, find_gptq
from jaxlm.hf.quantized.matrices import Matrix, MatrixFiles
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["open_weights"]

_METHODS = ("compressed-tensors", "gptq", "awq")


def open_weights(directory: Path, quantization: Any) -> tuple[MatrixFiles, list[str]]:
    """The weights of a directory whose config.json has this quantization_config (None: dense), and notes on them.

    UserError where the layout is not known, or its tensors do not fit each other.
    """
    files = TensorFiles(directory)
    if quantization is None:
        return MatrixFiles(files, {}), []
    try:
        matrices, notes = _find(files, quantization)
        kept = Counter(matrix.note for matrix in matrices.values() if matrix.note)
        notes += [f"{count} quantized matrices are read as dense: {reason}" for reason, count in kept.items()]
        return MatrixFiles(files, matrices), notes
    except UserError as error:
        if str(directory) in str(error):
            raise
        raise UserError(f"{directory / 'config.json'}: quantization_config: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of a damaged configuration
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{directory / 'config.json'}: quantization_config makes no sense ({reason})") from None


def _find(files: TensorFiles, quantization: Any) -> tuple[dict[str, Matrix], list[str]]:
    if not isinstance(quantization, Mapping):
        raise UserError(f"it is {quantization!r}, not an object with named fields")
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return find_compressed(files, quantization)
    if method == "gptq":
        return find_gptq(files, quantization), []
    if method == "awq":
        return find_awq(files, quantization), []
    raise UserError(f"quant_method = {method!r} is not supported; only {', '.join(_METHODS)}")
