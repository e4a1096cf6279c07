"""Adam with moments of one byte each (arXiv:2110.02861): a quarter of the memory of float32 moments.

A moment is kept as codes into a table of 256 values, which lie denser towards zero (dynamic tree quantization,
arXiv:1511.04561), and one scale, its largest magnitude, for each block of 256 numbers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxlm.core.leaves import expand_groups

__all__ = ["BLOCK", "Adam8bitState", "BlockQuantized", "dynamic_table", "scale_by_adam8bit"]

BLOCK = 256
_SMALLEST = 4096  # elements of the smallest parameter whose moments are quantized


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockQuantized:
    """An array as ``table[codes] * scale``, sharded like the float array that it represents.

    ``codes`` is uint8 and has the array's shape; ``scale`` is float32, with one entry of its last dimension for each
    block of ``BLOCK`` numbers.
    """

    codes: Array
    scale: Array
    signed: bool = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(x: Array, signed: bool) -> BlockQuantized:
        """The nearest representation of a float array; each block keeps its largest magnitude exactly."""
        table = dynamic_table(signed)
        *lead, size = x.shape
        blocks = -(-size // BLOCK)
        padded = jnp.pad(x, [*[(0, 0)] * len(lead), (0, blocks * BLOCK - size)]).reshape(*lead, blocks, BLOCK)
        scale = jnp.max(jnp.abs(padded), -1)
        shares = x / jnp.maximum(expand_groups(scale, BLOCK, size), 1e-38)
        codes = jnp.searchsorted(jnp.asarray((table[1:] + table[:-1]) / 2), shares, method="scan_unrolled")
        return BlockQuantized(codes.astype(jnp.uint8), scale, signed)

    @property
    def array(self) -> Array:
        """The float32 array that this represents."""
        return jnp.asarray(dynamic_table(self.signed))[self.codes] * expand_groups(
            self.scale, BLOCK, self.codes.shape[-1]
        )


def dynamic_table(signed: bool) -> np.ndarray:
    """256 sorted values from -1 (signed) or 0 to 1: seven decades, each with twice as many values as the one below it
    (arXiv:2110.02861, section 1.3). An unsigned table uses the sign bit as one more bit of the fraction."""
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2 ** (exponent + (0 if signed else 1))
        edges = np.linspace(0.1, 1, count + 1)
        means = (edges[1:] + edges[:-1]) / 2 * 10.0 ** (exponent - 6)
        values += [*means, *(-means if signed else ())]
    table = np.sort(np.asarray(values, np.float32))
    assert len(table) == 256
    return table


class Adam8bitState(NamedTuple):
    count: Array
    mu: dict[str, Array | BlockQuantized]
    nu: dict[str, Array | BlockQuantized]


def scale_by_adam8bit(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """``optax.scale_by_adam`` over a flat dict, its moments ``BlockQuantized`` between updates. Those of tables stay in
    float32, as in the paper (section 2.3), and so do those of small parameters."""

    def quantized(path: str, x: Array, signed: bool):
        return x if x.size < _SMALLEST or path.endswith("table") else BlockQuantized.of(x, signed)

    def dequantized_all(moments):
        return {path: x.array if isinstance(x, BlockQuantized) else x for path, x in moments.items()}

    def quantized_all(moments, signed: bool):
        return {path: quantized(path, x, signed) for path, x in moments.items()}

    def init(params):
        zeros = {path: jnp.zeros(x.shape, jnp.float32) for path, x in params.items()}
        return Adam8bitState(jnp.zeros((), jnp.int32), quantized_all(zeros, True), quantized_all(zeros, False))

    def update(grads, state, params=None):
        count = state.count + 1
        mu = {path: b1 * m + (1 - b1) * grads[path] for path, m in dequantized_all(state.mu).items()}
        nu = {path: b2 * v + (1 - b2) * jnp.square(grads[path]) for path, v in dequantized_all(state.nu).items()}
        first, second = 1 - b1**count, 1 - b2**count
        updates = {path: m / first / (jnp.sqrt(nu[path] / second) + eps) for path, m in mu.items()}
        return updates, Adam8bitState(count, quantized_all(mu, True), quantized_all(nu, False))

    return optax.GradientTransformation(init, update)
