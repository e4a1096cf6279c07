"""Sends tokens to their experts and back, with the experts split over the mesh axis ``expert``.

Every expert has a fixed number of slots for the tokens of a group. The rank of a token among those that chose the same
expert decides whether it gets a slot: all first choices come before all second ones (GShard, arXiv:2006.16668,
algorithm 1). One all-to-all sends slots to the devices of their experts, and another sends them back.

- ``capacity`` routing (Switch, arXiv:2101.03961, section 2.2): a group is a row, and a choice without a slot is
  dropped.
- ``dropless`` routing: a group is the tokens of a device, and a choice without a slot is sent in the next round. As
  many rounds run as the most popular expert needs; balanced routers need one or two. (The stages of a pipeline differ
  in this, so there the highest possible number of rounds runs: E / (factor * K).)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError

__all__ = ["Routing", "apply_sorted", "concat_routings", "dispatch_in_rounds", "dispatch_with_capacity",
           "expert_capacity"]

Apply = Callable[[jax.Array], jax.Array]  # the experts of this device, each on its own rows: [E, M, D] to [E, M, D]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Statistics of a router, float32, summed over the tokens of a batch; from a stack ``[layers, ...]``."""

    tokens: jax.Array  # their number
    chosen_E: jax.Array  # tokens for which the expert is one of the choices
    probability_E: jax.Array  # the router's probabilities
    square: jax.Array  # the squared logarithm of the softmax's denominator
    dropped: jax.Array  # choices without a slot


def concat_routings(routings: Sequence[Routing | None]) -> Routing | None:
    """The statistics of several layer groups as one, ``[layers with experts, ...]``; None if no layer has experts."""
    routings = [each for each in routings if each is not None]
    return jax.tree.map(lambda *each: jnp.concatenate(each), *routings) if routings else None


def expert_capacity(factor: float, tokens: int, choices: int, experts: int) -> int:
    """Slots of an expert for a group of ``tokens`` tokens with ``choices`` each: ``factor`` times its even share.

    Raises:
        UserError: when the factor is not positive.
    """
    if factor <= 0:
        raise UserError(f"model.capacity_factor is {factor}; it must be positive")
    return min(tokens, math.ceil(factor * tokens * choices / experts))


