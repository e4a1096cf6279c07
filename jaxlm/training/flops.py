"""The FLOPs of a training step and the peak FLOP/s of a device: the two halves of MFU."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import numpy as np

from jaxlm.core.hardware import chip_of
from jaxlm.core.leaves import LoRA
from jaxlm.nn.config import LSTMConfig, ModelConfig, Seq2SeqConfig, StackConfig

__all__ = ["FLOP_CONVENTION", "peak_flops", "rows_and_length", "step_flops"]

FLOP_CONVENTION = (
    "6 x matrix parameters x positions (embedding look-ups excluded, the output head included, tied or not; of experts "
    "only those that a token goes to) + "
    "12 x layers x heads x head_dim x keys that a query may see (causal masks not discounted, padding counted, "
    "recomputation not counted; 4 in place of 6 for frozen matrices under adapters) (arXiv:2204.02311, appendix B); "
    "peak: dense bfloat16"
)

def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a known accelerator; None on a CPU or an unknown device."""
    chip = chip_of(device.device_kind)
    return chip.flops if chip else None


def step_flops(config: ModelConfig, params: Mapping[str, jax.Array], shapes: Mapping[str, tuple[int, ...]]) -> float:
    """FLOPs of one forward and backward pass over a batch of the given shapes, by ``FLOP_CONVENTION``.

    ``params`` are the flat parameters (shapes are enough); ``shapes`` maps "inputs", and "src" for translation, to
    [B, T]. Frozen matrices have no gradient: under adapters they count 4 in place of 6.
    """
    rows, length = rows_and_length(shapes)
    source = shapes["src"][1] if "src" in shapes else 0

    def positions(path: str) -> int:
        """The number of vectors of each row that a parameter multiplies."""
        if path == "embed/table":
            return length if config.tie_embeddings else 0
        if not path.endswith("/kernel"):
            return 0
        on_source = path.startswith("encoder/") or path.endswith(("cross/k/kernel", "cross/v/kernel"))
        return source if on_source else length

    def used(path: str) -> float:
        """The number of weights that each of those vectors is multiplied by: of experts, those that a token goes to."""
        expert = np.ndim(params[path]) == 4 and "/mlp/" in path
        return math.prod(np.shape(params[path])) * (config.experts_per_token / config.experts if expert else 1)

    adapters = {path: leaf for path, leaf in params.items() if isinstance(leaf, LoRA)}
    linear = (4 if adapters else 6) * sum(used(path) * positions(path) for path in params)
    linear += 6 * sum((leaf.a.size + leaf.b.size) * positions(path) for path, leaf in adapters.items())
    return float(rows * (linear + 12 * _attended(config, length, source)))


def rows_and_length(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """(rows, length) of a batch with these shapes; a pair of preferences counts as two rows."""
    if "inputs" in shapes:
        return shapes["inputs"]
    rows, length = shapes["chosen_inputs"]
    return 2 * rows, length


def _attended(config: ModelConfig, length: int, source: int) -> int:
    """Sum over layers of queries x keys x features of all heads, for one row."""
    if isinstance(config, LSTMConfig):
        return 0
    if isinstance(config, Seq2SeqConfig):
        encoder, decoder = config.encoder, config.decoder
        in_encoder = encoder.heads * encoder.d_head * _self_attended(config, config.encoder_layers, source)
        in_decoder = _self_attended(config, config.decoder_layers, length) + config.decoder_layers * length * source
        return in_encoder + decoder.heads * decoder.d_head * in_decoder
    return config.heads * config.d_head * _self_attended(config, config.layers, length)


def _self_attended(config: StackConfig, layers: int, length: int) -> int:
    windows = config.windows or (0,)
    each = (windows[layer % len(windows)] or length for layer in range(layers))
    return sum(length * min(window, length) for window in each)
