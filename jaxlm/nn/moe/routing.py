"""Tokens to their experts and back, with the experts spread over the mesh axis ``expert``.

Every expert has a fixed number of slots for the tokens of a group. A token's place among those that chose the same
expert decides whether it gets one: all first choices come before all second ones (GShard, arXiv:2006.16668, algorithm
1). Slots go to the devices of their experts by one all-to-all and come back by another.

- ``capacity`` routing (Switch, arXiv:2101.03961, section 2.2): the groups are rows, and what finds no slot is dropped.
- ``dropless`` routing: the group is what a device holds, and whoever found no slot is sent in the next round. As many
  rounds run as the most popular expert needs; routers that are balanced need one or two. (In a pipeline stages differ
  in that, so that all rounds run that any could need: E / (factor * K) at most.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxlm.core.errors import UserError

__all__ = ["Routing", "capacity", "in_rounds", "joined", "limited", "sorted_by_expert"]

Apply = Callable[[jax.Array], jax.Array]  # the experts that are here, each to its own rows: [E, M, D] to [E, M, D]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What a router did with a batch, as sums over its tokens (``[..., layers, ...]`` from a stack), float32."""

    tokens: jax.Array
    chosen_E: jax.Array  # tokens that chose the expert, first or later
    probability_E: jax.Array  # that the router gave it
    square: jax.Array  # of the logarithm of the router's normaliser
    dropped: jax.Array  # choices that found no slot


def joined(routings: Sequence[Routing | None]) -> Routing | None:
    """Of several runs of layers, those with experts."""
    routings = [each for each in routings if each is not None]
    return jax.tree.map(lambda *each: jnp.concatenate(each), *routings) if routings else None


def capacity(factor: float, tokens: int, choices: int, experts: int) -> int:
    """Slots that an expert has for a group of so many tokens: ``factor`` times its even share."""
    if factor <= 0:
        raise UserError(f"model.capacity_factor is {factor}; it must be positive")
    return min(tokens, math.ceil(factor * tokens * choices / experts))


