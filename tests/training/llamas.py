"""A tiny Llama in transformers' format, for tests of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxlm import nn
from jaxlm.core.tree import unflatten
from jaxlm.hf.directory import write_model

CONFIG = nn.DecoderConfig(
    vocab_size=32, width=16, heads=2, kv_heads=1, ffn=32, layers=2, tie_embeddings=False, max_positions=64
)


def tiny_llama(path: Path, seed: int = 0, config: nn.DecoderConfig = CONFIG) -> Path:
    """Writes a model directory; its weights are large enough that no gradient is negligible."""
    import jax

    from jaxlm.core.tree import flatten

    random, like = np.random.default_rng(seed), nn.abstract(config)[1]
    leaves = {name: (random.standard_normal(leaf.shape) * (0.5 if "norm" not in name else 0.1)
                     + ("norm" in name)).astype(np.float32) for name, leaf in flatten(like).items()}
    return write_model(path, config, unflatten(like, jax.tree.map(jax.numpy.asarray, leaves)), None)


def batch(rows: int = 4, length: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens; a third of the targets have weight 0."""
    random = np.random.default_rng(seed)
    tokens = random.integers(3, CONFIG.vocab_size, (rows, length + 1)).astype(np.int32)
    weights = (random.random((rows, length)) < 0.67).astype(np.float32)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
