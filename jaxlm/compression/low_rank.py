"""Low-rank factors of a weight: ``w ~ a @ b``, by the SVD, or by that of the weight as its inputs see it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError

_HIGHEST = jax.lax.Precision.HIGHEST


def rank_for(shape: tuple[int, ...], share: float) -> int:
    """The largest rank, at least 1, whose factors hold no more than ``share`` of the numbers of a matrix
    ``[..., in, out]``."""
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

    Without a Gram matrix they are the truncated SVD, the least ``|w - ab|`` (Frobenius). With ``gram``, ``X^T X`` of
    the inputs at any scale ``[..., in, in]``, they are the least ``|Xw - Xab|`` (SVD-LLM, arXiv:2403.07378, section 3):
    with ``S S^T = X^T X``, the SVD of ``S^T w``. S comes from the eigenvectors, and eigenvalues are damped by
    ``damping`` of their mean, so inputs that never occur are no trouble.

    Args:
        w: leading dimensions are stacked layers and experts.
        rank: r, the same for all.
        energy: instead of a rank, the share (0 to 1) of the squared singular values to keep in each matrix; r is then
            what the most demanding one takes, so ``w`` must be concrete.
        gram: symmetric, not negative.
        damping: see above.
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
    """All columns of a, rows of b, and the singular values."""

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
        # Each pair of a column and a row gets the same norm: to whatever quantizes the factors they are alike.
        balance = jnp.sqrt(values / jnp.maximum(jnp.linalg.norm(a, axis=0), 1e-30))
        return a * balance, right * (values / jnp.maximum(balance, 1e-30))[:, None], values

    lead = w.shape[:-2]
    flat = w.astype(jnp.float32).reshape(-1, *w.shape[-2:])
    grams = None if gram is None else gram.astype(jnp.float32).reshape(-1, *gram.shape[-2:])
    parts = jax.lax.map(lambda each: of_matrix(*each), (flat, grams))
    return jax.tree.map(lambda part: part.reshape(*lead, *part.shape[1:]), parts)
