"""Beam search, for translation and language models alike, as one compiled loop.

The rules are those of ``transformers``, so scores and outputs agree with it: a hypothesis scores its summed
log-probability over ``length ** length_penalty``, its length counting the end token; of the ``2K`` best continuations
(more where several tokens end a text) those that end within the first ``K`` are kept as finished, the best ``K`` of the
others go on. When a sentence is closed is a ``Stopping``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxlm.checkpoint.generation_config import GenerationConfig
from jaxlm.inference.rules import Rules, log_softmax
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

    def ranked(self, rules: Rules) -> list[list[Hypothesis]]:
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

    def best(self, rules: Rules) -> list[list[int]]:
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
class _State:
    step: Array  # tokens generated so far
    cache: Any  # of B * K rows, sentence by sentence
    last_BxK: Array
    tokens_BxKxN: Array
    logp_BxK: Array
    finished: Hypotheses
    open_B: Array


def _take(x_BxNx: Array, index_BxK: Array) -> Array:
    """Rows of the second dimension."""
    return jnp.take_along_axis(x_BxNx, index_BxK.reshape(*index_BxK.shape, *[1] * (x_BxNx.ndim - 2)), axis=1)


def _rooms(size: int) -> list[int]:
    """After how many tokens the cache grows. Every step reads all of it, and most texts are far shorter than they may
    be; but the step is compiled for each."""
    rooms = [size]
    while rooms[0] > 48:
        rooms.insert(0, max(rooms[0] // 4, 32))
    return rooms


def search(
    decode: Decode, cache: Any, first_B: Array, *, rules: Rules, beams: int, size: int, stopping: Stopping = Stopping()
) -> Hypotheses:
    """The best continuations of ``first_B`` (the last token before them, int32 ``[B]``); call it inside ``jit``.

    ``decode(tokens_RxT, cache) -> (logits_RxTxV, cache)``, ``cache.fork(beams)``, ``cache.grow(slots)`` and
    ``cache.reorder(beams_BxK)`` are the decoding protocol of ``jaxlm.nn``; ``cache`` holds B rows and everything before
    ``first_B``, and needs no room for more. No limit of the ``rules`` is above ``size``. A single beam is greedy
    search: rules change its logits, not its log-probabilities.
    """
    batch, limit_B = first_B.shape[0], rules.limit_B
    candidates = max(2, 1 + len(rules.eos_E)) * beams  # so that enough are left where many end

    def scaled(logp, length):
        return logp / jnp.asarray(length, jnp.float32) ** stopping.length_penalty

    def best(logits_RxV: Array, s: _State, n: int) -> tuple[Array, Array]:
        """The ``n`` best next tokens of each beam: log-probabilities and ids, ``[R, n]`` each."""
        if not rules.active:
            values_Rxn, token_Rxn = top_k(logits_RxV, n)
            return values_Rxn - jax.nn.logsumexp(logits_RxV, axis=-1, keepdims=True), token_Rxn
        scores_RxV = logits_RxV if beams == 1 else log_softmax(logits_RxV)
        apply = jax.vmap(lambda scores_BxV, tokens_BxN: rules.apply(scores_BxV, tokens_BxN, s.step), 1, 1)
        scores_BxKxV = apply(scores_RxV.reshape(batch, beams, -1), s.tokens_BxKxN)
        scores_RxV = scores_BxKxV.reshape(batch * beams, -1)
        return top_k(log_softmax(scores_RxV) if beams == 1 else scores_RxV, n)

    def body(s: _State) -> _State:
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
        return _State(
            step=length,
            cache=cache.reorder(_take(beam_BxC, live_BxK)),
            last_BxK=_take(token_BxC, live_BxK),
            tokens_BxKxN=_take(tokens_BxCxN, live_BxK),
            logp_BxK=logp_BxK,
            finished=finished,
            open_B=s.open_B & hopeful_B,
        )

    tokens_BxKxN = jnp.broadcast_to(rules.eos_E[0], (batch, beams, size)).astype(jnp.int32)
    no_score_BxK = jnp.full((batch, beams), -jnp.inf)
    state = _State(
        step=jnp.int32(0),
        cache=cache.fork(beams),
        last_BxK=jnp.broadcast_to(first_B[:, None], (batch, beams)),
        tokens_BxKxN=tokens_BxKxN,
        logp_BxK=no_score_BxK.at[:, 0].set(0.0),  # the beams are still one
        finished=Hypotheses(tokens_BxKxN, jnp.zeros((batch, beams), jnp.int32), no_score_BxK),
        open_B=limit_B > 0,
    )
    for room, more in pairwise([0, *_rooms(size)]):
        state = replace(state, cache=state.cache.grow(more - room))
        state = lax.while_loop(lambda s, more=more: s.open_B.any() & (s.step < more), body, state)
    return state.finished


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_seq2seq(
    graphdef, params, src_BxS: Array, first_B: Array, rules: Rules, stopping: Stopping, *, beams: int, size: int
) -> Hypotheses:
    """Translations of padded sources (each ending with the end token) that begin after the tokens ``first``."""
    model = nnx.merge(graphdef, params)
    mask_BxS = (src_BxS != model.config.pad_id).at[:, 0].set(True)  # a row of padding still needs something to read
    cache = model.init_cache(model.encode(src_BxS, mask_BxS), mask_BxS, 0)
    return search(model.decode, cache, first_B, rules=rules, beams=beams, size=size, stopping=stopping)


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_decoder(
    graphdef, params, prompts_BxP: Array, start_B: Array, rules: Rules, stopping: Stopping, *, beams: int, size: int
) -> Hypotheses:
    """Continuations of left-padded prompts with ``start_B`` slots of padding each."""
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(prompts_BxP.shape[0], prompts_BxP.shape[1] - 1).replace(start=start_B)
    _, cache = model.decode(prompts_BxP[:, :-1], cache)
    return search(
        model.decode, cache, prompts_BxP[:, -1], rules=rules, beams=beams, size=size, stopping=stopping
    )
