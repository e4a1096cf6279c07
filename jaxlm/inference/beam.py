"""Beam search, for translation and language models alike, as a compiled loop.

The rules are those of ``transformers``, so scores and outputs agree with it: a hypothesis scores its summed
log-probability over ``length ** length_penalty``, its length counting the end token; of the ``2K`` best continuations
(more where several tokens end a text) those that end within the first ``K`` are kept as finished, the best ``K`` of the
others go on. When a sentence is closed is a ``Stopping``.

The loop leaves off after some tokens (``_rooms``). Then ``finish`` goes on with the sentences that are still open,
among themselves, in a larger cache: a step costs as much as there are sentences and slots, and most texts are far
shorter than they may be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.inference.logits_processors import LogitsProcessors, log_softmax
from jaxlm.inference.sampling import top_k

Decode = Callable[[Array, Any], tuple[Array, Any]]


class Hypothesis(NamedTuple):
    """A finished text, and its score."""

    tokens: list[int]
    score: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """Up to K finished hypotheses a sentence, best first. A slot that was never filled scores -inf and has length 0."""

    tokens: Array  # [B, K, N] int32, the end token included
    length: Array  # [B, K] int32
    score: Array  # [B, K] float32

    def ranked(self, rules: LogitsProcessors) -> list[list[Hypothesis]]:
        """Those of each sentence, best first, without the end token; where none was finished, an empty one that scores
        -inf."""
        eos, *parts = (np.asarray(x) for x in (rules.eos_E, self.tokens, self.length, self.score))

        def read(tokens_N: np.ndarray, length: np.ndarray, score: np.ndarray) -> Hypothesis:
            tokens = tokens_N[:length].tolist()
            return Hypothesis(tokens[:-1] if tokens[-1] in eos else tokens, float(score))

        return [
            [read(*each) for each in zip(*sentence, strict=True) if each[1]] or [Hypothesis([], -math.inf)]
            for sentence in zip(*parts, strict=True)
        ]

    def best(self, rules: LogitsProcessors) -> list[list[int]]:
        """The tokens of the best of each sentence."""
        return [found[0].tokens for found in self.ranked(rules)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stopping:
    """How hypotheses compare, and when a sentence is closed: when its best live beam, ending here, could not beat the
    worst of ``K`` finished hypotheses."""

    length_penalty: Array | float = 1.0
    exact: Array | bool = False  # rather: when no continuation of any allowed length could ("never" in transformers)
    full: Array | bool = False  # rather: as soon as there are K finished hypotheses (True in transformers)

    @classmethod
    def of(cls, generation: GenerationConfig) -> Stopping:
        """As the settings say; a single beam, which is greedy, has nothing to compare."""
        exact, full = generation.early_stopping == "never", generation.early_stopping is True
        full |= generation.num_beams in (None, 1)
        return cls(np.float32(generation.length_penalty), np.bool_(exact), np.bool_(full))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A search of B sentences under way."""

    step: Array  # tokens generated so far
    cache: Any  # of B * K rows, sentence by sentence
    last_BxK: Array
    tokens_BxKxN: Array
    logp_BxK: Array
    finished: Hypotheses
    open_B: Array
    room: int = field(metadata={"static": True})  # tokens that the cache has room for

    def take(self, rows_B: Array) -> State:
        """That of some of the sentences."""
        rest = {name: getattr(self, name) for name in ("last_BxK", "tokens_BxKxN", "logp_BxK", "finished", "open_B")}
        return replace(self, cache=self.cache.take(rows_B), **jax.tree.map(lambda x: x[rows_B], rest))


def _take(x_BxNx: Array, index_BxK: Array) -> Array:
    """Rows of the second dimension."""
    return jnp.take_along_axis(x_BxNx, index_BxK.reshape(*index_BxK.shape, *[1] * (x_BxNx.ndim - 2)), axis=1)


