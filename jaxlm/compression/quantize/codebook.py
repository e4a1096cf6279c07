"""Weights that share the values of a small table: k-means (Deep Compression), NF4 and MXFP4."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.compression.steps import LAYER_KERNELS, WeightStep
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, expand_groups
from jaxlm.core.tree import Leaf

__all__ = ["ShareWeights", "TableQuantize", "kmeans", "mxfp4", "nf4", "nf4_table", "round_to_table"]

Initial = Literal["linear", "quantile"]

# The value of each e2m1 code: a sign bit, two bits of exponent, one of mantissa (OCP Microscaling Formats v1.0, section
# 5.3.3).
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def nf4_table() -> np.ndarray:
    """The 16 values of NormalFloat4, ascending in [-1, 1] (QLoRA, arXiv:2305.14314, section 3 and appendix E).

    They are quantiles of the normal distribution at evenly spaced probabilities: seven below zero, zero itself, and
    eight above. The outermost probability is the mean of those of 15 and of 16 even bins.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    below = -quantile(np.linspace(outermost, 0.5, 8)[:-1])
    above = quantile(np.linspace(0.5, outermost, 9)[1:])
    return (np.concatenate([below, [0.0], above]) / above[-1]).astype(np.float32)


@jax.jit
def round_to_table(w: jax.Array, table: jax.Array) -> jax.Array:
    """uint8 codes, shaped as ``w``, of the nearest entries of ``table [..., K]``: a table a matrix, or one for all.

    The table may be in any order. A weight halfway between two entries gets the even code, which for e2m1 is the
    rounding of IEEE 754. Of equal entries the first is taken.
    """

    def of_matrix(w, table):
        order = jnp.argsort(table, stable=True)
        values = table[order]
        middle = (values[:-1] + values[1:]) / 2
        upward = order[:-1] % 2 == 1  # the entry below has an odd code: the middle itself goes to the entry above
        middle = jnp.where(upward, jnp.nextafter(middle, jnp.float32(-jnp.inf)), middle)
        # Nothing lies between equal entries: such a limit is that of the next entry that differs.
        middle = jax.lax.cummin(jnp.where(values[:-1] == values[1:], jnp.inf, middle), reverse=True)
        return order[jnp.searchsorted(middle, w)].astype(jnp.uint8)

    w, table = w.astype(jnp.float32), jnp.asarray(table, jnp.float32)
    if table.ndim == 1:
        return of_matrix(w, table)
    flat = jax.vmap(of_matrix)(w.reshape(-1, *w.shape[-2:]), table.reshape(-1, table.shape[-1]))
    return flat.reshape(w.shape)


@functools.partial(jax.jit, static_argnames="group")
def nf4(w_OxI: jax.Array, *, group: int = 64) -> tuple[jax.Array, jax.Array]:
    """NF4 codes ``[..., out, in]`` and float32 scales ``[..., out, groups]``, the largest magnitude of each group of
    inputs.

    The last group may be shorter. A group of zeros has scale 1.
    """
    w_OxI = w_OxI.astype(jnp.float32)
    largest = _largest(w_OxI, group)
    scale = jnp.where(largest > 0, largest, 1)
    return round_to_table(w_OxI / expand_groups(scale, group, w_OxI.shape[-1]), nf4_table()), scale