def apply_sorted(
    apply: Callable[[jax.Array, jax.Array], jax.Array], x_TxD: jax.Array, experts_TxK: jax.Array, experts: int
) -> jax.Array:
    """The outputs of each token's experts, ``[T, K, D]``, when all experts are on this device.

    ``apply`` takes rows sorted by expert and the number of rows of each.
    """
    order = jnp.argsort(experts_TxK.reshape(-1), stable=True)
    sizes_E = jnp.bincount(experts_TxK.reshape(-1), length=experts).astype(jnp.int32)
    sorted_TKxD = apply(x_TxD[order // experts_TxK.shape[1]], sizes_E)
    y_TKxD = jnp.zeros_like(sorted_TKxD).at[order].set(sorted_TKxD, unique_indices=True)
    return y_TKxD.reshape(*experts_TxK.shape, -1)


def dispatch_with_capacity(
    apply: Apply, x_GxTxD: jax.Array, experts_GxTxK: jax.Array, experts: int, slots: int, *, length_axis: str | None,
    expert_axis: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The outputs of each token's experts, ``[G, T, K, D]``, 0 for a choice without a slot; and which choices have one,
    bool ``[G, T, K]``.

    ``length_axis`` is the mesh axis over which the tokens of a group are split, ``expert_axis`` that of the experts.
    """
    rank_GxTxK, group_rank_GxTxK = _ranks(experts_GxTxK, experts, length_axis)
    has_slot_GxTxK = group_rank_GxTxK < slots
    rank_GxTxK = jnp.where(has_slot_GxTxK, rank_GxTxK, slots)
    return _send_and_return(apply, x_GxTxD, experts_GxTxK, rank_GxTxK, experts, slots, expert_axis), has_slot_GxTxK


def dispatch_in_rounds(
    apply: Apply, x_TxD: jax.Array, experts_TxK: jax.Array, experts: int, slots: int, *, expert_axis: str,
    token_axes: Sequence[str],
) -> jax.Array:
    """The outputs of the experts of this device's tokens, ``[T, K, D]``; none is dropped.

    ``token_axes`` are the mesh axes over which tokens are split.
    """
    x_GxTxD, experts_GxTxK = x_TxD[None], experts_TxK[None]
    rank_GxTxK, _ = _ranks(experts_GxTxK, experts, None)
    last = jax.lax.pmax(jnp.max(rank_GxTxK), tuple(token_axes)) // slots  # the same for all devices: all take part

    def run_round(number):
        rank = rank_GxTxK - number * slots
        rank = jnp.where((rank >= 0) & (rank < slots), rank, slots)
        return _send_and_return(apply, x_GxTxD, experts_GxTxK, rank, experts, slots, expert_axis)[0]

    @jax.checkpoint  # rounds that may not run keep nothing for the backward pass
    def next_round(y_TxKxD, number):
        return jax.lax.cond(number <= last, lambda: y_TxKxD + run_round(number), lambda: y_TxKxD), None

    return jax.lax.scan(next_round, run_round(0), jnp.arange(1, math.ceil(len(x_TxD) / slots)))[0]


def _ranks(experts_GxTxK: jax.Array, experts: int, length_axis: str | None) -> tuple[jax.Array, jax.Array]:
    """How many choices of the same expert come before each choice, ``[G, T, K]``: on this device, and in the group."""
    G, T, K = experts_GxTxK.shape
    chosen_GxKxTxE = jax.nn.one_hot(experts_GxTxK.swapaxes(1, 2), experts, dtype=jnp.int32)
    among_GxKTxE = chosen_GxKxTxE.reshape(G, K * T, experts)
    before_GxKTxE = jnp.cumsum(among_GxKTxE, 1) - among_GxKTxE

    def at_choice(before_GxKTxE):
        return jnp.sum(before_GxKTxE * among_GxKTxE, -1).reshape(G, K, T).swapaxes(1, 2)

    rank_GxTxK = at_choice(before_GxKTxE)
    if length_axis is None:
        return rank_GxTxK, rank_GxTxK
    here_GxKxE = jnp.sum(chosen_GxKxTxE, 2)
    all_PxGxKxE = jax.lax.all_gather(here_GxKxE, length_axis)
    total_GxKxE = jnp.sum(all_PxGxKxE, 0)
    earlier_P = jnp.arange(len(all_PxGxKxE)) < jax.lax.axis_index(length_axis)
    elsewhere_GxKxE = jnp.cumsum(total_GxKxE - here_GxKxE, 1) - (total_GxKxE - here_GxKxE)
    elsewhere_GxKxE += jnp.tensordot(earlier_P.astype(jnp.int32), all_PxGxKxE, 1)
    elsewhere_GxKTxE = jnp.repeat(elsewhere_GxKxE, T, 1)
    return rank_GxTxK, at_choice(before_GxKTxE + elsewhere_GxKTxE)


def _send_and_return(
    apply: Apply, x_GxTxD, experts_GxTxK, rank_GxTxK, experts: int, slots: int, expert_axis: str | None
) -> jax.Array:
    """The outputs ``[G, T, K, D]`` of the choices whose rank is below ``slots``; 0 for the others."""
    G, T, K = experts_GxTxK.shape
    none = experts * slots  # out of range: neither written nor read
    slot_GxTK = jnp.where(rank_GxTxK < slots, experts_GxTxK * slots + rank_GxTxK, none).reshape(G, T * K)

    @partial(jax.vmap, in_axes=(0, 0))
    def fill(x_TxD, slot_TK):
        empty = jnp.zeros((none, x_TxD.shape[1]), x_TxD.dtype)
        return empty.at[slot_TK].add(jnp.repeat(x_TxD, K, 0), mode="drop")  # no two choices share a slot

    rows_GxExCxD = fill(x_GxTxD, slot_GxTK).reshape(G, experts, slots, -1)
    if expert_axis is not None:
        rows_GxExCxD = jax.lax.all_to_all(rows_GxExCxD, expert_axis, 1, 0, tiled=True)  # more groups, fewer experts
    groups, here = rows_GxExCxD.shape[:2]
    out_ExMxD = apply(rows_GxExCxD.swapaxes(0, 1).reshape(here, groups * slots, -1))
    rows_GxExCxD = out_ExMxD.reshape(here, groups, slots, -1).swapaxes(0, 1)
    if expert_axis is not None:
        rows_GxExCxD = jax.lax.all_to_all(rows_GxExCxD, expert_axis, 0, 1, tiled=True)
    rows_GxSxD = rows_GxExCxD.reshape(G, none, -1)
    read = jax.vmap(lambda rows_SxD, slot_TK: rows_SxD.at[slot_TK].get(mode="fill", fill_value=0))
    return read(rows_GxSxD, slot_GxTK).reshape(G, T, K, -1)
