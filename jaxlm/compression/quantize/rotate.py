"""Hadamard rotations folded into the weights: weights and activations have fewer outliers, so rounding costs less.

QuaRot (arXiv:2404.00456) and the rotations R1 and R2 of SpinQuant (arXiv:2405.16406). The model computes the same
function.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.compression.calibration import Calibration
from jaxlm.compression.residual_stream import (
    Leaves,
    bias_path,
    dense_leaves,
    input_norm,
    learned_positions,
    learned_scales,
    multiply_rows,
    replace_leaves,
    role,
)
from jaxlm.compression.steps import ModelStep, Step
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params, flatten
from jaxlm.nn.config import ModelConfig, Seq2SeqConfig

__all__ = ["Rotate", "fuse_norms", "hadamard", "rotate"]

_VALUES = re.compile(r"(encoder|decoder)/layers/\d+/(?:attn|cross)/(?:(v)/(?:kernel|bias)|o/kernel)")


def hadamard(n: int) -> np.ndarray:
    """An orthogonal float64 matrix ``[n, n]`` whose entries are ``+-1 / sqrt(n)``, where this function has a
    construction.

    It has Sylvester's doubling of 1 and of Paley's matrices, which have order q + 1 for a prime q = 3 mod 4 and 2 (q +
    1) for a prime q = 1 mod 4: n = 2^k times 1, 12, 20, 28, 36, 44, .... For other n the matrix consists of equal
    blocks along the diagonal, as large as possible.
    """
    for blocks in (each for each in range(1, n + 1) if n % each == 0):
        size, doublings = n // blocks, 0
        while (base := _paley(size >> doublings)) is None and (size >> doublings) % 2 == 0:
            doublings += 1
        if base is not None:
            for _ in range(doublings):
                base = np.block([[base, base], [base, -base]])
            return np.kron(np.eye(blocks), base) / np.sqrt(size)
    raise AssertionError("blocks of one always work")


def _paley(n: int) -> np.ndarray | None:
    """A matrix of +-1 with orthogonal rows, of order 1 or by Paley's constructions; None where they do not apply."""
    if n == 1:
        return np.ones((1, 1))
    if n % 4 == 0 and _is_prime(n - 1):
        return np.eye(n) + _conference(n - 1, -1)
    q = n // 2 - 1
    if n % 4 == 0 and q % 4 == 1 and _is_prime(q):
        plus, minus = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
        return np.kron(_conference(q, 1), plus) + np.kron(np.eye(q + 1), minus)
    return None


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


def _conference(q: int, sign: int) -> np.ndarray:
    """Quadratic residues of ``i - j``, +-1 and 0 on the diagonal, bordered by ones and ``sign`` times ones."""
    residues = np.full(q, -1)
    residues[np.arange(1, q) ** 2 % q] = 1
    residues[0] = 0
    out = np.zeros((q + 1, q + 1))
    out[0, 1:], out[1:, 0] = 1, sign
    out[1:, 1:] = residues[np.subtract.outer(np.arange(q), np.arange(q)) % q]
    return out


