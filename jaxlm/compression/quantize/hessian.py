"""The second moment of a layer's inputs, prepared for solvers: dead inputs, damping and its factor.

A linear layer ``y = W x`` compressed to ``Q`` has the error ``tr((W - Q) H (W - Q)^T)`` with ``H = E[x x^T]``, the
Hessian. It is all that a layer-wise solver knows about the data. Nothing here depends on the scale of ``H``: it may be
a sum.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

ATTEMPTS = 6  # the damping grows from 1% of the mean diagonal to 1000 times it, where only the diagonal counts


class HessianFactor(NamedTuple):
    """Upper triangular ``r_IxI`` with ``r @ r.T = H + damping * mean(diag(H)) * I``.

    ``retries`` counts the Cholesky factorizations that failed before. Where all failed, ``failed`` is true and ``r`` is
    the identity, with which ``obs.sweep`` works without error feedback, that is, rounds to nearest.
    """

    r_IxI: jax.Array
    damping: jax.Array
    retries: jax.Array
    failed: jax.Array

    def damp(self, h_IxI: jax.Array) -> jax.Array:
        """``H`` with the damping that was used, in the order of ``h_IxI``."""
        return h_IxI + self.damping * jnp.mean(jnp.diagonal(h_IxI)) * jnp.eye(h_IxI.shape[0])


def fix_dead_inputs(w_OxI: jax.Array, h_IxI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights and Hessian where inputs that are never active have weight 0 and, on the diagonal, the mean of the
    others, so that ``H`` can be factored. A Hessian with NaN or infinities becomes the identity."""
    h_IxI = jnp.where(jnp.isfinite(h_IxI).all(), h_IxI, jnp.eye(h_IxI.shape[0]))
    diag_I = jnp.diagonal(h_IxI)
    dead_I = diag_I == 0
    mean = jnp.sum(diag_I) / jnp.maximum(jnp.sum(~dead_I), 1)
    lift_I = jnp.where(dead_I, jnp.where(mean > 0, mean, 1), 0)
    return jnp.where(dead_I, 0, w_OxI), h_IxI + jnp.diag(lift_I)


def factorize(h_IxI: jax.Array, damping: float, order_I: jax.Array | None = None) -> HessianFactor:
    """Factors ``H``, its rows and columns in ``order_I``, with ten times the damping after every failure.

    GPTQ's authors use an upper triangular ``U`` with ``U.T @ U = inv(H)``, which is ``inv(r)``. One Cholesky
    factorization of ``H`` in reverse order takes a quarter of the work of their Cholesky, inverse and second Cholesky,
    and is better conditioned.
    """
    n_in = h_IxI.shape[0]
    order_I = jnp.arange(n_in) if order_I is None else order_I
    backwards_IxI = h_IxI[order_I[::-1]][:, order_I[::-1]]
    mean = jnp.mean(jnp.diagonal(h_IxI))

    def attempt(state):
        retries, _ = state
        shift = damping * 10.0 ** (retries + 1) * mean
        lower_IxI = jax.lax.linalg.cholesky(backwards_IxI + shift * jnp.eye(n_in), symmetrize_input=False)
        return retries + 1, lower_IxI

    def unfinished(state):
        retries, lower_IxI = state
        return (retries < ATTEMPTS - 1) & ~jnp.isfinite(lower_IxI).all()

    retries, lower_IxI = jax.lax.while_loop(unfinished, attempt, attempt((jnp.int32(-1), backwards_IxI)))
    failed = ~jnp.isfinite(lower_IxI).all()
    r_IxI = jnp.where(failed, jnp.eye(n_in), lower_IxI[::-1, ::-1])
    return HessianFactor(r_IxI, damping * 10.0**retries, retries, failed)
