"""What pruning of units (heads, channels, the width) has in common: how many units stay, which, and how the rest
adapts.

Calibration data is about the inputs of kernels, by the path of the kernel:

- ``mean_squares``: the mean square of every input, ``[L, I]``, or ``[L, E, I]`` of experts;
- ``means``: the mean of every input, of the same shape;
- ``grams``: ``X^T X / n``, ``[L, I, I]`` or ``[L, E, I, I]``.

Without data, units are scored by the size of their weights. With ``mean_squares`` (or ``grams``, whose diagonal they
are) they are scored by the mean square of what they add to the output (Wanda, arXiv:2306.11695, summed over a unit).
With ``means`` besides, a bias of the kernel takes up the average of what the units gave, and they are scored by what
varies (FLAP, arXiv:2312.11983). With ``grams`` what stays of the kernel is solved anew to give the output that it gave.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.core.errors import UserError

InputData = Mapping[str, jax.Array]  # by the path of the kernel whose inputs it is about


def remaining(total: int, share: float, what: str, multiple: int = 1) -> int:
    """How many of ``total`` remain without about the share ``share`` of them: a multiple of ``multiple``.

    Raises:
        UserError: when all of them or none would remain.
    """
    if not 0 < share < 1:
        raise UserError(f"pruning {share:.0%} of the {what} is impossible; use more than 0% and less than 100%")
    left = multiple * round(total * (1 - share) / multiple)
    if not 0 < left < total:
        raise UserError(f"pruning {share:.0%} of {total} {what} leaves {left}; choose another share")
    return left


def select(leaf: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """The entries ``index [..., k]`` along a (negative) axis; the index may have the leading dimensions of the leaf."""

    def pick(leaf, index):
        return jnp.take(leaf, index, axis)

    for _ in range(index.ndim - 1):
        pick = jax.vmap(pick)
    return pick(leaf, index)


def top_indices(scores: jax.Array, k: int) -> jax.Array:
    """The indices of the k largest scores along the last axis, ascending; of equal scores the first."""
    return jnp.sort(jnp.argsort(-scores, -1, stable=True)[..., :k], -1)


def refit(
    kernel: jax.Array, bias: jax.Array | None, kept: jax.Array, mean: jax.Array | None, gram: jax.Array | None,
    damping: float,
) -> tuple[jax.Array, jax.Array | None]:
    """The rows ``kept`` of a kernel, and its bias, changed so that the output stays close to what it was.

    With the inputs ``X``, the new rows minimise ``|X_kept w' - X w|^2 + damping * mean(diag(X^T X)) * |w' -
    w_kept|^2``, in float64 on the host. Where there is a bias and a mean, the bias is part of the fit. Without a Gram
    matrix the rows stay as they are, and the bias takes up the mean.

    Args:
        kernel: ``[..., I, O]``.
        bias: ``[..., O]``, or None.
        kept: the indices of the inputs to keep, ``[..., k]``.
        mean: the mean of each input, ``[..., I]``, or None.
        gram: ``X^T X / n``, ``[..., I, I]``, or None.
        damping: a share of the mean of the diagonal.
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
        removed = np.setdiff1d(np.arange(n_in), keep)
        rows[i] = w[i, keep]
        if g is not None:
            covariance = g[i] if m is None else g[i] - np.outer(m[i], m[i])
            inner = covariance[np.ix_(keep, keep)]
            inner = inner + max(damping * np.mean(np.diag(covariance)), 1e-30) * np.eye(k)
            rows[i] += np.linalg.solve(inner, covariance[np.ix_(keep, removed)] @ w[i, removed])
        if m is not None:
            shifts[i] += m[i] @ w[i] - m[i, keep] @ rows[i]
    new = jnp.asarray(rows.reshape(*lead, k, n_out), kernel.dtype)
    return new, None if bias is None else jnp.asarray(shifts.reshape(bias.shape), bias.dtype)


def importance(
    path: str, kernel: jax.Array, biased: bool, mean_squares: InputData | None, means: InputData | None,
    grams: InputData | None,
) -> jax.Array | None:
    """The mean square of what each input of a kernel adds to its output, ``[..., I]``; None without data.

    What is constant does not count where a bias can take it up (``biased``).
    """
    if mean_squares is not None:
        square = data_of(mean_squares, path)
    elif grams is not None:
        square = jnp.diagonal(data_of(grams, path), axis1=-2, axis2=-1)
    else:
        return None
    if means is not None and biased:
        square = jnp.maximum(square - jnp.square(data_of(means, path)), 0)
    return square * squared_norm(kernel, -1)


def data_of(data: InputData, path: str) -> jax.Array:
    """The data about the inputs of one kernel, float32; raises UserError when it is missing."""
    if path not in data:
        raise UserError(f"there is no calibration data about {path}; calibrate all kernels that are pruned")
    return jnp.asarray(data[path], jnp.float32)


def squared_norm(leaf: jax.Array, axis: int) -> jax.Array:
    """The sum of squares along an axis, float32."""
    return jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis)


def keep_inputs(
    leaves: dict[str, jax.Array], linear: str, kept: jax.Array, means: InputData | None, grams: InputData | None,
    damping: float,
) -> None:
    """Cuts the kernel of the linear map at the path ``linear`` down to the inputs ``kept``, in place; see ``refit``."""
    path, bias = f"{linear}/kernel", leaves.get(f"{linear}/bias")
    mean = None if means is None or bias is None else data_of(means, path)
    gram = None if grams is None else data_of(grams, path)
    leaves[path], bias = refit(leaves[path], bias, kept, mean, gram, damping)
    if bias is not None:
        leaves[f"{linear}/bias"] = bias