def fuse_norms(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The same function with the scales (and biases) of norms folded into the kernels after them, and all norms
    RMSNorm.

    - LayerNorm becomes RMSNorm: the mean is removed from what is written to the stream (SliceGPT, arXiv:2401.15024,
      section 3.1). Biases of norms become biases of kernels, which the whole model then has.
    - Tied embeddings are untied (``tie_embeddings`` of the result says so) where the scale before the head differs by
      channel, since the embedding must not be scaled by it. A scale that is one number stays in the norm.

    Raises:
        UserError: when the output of a norm is the stream itself (post, output and sandwich norms, a norm after the
            embedding), when the bias of a norm has no kernel bias to go to (experts), and when queries and keys have a
            LayerNorm.
    """
    dense_leaves(config, params, "fusing norms")
    config, params = learned_scales(config, params)
    leaves = flatten(params)
    centred = config.norm == "layernorm"
    if config.norm_position != "pre" or config.embed_norm:
        where = "after the embedding" if config.norm_position == "pre" else f"in {config.norm_position} position"
        raise UserError(
            f"norms {where} write to the residual stream and cannot be fused; only models with norm_position 'pre' "
            "can be rotated"
        )
    if centred and config.qk_norm != "none":
        raise UserError("LayerNorm of queries and keys cannot become RMSNorm; this model cannot be rotated")
    if centred and config.norm_bias and config.experts:
        raise UserError("experts have no biases that could take up those of LayerNorm; this model cannot be rotated")

    if centred:
        config, params = learned_positions(config, params)
        leaves = flatten(params)
    new, axes = dict(leaves), {}
    scale = leaves["decoder/final_norm/scale"]
    uniform = bool(jnp.all(scale == scale[0]))
    if config.tie_embeddings and not uniform:
        new["head/kernel"] = leaves["embed/table"].T
        axes["head/kernel"] = ("embed", "vocab")
        config = dataclasses.replace(config, tie_embeddings=False)
    if centred and config.norm_bias:
        config = _add_biases(config, new, axes)
        if config.tie_embeddings:
            new["logits_bias"] += multiply_rows(leaves["decoder/final_norm/bias"], leaves["embed/table"].T)
    for path, kernel in list(new.items()):
        if role(path) != "reader":
            continue
        norm = input_norm(config, path)
        if f"{norm}/bias" in leaves:
            new[bias_path(path)] += multiply_rows(leaves[f"{norm}/bias"], kernel).astype(kernel.dtype)
        factor = leaves[f"{norm}/scale"][..., :, None]
        new[path] = kernel * (factor[:, None] if kernel.ndim == 4 else factor).astype(kernel.dtype)
    for path, leaf in list(new.items()):
        if centred and role(path) in ("table", "writer"):
            new[path] = leaf - jnp.mean(leaf.astype(jnp.float32), -1, keepdims=True).astype(leaf.dtype)
        if role(path) == "norm":
            kept = config.tie_embeddings and path == "decoder/final_norm/scale"
            new[path] = leaf if kept else jnp.ones_like(leaf)
            if path.endswith("/bias"):
                del new[path]
    return dataclasses.replace(config, norm="rmsnorm"), replace_leaves(params, new, axes)


def _add_biases(config: ModelConfig, new: Leaves, axes: dict[str, tuple[str, ...]]) -> ModelConfig:
    """Adds biases of zero, in place, to kernels that read a norm and have none; returns the configuration with them."""
    for path, kernel in list(new.items()):
        match = re.fullmatch(r"(.*/layers/\d+/(?:attn/(?:q|k|v)|cross/(?:q|k|v)|mlp/(?:gate|up|down)))/kernel", path)
        if match and f"{match[1]}/bias" not in new:
            new[f"{match[1]}/bias"] = jnp.zeros((kernel.shape[0], kernel.shape[-1]), kernel.dtype)
            part = path.split("/")[-2]
            name = {"q": "heads", "k": "kv_heads", "v": "kv_heads", "down": "embed"}.get(part, "mlp")
            axes[f"{match[1]}/bias"] = ("layers", name)
    if "logits_bias" not in new:
        new["logits_bias"] = jnp.zeros(config.vocab_size, jnp.float32)
        axes["logits_bias"] = ("vocab",)
    return dataclasses.replace(config, qkv_bias=True, mlp_bias=True, logits_bias=True)


def rotate(config: ModelConfig, params: Params, key: jax.Array) -> tuple[ModelConfig, Params]:
    """The same function with its residual stream, and the values of its heads, in randomly rotated bases.

    The stream is rotated by a Hadamard matrix with random signs (R1), and so are the values within each head (R2), so
    that weights and activations lose their outliers. Norms are fused first (``fuse_norms``), which changes LayerNorm
    and tied embeddings. Sinusoidal positions become a learned table.

    Logits differ by rounding only (in float32, by less than 1e-4 for logits of order 10).

    Raises:
        UserError: as ``fuse_norms``, and when values are clipped.
    """
    config, params = fuse_norms(config, params)
    if config.clip_qkv:
        raise UserError("clip_qkv clips values, which a rotation would change; this model cannot be rotated")
    config, params = learned_positions(config, params)
    key_stream, key_heads = jax.random.split(key)
    stream = _random_hadamard(key_stream, config.width)
    sides = {"encoder": config, "decoder": config.decoder if isinstance(config, Seq2SeqConfig) else config}
    heads = {side: _random_hadamard(key_heads, part.d_head) for side, part in sides.items()}

    def rotated(path: str, leaf: jax.Array) -> jax.Array:
        new = leaf
        if match := _VALUES.fullmatch(path):
            new = _rotate_heads(new, heads[match[1]], -1 if match[2] else -2)
        if role(path) in ("table", "writer"):
            new = _dot(new, stream)
        elif role(path) == "reader":
            new = _dot(stream.T, new)
        return new.astype(leaf.dtype)

    return config, replace_leaves(params, {path: rotated(path, leaf) for path, leaf in flatten(params).items()})


def _random_hadamard(key: jax.Array, n: int) -> jax.Array:
    signs = np.asarray(jax.random.rademacher(key, (n,)), np.float64)
    return jnp.asarray(signs[:, None] * hadamard(n), jnp.float32)


def _rotate_heads(leaf: jax.Array, basis: jax.Array, axis: int) -> jax.Array:
    """The features of each head along ``axis`` times the basis."""
    moved = jnp.moveaxis(leaf, axis, -1)
    rotated = _dot(moved.reshape(*moved.shape[:-1], -1, len(basis)), basis)
    return jnp.moveaxis(rotated.reshape(moved.shape), -1, axis)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in full float32 precision on all platforms."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


@dataclass(frozen=True)
class Rotate(ModelStep):
    """Rotates the residual stream and the values of heads by random Hadamard matrices, folded into the weights, so that
    weights and activations have fewer outliers (QuaRot, arXiv:2404.00456). The model computes the same function."""

    kind: ClassVar[str] = "rotate"
    folds_scales: ClassVar[bool] = True
    seed: int = 0

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        # With tied embeddings the weights decide whether the head becomes a kernel of its own.
        return (self,) if config.tie_embeddings else ()

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration | None, notes: list[str]
    ) -> tuple[ModelConfig, Params]:
        tied = config.tie_embeddings
        config, params = rotate(config, params, jax.random.key(self.seed))
        if tied and not config.tie_embeddings:
            notes.append("rotated: the output head is no longer the embedding, because their scales by channel differ")
        return config, params