def _rooms(size: int) -> list[int]:
    """After how many tokens the loop leaves off. It is compiled for each that is reached."""
    rooms = [size]
    while rooms[0] > 32:
        rooms.insert(0, max(rooms[0] // 4, 32))
    return rooms


def begin(cache: Any, first_B: Array, rules: LogitsProcessors, *, beams: int, size: int) -> State:
    """A search for continuations of ``first_B``, the last token before them (int32 ``[B]``).

    ``cache`` holds B rows and everything before ``first_B``; it needs no room for more. No limit of the ``rules`` is
    above ``size``.
    """
    batch = first_B.shape[0]
    tokens_BxKxN = jnp.broadcast_to(rules.eos_E[0], (batch, beams, size)).astype(jnp.int32)
    no_score_BxK = jnp.full((batch, beams), -jnp.inf)
    return State(
        step=jnp.int32(0),
        cache=cache.fork(beams),
        last_BxK=jnp.broadcast_to(first_B[:, None], (batch, beams)),
        tokens_BxKxN=tokens_BxKxN,
        logp_BxK=no_score_BxK.at[:, 0].set(0.0),  # the beams are still one
        finished=Hypotheses(tokens_BxKxN, jnp.zeros((batch, beams), jnp.int32), no_score_BxK),
        open_B=rules.limit_B > 0,
        room=0,
    )


def advance(decode: Decode, state: State, rules: LogitsProcessors, stopping: Stopping, *, room: int) -> State:
    """The search after ``room`` tokens, or when all sentences are closed; call it inside ``jit``.

    ``decode(tokens_RxT, cache) -> (logits_RxTxV, cache)``, and ``fork(beams)``, ``grow(slots)``, ``take(rows_B)`` and
    ``reorder(beams_BxK)`` of a cache are the decoding protocol of ``jaxlm.nn``. A single beam is greedy search: rules
    change its logits, not its log-probabilities.
    """
    (batch, beams), limit_B = state.last_BxK.shape, rules.limit_B
    candidates = max(2, 1 + len(rules.eos_E)) * beams  # so that enough are left where many end

    def scaled(logp, length):
        return logp / jnp.asarray(length, jnp.float32) ** stopping.length_penalty

    def best(logits_RxV: Array, s: State, n: int) -> tuple[Array, Array]:
        """The ``n`` best next tokens of each beam: log-probabilities and ids, ``[R, n]`` each."""
        if not rules.active:
            values_Rxn, token_Rxn = top_k(logits_RxV, n)
            return values_Rxn - jax.nn.logsumexp(logits_RxV, axis=-1, keepdims=True), token_Rxn
        scores_RxV = logits_RxV if beams == 1 else log_softmax(logits_RxV)
        apply = jax.vmap(lambda scores_BxV, tokens_BxN: rules.apply(scores_BxV, tokens_BxN, s.step), 1, 1)
        scores_BxKxV = apply(scores_RxV.reshape(batch, beams, -1), s.tokens_BxKxN)
        scores_RxV = scores_BxKxV.reshape(batch * beams, -1)
        return top_k(log_softmax(scores_RxV) if beams == 1 else scores_RxV, n)

    def body(s: State) -> State:
        logits_Rx1xV, cache = decode(s.last_BxK.reshape(-1, 1), s.cache)
        logits_RxV = logits_Rx1xV[:, -1].astype(jnp.float32)

        # The C best continuations of a sentence are among the C best of each of its beams.
        n = min(candidates, logits_RxV.shape[-1])
        logp_Rxn, token_Rxn = best(logits_RxV, s, n)
        logp_BxP = (logp_Rxn.reshape(batch, beams, n) + s.logp_BxK[:, :, None]).reshape(batch, beams * n)
        logp_BxC, index_BxC = lax.top_k(logp_BxP, min(candidates, beams * n))
        beam_BxC = index_BxC // n
        token_BxC = _take(token_Rxn.reshape(batch, beams * n), index_BxC)
        tokens_BxCxN = _take(s.tokens_BxKxN, beam_BxC)
        tokens_BxCxN = lax.dynamic_update_slice_in_dim(tokens_BxCxN, token_BxC[:, :, None], s.step, axis=2)
        length = s.step + 1
        ends_BxC = rules.ends(token_BxC) | (length >= limit_B)[:, None]

        counts_BxC = ends_BxC & (jnp.arange(ends_BxC.shape[1]) < beams) & s.open_B[:, None]
        pool_BxP = jnp.concatenate(
            [s.finished.score, jnp.where(counts_BxC, scaled(logp_BxC, length), -jnp.inf)], axis=1
        )
        score_BxK, kept_BxK = lax.top_k(pool_BxP, beams)
        length_BxP = jnp.concatenate([s.finished.length, jnp.full_like(token_BxC, length)], axis=1)
        finished = Hypotheses(
            tokens=_take(jnp.concatenate([s.finished.tokens, tokens_BxCxN], axis=1), kept_BxK),
            length=jnp.where(score_BxK > -jnp.inf, _take(length_BxP, kept_BxK), 0),
            score=score_BxK,
        )

        logp_BxK, live_BxK = lax.top_k(jnp.where(ends_BxC, -jnp.inf, logp_BxC), beams)
        longest_B = jnp.where(jnp.asarray(stopping.exact) & (stopping.length_penalty > 0), limit_B, length)
        worst_B = score_BxK[:, -1]
        hopeful_B = (scaled(logp_BxK[:, 0], longest_B) > worst_B) & ~(stopping.full & (worst_B > -jnp.inf))
        return replace(
            s,
            step=length,
            cache=cache.reorder(_take(beam_BxC, live_BxK)),
            last_BxK=_take(token_BxC, live_BxK),
            tokens_BxKxN=_take(tokens_BxCxN, live_BxK),
            logp_BxK=logp_BxK,
            finished=finished,
            open_B=s.open_B & hopeful_B,
        )

    state = replace(state, cache=state.cache.grow(room - state.room), room=room)
    return lax.while_loop(lambda s: s.open_B.any() & (s.step < room), body, state)


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_seq2seq(
    graphdef, params, src_BxS: Array, first_B: Array, rules: LogitsProcessors, stopping: Stopping, *, beams: int, size: int
) -> State:
    """Translations of padded sources (each ending with the end token) that begin after the tokens ``first``, as far as
    the first room goes: ``finish`` has the rest."""
    model = nnx.merge(graphdef, params)
    mask_BxS = (src_BxS != model.config.pad_id).at[:, 0].set(True)  # a row of padding still needs something to read
    cache = model.init_cache(model.encode(src_BxS, mask_BxS), mask_BxS, 0)
    state = begin(cache, first_B, rules, beams=beams, size=size)
    return advance(model.decode, state, rules, stopping, room=_rooms(size)[0])


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_decoder(
    graphdef, params, prompts_BxP: Array, start_B: Array, rules: LogitsProcessors, stopping: Stopping, *, beams: int, size: int
) -> State:
    """Continuations of left-padded prompts with ``start_B`` slots of padding each, as far as the first room goes."""
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(prompts_BxP.shape[0], prompts_BxP.shape[1] - 1).replace(start=start_B)
    _, cache = model.decode(prompts_BxP[:, :-1], cache)
    state = begin(cache, prompts_BxP[:, -1], rules, beams=beams, size=size)
    return advance(model.decode, state, rules, stopping, room=_rooms(size)[0])


@partial(jax.jit, static_argnames=("graphdef", "room"))
def _go_on(graphdef, params, state: State, rows_B: Array, rules: LogitsProcessors, stopping: Stopping, *, room: int) -> State:
    model = nnx.merge(graphdef, params)
    return advance(model.decode, state.take(rows_B), rules, stopping, room=room)


def finish(graphdef, params, state: State, rules: LogitsProcessors, stopping: Stopping) -> Hypotheses:
    """What a search finds in the end, as NumPy arrays."""
    found = jax.tree.map(np.array, state.finished)
    batch, _, size = found.tokens.shape
    rows_B = np.arange(batch)
    for room in _rooms(size)[1:]:
        open_B = np.flatnonzero(np.asarray(state.open_B)[: len(rows_B)])
        if not len(open_B):
            break
        rows_B = rows_B[open_B]
        while batch % 4 == 0 and batch // 4 >= len(open_B):  # into few shapes
            batch //= 4
        again_B = np.resize(open_B, batch)
        rules = rules.take(again_B)
        state = _go_on(graphdef, params, state, again_B, rules, stopping, room=room)
        for all_B, new_B in zip(*map(jax.tree.leaves, (found, state.finished)), strict=True):
            all_B[rows_B] = np.asarray(new_B)[: len(rows_B)]
    return found