def sorted_by_expert(
    apply: Callable[[jax.Array, jax.Array], jax.Array], x_TxD: jax.Array, experts_TxK: jax.Array, experts: int
) -> jax.Array:
    """``[T, K, D]``: what each token's experts make of it, all of them being here. ``apply`` is given rows sorted by
    expert, and how many each has."""
    order = jnp.argsort(experts_TxK.reshape(-1), stable=True)
    sizes_E = jnp.bincount(experts_TxK.reshape(-1), length=experts).astype(jnp.int32)
    sorted_TKxD = apply(x_TxD[order // experts_TxK.shape[1]], sizes_E)
    y_TKxD = jnp.zeros_like(sorted_TKxD).at[order].set(sorted_TKxD, unique_indices=True)
    return y_TKxD.reshape(*experts_TxK.shape, -1)


def limited(
    apply: Apply, x_GxTxD: jax.Array, experts_GxTxK: jax.Array, experts: int, slots: int, *, parts: str | None,
    spread: str | None,
) -> tuple[jax.Array, jax.Array]:
    """``[G, T, K, D]``, zero where a choice found no slot, and which did, ``[G, T, K]``.

    ``parts`` is the mesh axis over which the tokens of a group are split, ``spread`` the one of the experts.
    """
    place_GxTxK, of_group_GxTxK = _places(experts_GxTxK, experts, parts)
    kept_GxTxK = of_group_GxTxK < slots
    place_GxTxK = jnp.where(kept_GxTxK, place_GxTxK, slots)
    return _round_trip(apply, x_GxTxD, experts_GxTxK, place_GxTxK, experts, slots, spread), kept_GxTxK


def in_rounds(
    apply: Apply, x_TxD: jax.Array, experts_TxK: jax.Array, experts: int, slots: int, *, spread: str,
    everywhere: Sequence[str],
) -> jax.Array:
    """``[T, K, D]`` of the tokens of this device. ``everywhere`` are the mesh axes whose devices hold other tokens."""
    x_GxTxD, experts_GxTxK = x_TxD[None], experts_TxK[None]
    place_GxTxK, _ = _places(experts_GxTxK, experts, None)
    last = jax.lax.pmax(jnp.max(place_GxTxK), tuple(everywhere)) // slots  # the same round for all, who meet in each

    def one(number):
        place = place_GxTxK - number * slots
        place = jnp.where((place >= 0) & (place < slots), place, slots)
        return _round_trip(apply, x_GxTxD, experts_GxTxK, place, experts, slots, spread)[0]

    @jax.checkpoint  # rounds that may not run keep nothing for the backward pass
    def further(y_TxKxD, number):
        return jax.lax.cond(number <= last, lambda: y_TxKxD + one(number), lambda: y_TxKxD), None

    return jax.lax.scan(further, one(0), jnp.arange(1, math.ceil(len(x_TxD) / slots)))[0]


def _places(experts_GxTxK: jax.Array, experts: int, parts: str | None) -> tuple[jax.Array, jax.Array]:
    """How many choices of the same expert come before each, ``[G, T, K]``: on this device, and in the whole group."""
    G, T, K = experts_GxTxK.shape
    chosen_GxKxTxE = jax.nn.one_hot(experts_GxTxK.swapaxes(1, 2), experts, dtype=jnp.int32)
    among_GxKTxE = chosen_GxKxTxE.reshape(G, K * T, experts)
    before_GxKTxE = jnp.cumsum(among_GxKTxE, 1) - among_GxKTxE

    def at_choice(before_GxKTxE):
        return jnp.sum(before_GxKTxE * among_GxKTxE, -1).reshape(G, K, T).swapaxes(1, 2)

    place_GxTxK = at_choice(before_GxKTxE)
    if parts is None:
        return place_GxTxK, place_GxTxK
    here_GxKxE = jnp.sum(chosen_GxKxTxE, 2)
    all_PxGxKxE = jax.lax.all_gather(here_GxKxE, parts)
    total_GxKxE = jnp.sum(all_PxGxKxE, 0)
    earlier_P = jnp.arange(len(all_PxGxKxE)) < jax.lax.axis_index(parts)
    elsewhere_GxKxE = jnp.cumsum(total_GxKxE - here_GxKxE, 1) - (total_GxKxE - here_GxKxE)
    elsewhere_GxKxE += jnp.tensordot(earlier_P.astype(jnp.int32), all_PxGxKxE, 1)
    elsewhere_GxKTxE = jnp.repeat(elsewhere_GxKxE, T, 1)
    return place_GxTxK, at_choice(before_GxKTxE + elsewhere_GxKTxE)


def _round_trip(apply: Apply, x_GxTxD, experts_GxTxK, place_GxTxK, experts: int, slots: int, spread: str | None):
    """``[G, T, K, D]`` of the choices whose place is one of the slots, zero elsewhere."""
    G, T, K = experts_GxTxK.shape
    none = experts * slots  # out of range: neither written nor read
    slot_GxTK = jnp.where(place_GxTxK < slots, experts_GxTxK * slots + place_GxTxK, none).reshape(G, T * K)

    @partial(jax.vmap, in_axes=(0, 0))
    def fill(x_TxD, slot_TK):
        empty = jnp.zeros((none, x_TxD.shape[1]), x_TxD.dtype)
        return empty.at[slot_TK].add(jnp.repeat(x_TxD, K, 0), mode="drop")  # no two of them in one slot

    held_GxExCxD = fill(x_GxTxD, slot_GxTK).reshape(G, experts, slots, -1)
    if spread is not None:
        held_GxExCxD = jax.lax.all_to_all(held_GxExCxD, spread, 1, 0, tiled=True)  # more groups, fewer experts
    groups, here = held_GxExCxD.shape[:2]
    made_ExMxD = apply(held_GxExCxD.swapaxes(0, 1).reshape(here, groups * slots, -1))
    held_GxExCxD = made_ExMxD.reshape(here, groups, slots, -1).swapaxes(0, 1)
    if spread is not None:
        held_GxExCxD = jax.lax.all_to_all(held_GxExCxD, spread, 0, 1, tiled=True)
    held_GxSxD = held_GxExCxD.reshape(G, none, -1)
    read = jax.vmap(lambda held_SxD, slot_TK: held_SxD.at[slot_TK].get(mode="fill", fill_value=0))
    return read(held_GxSxD, slot_GxTK).reshape(G, T, K, -1)
