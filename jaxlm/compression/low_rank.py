"""Low-rank factors of a weight: ``w ~ a @ b``, by its SVD, or by the SVD of the weight times the root of ``X^T X``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import CalibratedLayer, LayerParams
from jaxlm.compression.input_statistics import observe_inputs, second_moment
from jaxlm.compression.observers import gram as observe_gram
from jaxlm.compression.steps import LAYER_KERNELS, LayerStep, OnCpu, Step, WeightStep
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LowRank
from jaxlm.core.tree import Leaf
from jaxlm.nn.config import ModelConfig

__all__ = ["Factorize", "low_rank", "rank_for"]

_HIGHEST = jax.lax.Precision.HIGHEST


def rank_for(shape: tuple[int, ...], share: float) -> int:
    """The largest rank, at least 1, whose factors have at most ``share`` of the entries of a matrix ``[..., in,
    out]``."""
    n_in, n_out = shape[-2:]
    return max(1, int(share * n_in * n_out / (n_in + n_out)))


def low_rank(
    w: jax.Array,
    rank: int | None = None,
    *,
    energy: float | None = None,
    gram: jax.Array | None = None,
    damping: float = 1e-4,
) -> tuple[jax.Array, jax.Array]:
    """Factors ``a [..., in, r]`` and ``b [..., r, out]`` of ``w [..., in, out]``, in its dtype, of equal norms.

    Without a Gram matrix they are the truncated SVD, which minimises ``|w - ab|`` (Frobenius). With ``gram`` they
    minimise ``|Xw - Xab|`` (SVD-LLM, arXiv:2403.07378, section 3): they come from the SVD of ``S^T w`` with ``S S^T =
    X^T X``. S is made from the eigenvectors of the Gram matrix.

    Args:
        w: leading dimensions are stacked layers and experts.
        rank: r, the same for all matrices.
        energy: instead of a rank, the share (0 to 1) of the squared singular values to keep in each matrix; r is then
            the largest rank that any of them needs. ``w`` must be concrete, not traced.
        gram: ``X^T X`` of the inputs at any scale, ``[..., in, in]``: symmetric, not negative.
        damping: added to the eigenvalues of ``gram``, as a share of their mean, so that inputs that never occur do no
            harm.

    Raises:
        UserError: when both or neither of ``rank`` and ``energy`` are given, or one of them is out of range.
    """
    if (rank is None) == (energy is None):
        raise UserError("low rank: give either a rank or the share of energy to keep")
    full = min(w.shape[-2:])
    if rank is not None and not 1 <= rank <= full:
        size = f"{w.shape[-2]} by {w.shape[-1]}"
        raise UserError(f"a rank of {rank} is impossible for a matrix of {size}; use 1 to {full}")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"{energy} of the energy is impossible; keep more than 0 and at most 1")
    a, b, values = _factors(w, gram, damping)
    if rank is None:
        shares = jnp.cumsum(jnp.square(values), -1) / jnp.maximum(jnp.sum(jnp.square(values), -1, keepdims=True), 1e-30)
        enough = jnp.sum(shares < energy * (1 - 1e-6), -1) + 1
        rank = min(int(jnp.max(enough)), full)
    return a[..., :rank].astype(w.dtype), b[..., :rank, :].astype(w.dtype)


@jax.jit
def _factors(w: jax.Array, gram: jax.Array | None, damping: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All columns of a, all rows of b, and the singular values."""

    def of_matrix(w, gram):
        unwhiten = None
        if gram is not None:
            power, vectors = jnp.linalg.eigh(gram)
            power = jnp.maximum(power, 0)
            mean = jnp.mean(power)
            root = jnp.sqrt(power + jnp.where(mean > 0, damping * mean, 1.0))[:, None]
            w, unwhiten = root * jnp.matmul(vectors.T, w, precision=_HIGHEST), vectors / root.T
        left, values, right = jnp.linalg.svd(w, full_matrices=False)
        a = left if unwhiten is None else jnp.matmul(unwhiten, left, precision=_HIGHEST)
        # A column of a and its row of b get the same norm, so that quantizers treat both factors alike.
        balance = jnp.sqrt(values / jnp.maximum(jnp.linalg.norm(a, axis=0), 1e-30))
        return a * balance, right * (values / jnp.maximum(balance, 1e-30))[:, None], values

    lead = w.shape[:-2]
    flat = w.astype(jnp.float32).reshape(-1, *w.shape[-2:])
    grams = None if gram is None else gram.astype(jnp.float32).reshape(-1, *gram.shape[-2:])
    parts = jax.lax.map(lambda each: of_matrix(*each), (flat, grams))
    return jax.tree.map(lambda part: part.reshape(*lead, *part.shape[1:]), parts)


@dataclass(frozen=True)
class Factorize(LayerStep):
    """Replaces each weight by the product of two factors with ``share`` of its entries, those of least output error
    (SVD-LLM, arXiv:2403.07378)."""

    kind: ClassVar[str] = "factor"
    share: float
    target: str = LAYER_KERNELS

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise UserError(f"low rank with {self.share:.0%} of the entries is impossible; use 1% to 99%")

    @property
    def on_cpu(self) -> OnCpu:
        return "faster" if self.share <= 0.75 else "as dense"  # see ``platforms``

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        return (_FactorShapes(self.share, self.target),)

    def solve(self, layer: CalibratedLayer) -> LayerParams:
        statistics = observe_inputs(layer, observe_gram)

        def factorize(name: str) -> LowRank:
            kernel = layer.params[name]
            h = second_moment(layer, name, statistics[name], "factored")
            return LowRank(*low_rank(kernel, rank_for(kernel.shape, self.share), gram=h))

        return layer.params | {name: factorize(name) for name in layer.targets}


@dataclass(frozen=True)
class _FactorShapes(WeightStep):
    """Two factors of the rank that ``Factorize`` takes, with arbitrary values."""

    kind: ClassVar[str] = "factor_shapes"
    share: float
    target: str

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        rank = rank_for(dense.shape, self.share)
        return LowRank(dense[..., :rank], dense[..., :rank, :])