@jax.jit
def mxfp4(w_OxI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """MXFP4 codes ``[..., out, in]`` into ``E2M1`` and float32 scales ``[..., out, groups]``, one for 32 inputs.

    Scales are powers of two, as e8m0 holds them: ``2 ** (floor(log2(largest)) - 2)``, where 2 is the largest exponent
    of e2m1. Magnitudes beyond 6 scales become 6 (OCP Microscaling Formats v1.0, section 6.3). Zeros have scale 1.
    """
    w_OxI = w_OxI.astype(jnp.float32)
    largest = _largest(w_OxI, 32)
    exponent = jnp.frexp(jnp.where(largest > 0, largest, 4))[1] - 1
    scale = jnp.ldexp(jnp.float32(1), jnp.clip(exponent - 2, -126, 127))  # smaller ones are no normal float32
    return round_to_table(w_OxI / expand_groups(scale, 32, w_OxI.shape[-1]), E2M1), scale


def _largest(w_OxI: jax.Array, group: int) -> jax.Array:
    """The largest magnitude of every group of inputs: ``[..., out, groups]``."""
    padded = jnp.pad(jnp.abs(w_OxI), [(0, 0)] * (w_OxI.ndim - 1) + [(0, -w_OxI.shape[-1] % group)])
    return padded.reshape(*padded.shape[:-1], -1, group).max(-1)


def kmeans(
    w: jax.Array,
    bits: int,
    *,
    iterations: int = 300,
    initial: Initial = "linear",
    keep_zeros: bool = True,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """uint8 codes, shaped as ``w``, and an ascending float32 table ``[..., 2**bits]`` for each matrix ``w[..., :, :]``.

    Lloyd's algorithm until it converges, or for ``iterations`` steps (Deep Compression, arXiv:1510.00149, section 3,
    where linear initialisation keeps the rare large weights best). In one dimension a cluster is a run of the sorted
    values, so a step takes two look-ups in prefix sums for each cluster, in float64 on the host.

    Args:
        w: ``[..., rows, cols]``.
        bits: 1 to 8.
        iterations: the largest number of steps.
        initial: entries evenly spaced from the smallest value to the largest ("linear"), or at even quantiles.
        keep_zeros: where a matrix has exact zeros, one entry is and stays 0, so that zeros remain zeros.
        weights: how much the squared error of each weight counts, not negative, broadcast to ``w``: for kernels
            ``[..., in, out]`` the mean squares of the inputs ``[..., in, 1]``.
    """
    dense = np.asarray(w, np.float32)
    matrices = dense.reshape(-1, dense.shape[-2] * dense.shape[-1])
    counts = None
    if weights is not None:
        counts = np.broadcast_to(np.asarray(weights, np.float64), dense.shape).reshape(matrices.shape)
    tables = np.stack([
        _lloyd(values, None if counts is None else counts[i], 2**bits, iterations, initial, keep_zeros)
        for i, values in enumerate(matrices)
    ]).reshape(*dense.shape[:-2], -1)
    return round_to_table(jnp.asarray(w), jnp.asarray(tables)), jnp.asarray(tables)


def _lloyd(
    values: np.ndarray, counts: np.ndarray | None, k: int, iterations: int, initial: Initial, keep_zeros: bool
) -> np.ndarray:
    """The table ``[k]`` of one matrix. An entry to which no value is nearest stays where it is."""
    if counts is None:
        values, mass = np.sort(values), np.arange(len(values) + 1, dtype=np.float64)
        moment = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    else:
        order = np.argsort(values)
        values, counts = values[order], counts[order]
        mass = np.concatenate([[0.0], np.cumsum(counts)])
        moment = np.concatenate([[0.0], np.cumsum(counts * values)])
    if initial == "linear":
        table = np.linspace(values[0], values[-1], k)
    else:
        table = _quantiles(values, k)
    zero = None
    if keep_zeros and (zeros := values == 0).any():
        if initial == "quantile" and not zeros.all():  # quantiles of the others: zeros may be most of the matrix
            table = np.sort(np.append(_quantiles(values[~zeros], k - 1), 0.0))
        zero = np.argmin(np.abs(table))
        table[zero] = 0.0
    for _ in range(iterations):
        ends = np.searchsorted(values, ((table[:-1] + table[1:]) / 2).astype(np.float32), "right")
        ends = np.concatenate([[0], ends, [len(values)]])
        inside = np.diff(mass[ends])
        new = np.where(inside > 0, np.diff(moment[ends]) / np.where(inside > 0, inside, 1), table)
        if zero is not None:
            new[zero] = 0.0
        if np.array_equal(new, table):
            break
        table = new
    return table.astype(np.float32)


def _quantiles(values: np.ndarray, k: int) -> np.ndarray:
    return np.quantile(values.astype(np.float64), (np.arange(k) + 0.5) / k)


@dataclass(frozen=True)
class TableQuantize(WeightStep):
    """Rounds weights to the 16 values of a 4-bit format, with a scale for each group of inputs: "nf4" (QLoRA,
    arXiv:2305.14314, section 3), or "mxfp4" (OCP Microscaling Formats v1.0), whose groups have 32 inputs."""

    kind: ClassVar[str] = "table"
    format: Literal["nf4", "mxfp4"]
    group: int = 64
    target: str = LAYER_KERNELS

    def __post_init__(self):
        if self.format not in ("nf4", "mxfp4") or self.group < 1 or (self.format == "mxfp4" and self.group != 32):
            raise UserError(f"{self.format} in groups of {self.group} is not known; use nf4, or mxfp4 in groups of 32")

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        w_OxI = dense.swapaxes(-1, -2) if axis == -2 else dense
        group = min(self.group, w_OxI.shape[-1])
        codes, scale = nf4(w_OxI, group=group) if self.format == "nf4" else mxfp4(w_OxI)
        table = jnp.asarray(nf4_table() if self.format == "nf4" else E2M1, jnp.float32)
        table = jnp.broadcast_to(table, (*w_OxI.shape[:-2], len(table)))
        return Codebook(codes, table, scale, 4, group, self.format, axis)


@dataclass(frozen=True)
class ShareWeights(WeightStep):
    """Makes the weights of a matrix share ``2**bits`` values, found by k-means; zeros stay zeros (Deep Compression,
    arXiv:1510.00149, section 3). It does not run inside ``jit``."""

    kind: ClassVar[str] = "share"
    bits: int
    target: str = LAYER_KERNELS

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise UserError(f"a codebook of {self.bits} bits is impossible; use 1 to 8")

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        if isinstance(dense, jax.core.Tracer):
            raise TypeError("k-means runs on the host: share weights outside of jit")
        codes, table = kmeans(dense.swapaxes(-1, -2) if axis == -2 else dense, self.bits)
        return Codebook(codes, table, None, self.bits, 0, "shared", axis)
