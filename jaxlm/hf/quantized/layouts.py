"""Opening the weights of a Hugging Face directory, dense or in one of the quantized layouts.

To add a layout, write a file that finds its matrices and give it a line in ``LAYOUTS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.hf.quantized.awq import awq_matrices
from jaxlm.hf.quantized.compressed_tensors import compressed_tensors_matrices
from jaxlm.hf.quantized.gptq import gptq_matrices
from jaxlm.hf.quantized.matrix import QuantizedMatrix, QuantizedTensorFiles
from jaxlm.hf.tensor_files import TensorFiles

__all__ = ["LAYOUTS", "open_weights"]

Matrices = dict[str, QuantizedMatrix]  # by the names that they have in the dense model

# quant_method of quantization_config -> what finds the quantized matrices in files with that configuration.
LAYOUTS: dict[str, Callable[[TensorFiles, Mapping[str, Any]], Matrices]] = {
    "compressed-tensors": compressed_tensors_matrices,
    "gptq": gptq_matrices,
    "awq": awq_matrices,
}


def open_weights(directory: Path, quantization: Any) -> tuple[QuantizedTensorFiles, list[str]]:
    """Opens the weights of a directory.

    Args:
        directory: has the weights.
        quantization: the quantization_config of its config.json; None where it has none and the weights are dense.

    Returns:
        The files, and notes on what is read in another way than it is stored.

    Raises:
        UserError: the layout is not supported, or its tensors do not fit each other.
    """
    files = TensorFiles(directory)
    if quantization is None:
        return QuantizedTensorFiles(files, {}), []
    try:
        matrices = _find_matrices(files, quantization)
        notes = ["kv_cache_scheme: keys and values are not quantized"] if quantization.get("kv_cache_scheme") else []
        reasons = Counter(matrix.dense_reason for matrix in matrices.values() if matrix.dense_reason)
        notes += [f"{count} quantized matrices are read as dense: {reason}" for reason, count in reasons.items()]
        said = Counter(matrix.note for matrix in matrices.values() if matrix.note)
        notes += [f"{count} quantized matrices: {note}" for note, count in said.items()]
        return QuantizedTensorFiles(files, matrices), notes
    except UserError as error:
        if str(directory) in str(error):
            raise
        raise UserError(f"{directory / 'config.json'}: quantization_config: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # of a damaged configuration
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{directory / 'config.json'}: quantization_config makes no sense ({reason})") from None


def _find_matrices(files: TensorFiles, quantization: Any) -> Matrices:
    if not isinstance(quantization, Mapping):
        raise UserError(f"it is {quantization!r}, not an object with named fields")
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in LAYOUTS:
        raise UserError(f"quant_method = {method!r} is not supported; only {', '.join(LAYOUTS)}")
    return LAYOUTS[method](files, quantization)
