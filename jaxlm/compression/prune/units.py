"""What pruning by units (heads, channels, the width) has in common: how many stay, which, and how the rest makes up.

Statistics are about the inputs of kernels, by the kernel's path:

- ``statistics``: the mean square of every input, ``[L, I]``, or ``[L, E, I]`` of experts;
- ``means``: the mean of every input, of the same shape;
- ``grams``: ``X^T X / n``, ``[L, I, I]`` or ``[L, E, I, I]``.

Without any, units are judged by the size of their weights. With statistics (or grams, whose diagonal they are) they are
judged by the mean square of what they contribute to the output (Wanda, arXiv:2306.11695, summed over a unit). With
besides, a bias of the kernel takes up what the units gave on average, and they are judged by what varies (FLAP,
arXiv:2312.11983). With grams what stays of the kernel is solved anew to give the output it gave.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError

Statistics = Mapping[str, jax.Array]  # by the path of the kernel whose inputs they are about


def remaining(total: int, share: float, what: str, multiple: int = 1) -> int:
    """How many of ``total`` are left when about ``share`` of them go, a multiple of ``multiple``.

    UserError where that is all of them, or none.
    """
    if not 0 < share < 1:
        raise UserError(f"pruning {share:.0%} of the {what} is impossible; use more than 0% and less than 100%")
    left = multiple * round(total * (1 - share) / multiple)
    if not 0 < left < total:
        raise UserError(f"pruning {share:.0%} of {total} {what} leaves {left}; choose another share")
    return left


def select(leaf: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """The entries ``index [..., k]`` of a (negative) axis; the index may have the leading dimensions of the leaf."""

    def pick(leaf, index):
        return jnp.take(leaf, index, axis)

    for _ in range(index.ndim - 1):
        pick = jax.vmap(pick)
    return pick(leaf, index)


def largest(scores: jax.Array, k: int) -> jax.Array:
    """The indices of the k largest along the last axis, ascending; of equals the first."""
    return jnp.sort(jnp.argsort(-scores, -1, stable=True)[..., :k], -1)


def refit(
    kernel: jax.Array, bias: jax.Array | None, kept: jax.Array, mean: jax.Array | None, gram: jax.Array | None,
    damping: float,
) -> tuple[jax.Array, jax.Array | None]:
    """The rows ``kept`` of a kernel, and its bias, changed so that the output stays nearest to what it was.

    With ``X`` the inputs, the new rows are least squares: they minimise
    ``|X_kept w' - X w|^2 + damping * mean(diag(X^T X)) * |w' - w_kept|^2``, in float64 on the host. Where there is a
    bias and a mean, the bias is part of the fit. Without a Gram matrix the rows stay, and the bias takes up the mean.

    Args:
        kernel: ``[..., I, O]``.
        bias: ``[..., O]``, or None.
        kept: ``[..., k]``.
        mean: ``[..., I]``, of each input.
        gram: ``[..., I, I]``, ``X^T X / n``.
        damping: a share.
    """
    mean = None if bias is None else mean
    if gram is None and mean is None:
        return select(kernel, kept, -2), bias
    lead, (n_in, n_out), k = kernel.shape[:-2], kernel.shape[-2:], kept.shape[-1]

    def flat(array, *shape):
        return None if array is None else np.asarray(array, np.float64).reshape(-1, *shape)

    w, b, m, g = flat(kernel, n_in, n_out), flat(bias, n_out), flat(mean, n_in), flat(gram, n_in, n_in)
    kept = np.broadcast_to(np.asarray(kept), (*lead, k)).reshape(-1, k)
    rows, shifts = np.empty((len(w), k, n_out)), b
    for i, keep in enumerate(kept):
        gone = np.setdiff1d(np.arange(n_in), keep)
        rows[i] = w[i, keep]
        if g is not None:
            covariance = g[i] if m is None else g[i] - np.outer(m[i], m[i])
            inner = covariance[np.ix_(keep, keep)]
            inner = inner + max(damping * np.mean(np.diag(covariance)), 1e-30) * np.eye(k)
            rows[i] += np.linalg.solve(inner, covariance[np.ix_(keep, gone)] @ w[i, gone])
        if m is not None:
            shifts[i] += m[i] @ w[i] - m[i, keep] @ rows[i]
    new = jnp.asarray(rows.reshape(*lead, k, n_out), kernel.dtype)
    return new, None if bias is None else jnp.asarray(shifts.reshape(bias.shape), bias.dtype)


def importance(
    path: str, kernel: jax.Array, biased: bool, statistics: Statistics | None, means: Statistics | None,
    grams: Statistics | None,
) -> jax.Array | None:
    """What each input of a kernel contributes to its output, mean square: ``[..., I]``. None without data.

    What is constant does not count where a bias can take it up.
    """
    if statistics is not None:
        square = of(statistics, path)
    elif grams is not None:
        square = jnp.diagonal(of(grams, path), axis1=-2, axis2=-1)
    else:
        return None
    if means is not None and biased:
        square = jnp.maximum(square - jnp.square(of(means, path)), 0)
    return square * squares(kernel, -1)


def of(statistics: Statistics, path: str) -> jax.Array:
    if path not in statistics:
        raise UserError(f"there are no statistics of {path}; calibrate all kernels that are pruned")
    return jnp.asarray(statistics[path], jnp.float32)


def squares(leaf: jax.Array, axis: int) -> jax.Array:
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis)
