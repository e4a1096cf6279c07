"""Beam search for translation and language models, as a compiled loop.

The rules are those of ``transformers``, so scores and outputs agree with it. A hypothesis scores its summed
log-probability divided by ``length ** length_penalty``; its length counts the end token. Of the ``2K`` best
continuations of a sentence (more where several tokens end a text), those that end a text and rank among the first ``K``
become finished hypotheses, and the best ``K`` of the others go on as beams. ``BeamScorer`` says when the search of a
sentence is over.

A step costs as much as there are sentences and cache slots, and most texts are far shorter than they may be. So the
loop stops after some tokens (``_cache_sizes``), and ``finish_search`` continues with the sentences that are still
active, alone, in a larger cache.
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

from jaxlm.core.tree import Params
from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.inference.logits_processors import LogitsProcessors, log_softmax
from jaxlm.inference.sampling import top_k

__all__ = [
    "BeamScorer", "BeamState", "Hypotheses", "Hypothesis", "finish_search", "init_search", "run_search",
    "search_decoder", "search_seq2seq",
]

Decode = Callable[[Array, Any], tuple[Array, Any]]  # (tokens [R, T], cache) -> (logits [R, T, V], cache)


class Hypothesis(NamedTuple):
    """A finished text, without its end token, and its score."""

    tokens: list[int]
    score: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """Up to K finished hypotheses of each sentence, best first. An empty place scores -inf and has length 0."""

    tokens: Array  # [B, K, N] int32, the end token included
    length: Array  # [B, K] int32
    score: Array  # [B, K] float32

    def ranked(self, processors: LogitsProcessors) -> list[list[Hypothesis]]:
        """The hypotheses of each sentence, best first. A sentence without any has an empty one that scores -inf."""
        eos, *arrays = (np.asarray(x) for x in (processors.eos_E, self.tokens, self.length, self.score))

        def read(tokens_N: np.ndarray, length: np.ndarray, score: np.ndarray) -> Hypothesis:
            tokens = tokens_N[:length].tolist()
            return Hypothesis(tokens[:-1] if tokens[-1] in eos else tokens, float(score))

        return [
            [read(*each) for each in zip(*sentence, strict=True) if each[1]] or [Hypothesis([], -math.inf)]
            for sentence in zip(*arrays, strict=True)
        ]

    def best(self, processors: LogitsProcessors) -> list[list[int]]:
        """The tokens of the best hypothesis of each sentence."""
        return [found[0].tokens for found in self.ranked(processors)]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamScorer:
    """How hypotheses are scored, and when the search of a sentence is over.

    By default it is over when the best beam, if it ended now, could not beat the worst of K finished hypotheses.
    """

    length_penalty: Array | float = 1.0
    exact: Array | bool = False  # over when no continuation of any allowed length could (early_stopping "never")
    early: Array | bool = False  # over as soon as there are K finished hypotheses (early_stopping True)

    @classmethod
    def of(cls, generation: GenerationConfig) -> BeamScorer:
        """The scorer that the settings ask for. A single beam is greedy search and is over at its first end token."""
        exact, early = generation.early_stopping == "never", generation.early_stopping is True
        early |= generation.num_beams in (None, 1)
        return cls(np.float32(generation.length_penalty), np.bool_(exact), np.bool_(early))

    def score(self, logp: Array, length: Array) -> Array:
        """The scores of hypotheses with these log-probabilities and lengths."""
        return logp / jnp.asarray(length, jnp.float32) ** self.length_penalty

    def may_improve(self, best_logp_B: Array, worst_B: Array, length: Array, limit_B: Array) -> Array:
        """Whether the search goes on: bool ``[B]``.

        Args:
            best_logp_B: the log-probability of the best beam.
            worst_B: the score of the worst of K finished hypotheses; -inf while there are fewer.
            length: tokens of the beams.
            limit_B: tokens that a text may have.
        """
        length_B = jnp.where(jnp.asarray(self.exact) & (self.length_penalty > 0), limit_B, length)
        return (self.score(best_logp_B, length_B) > worst_B) & ~(self.early & (worst_B > -jnp.inf))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BeamState:
    """An unfinished search over B sentences with K beams each."""

    step: Array  # tokens generated so far
    cache: Any  # of B * K rows, sentence by sentence
    last_BxK: Array  # the last token of each beam
    tokens_BxKxN: Array
    logp_BxK: Array
    finished: Hypotheses
    active_B: Array  # sentences whose search is not over
    capacity: int = field(metadata={"static": True})  # new tokens that the cache has slots for

    def select(self, rows_B: Array) -> BeamState:
        """The search over the given sentences only."""
        names = ("last_BxK", "tokens_BxKxN", "logp_BxK", "finished", "active_B")
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, cache=self.cache.take(rows_B), **jax.tree.map(lambda x: x[rows_B], arrays))


def _take(x_BxNx: Array, index_BxK: Array) -> Array:
    """Selects from the second dimension."""
    return jnp.take_along_axis(x_BxNx, index_BxK.reshape(*index_BxK.shape, *[1] * (x_BxNx.ndim - 2)), axis=1)


def _cache_sizes(size: int) -> list[int]:
    """The numbers of tokens after which the loop stops; it is compiled for each of them that a search reaches."""
    sizes = [size]
    while sizes[0] > 32:
        sizes.insert(0, max(sizes[0] // 4, 32))
    return sizes


def init_search(cache: Any, first_B: Array, processors: LogitsProcessors, *, beams: int, size: int) -> BeamState:
    """The start of a search for continuations of ``first_B``, the last token before them (int32 ``[B]``).

    Args:
        cache: B rows that hold everything before ``first_B``. It needs no free slots.
        first_B: int32, the token that each sentence continues.
        processors: of the B sentences.
        beams: K.
        size: N, tokens that a text may have; no ``max_new_tokens_B`` of the processors is above it.
    """
    batch = first_B.shape[0]
    tokens_BxKxN = jnp.broadcast_to(processors.eos_E[0], (batch, beams, size)).astype(jnp.int32)
    no_score_BxK = jnp.full((batch, beams), -jnp.inf)
    return BeamState(
        step=jnp.int32(0),
        cache=cache.fork(beams),
        last_BxK=jnp.broadcast_to(first_B[:, None], (batch, beams)),
        tokens_BxKxN=tokens_BxKxN,
        logp_BxK=no_score_BxK.at[:, 0].set(0.0),  # at first all beams are the same one
        finished=Hypotheses(tokens_BxKxN, jnp.zeros((batch, beams), jnp.int32), no_score_BxK),
        active_B=processors.max_new_tokens_B > 0,
        capacity=0,
    )


def run_search(
    decode: Decode, state: BeamState, processors: LogitsProcessors, scorer: BeamScorer, *, capacity: int
) -> BeamState:
    """The search after ``capacity`` tokens, or when it is over for all sentences. Call it inside ``jit``.

    ``decode``, and ``fork(beams)``, ``grow(slots)``, ``take(rows_B)`` and ``reorder(beams_BxK)`` of the cache,
    are the decoding protocol of ``jaxlm.nn``. A single beam is greedy search: then the processors change logits, as
    in greedy search of transformers, and not log-probabilities.
    """
    state = replace(state, cache=state.cache.grow(capacity - state.capacity), capacity=capacity)
    step = partial(_step, decode, processors, scorer)
    return lax.while_loop(lambda s: s.active_B.any() & (s.step < capacity), step, state)


class _Candidates(NamedTuple):
    """The C best continuations of each sentence by one token, best first."""

    logp_BxC: Array
    beam_BxC: Array  # the beam that each continues
    token_BxC: Array
    tokens_BxCxN: Array  # the text with the new token

    @classmethod
    def of(cls, logits_RxV: Array, s: BeamState, processors: LogitsProcessors) -> _Candidates:
        batch, beams = s.last_BxK.shape
        count = max(2, 1 + len(processors.eos_E)) * beams  # so that K are left however many end a text
        n = min(count, logits_RxV.shape[-1])  # the C best of a sentence are among the C best of each of its beams
        logp_Rxn, token_Rxn = _best_tokens(logits_RxV, s, processors, n)
        logp_BxP = (logp_Rxn.reshape(batch, beams, n) + s.logp_BxK[:, :, None]).reshape(batch, beams * n)
        logp_BxC, index_BxC = lax.top_k(logp_BxP, min(count, beams * n))
        beam_BxC = index_BxC // n
        token_BxC = _take(token_Rxn.reshape(batch, beams * n), index_BxC)
        tokens_BxCxN = _take(s.tokens_BxKxN, beam_BxC)
        tokens_BxCxN = lax.dynamic_update_slice_in_dim(tokens_BxCxN, token_BxC[:, :, None], s.step, axis=2)
        return cls(logp_BxC, beam_BxC, token_BxC, tokens_BxCxN)


def _best_tokens(logits_RxV: Array, s: BeamState, processors: LogitsProcessors, n: int) -> tuple[Array, Array]:
    """The ``n`` best next tokens of each beam: log-probabilities and ids, ``[R, n]`` each."""
    batch, beams = s.last_BxK.shape
    if not processors.active:
        values_Rxn, token_Rxn = top_k(logits_RxV, n)
        return values_Rxn - jax.nn.logsumexp(logits_RxV, axis=-1, keepdims=True), token_Rxn
    scores_RxV = logits_RxV if beams == 1 else log_softmax(logits_RxV)
    apply = jax.vmap(lambda scores_BxV, tokens_BxN: processors.apply(scores_BxV, tokens_BxN, s.step), 1, 1)
    scores_BxKxV = apply(scores_RxV.reshape(batch, beams, -1), s.tokens_BxKxN)
    scores_RxV = scores_BxKxV.reshape(batch * beams, -1)
    return top_k(log_softmax(scores_RxV) if beams == 1 else scores_RxV, n)


def _with_ended(s: BeamState, new: _Candidates, ended_BxC: Array, length: Array, scorer: BeamScorer) -> Hypotheses:
    """The best K of the finished hypotheses and of the candidates that end a text and rank among the first K."""
    beams = s.last_BxK.shape[1]
    counted_BxC = ended_BxC & (jnp.arange(ended_BxC.shape[1]) < beams) & s.active_B[:, None]
    new_score_BxC = jnp.where(counted_BxC, scorer.score(new.logp_BxC, length), -jnp.inf)
    score_BxK, kept_BxK = lax.top_k(jnp.concatenate([s.finished.score, new_score_BxC], axis=1), beams)
    length_BxP = jnp.concatenate([s.finished.length, jnp.full_like(new.token_BxC, length)], axis=1)
    return Hypotheses(
        tokens=_take(jnp.concatenate([s.finished.tokens, new.tokens_BxCxN], axis=1), kept_BxK),
        length=jnp.where(score_BxK > -jnp.inf, _take(length_BxP, kept_BxK), 0),
        score=score_BxK,
    )


def _step(decode: Decode, processors: LogitsProcessors, scorer: BeamScorer, s: BeamState) -> BeamState:
    """The search with one more token."""
    logits_Rx1xV, cache = decode(s.last_BxK.reshape(-1, 1), s.cache)
    new = _Candidates.of(logits_Rx1xV[:, -1].astype(jnp.float32), s, processors)
    length, limit_B = s.step + 1, processors.max_new_tokens_B
    ended_BxC = processors.is_eos(new.token_BxC) | (length >= limit_B)[:, None]
    finished = _with_ended(s, new, ended_BxC, length, scorer)
    logp_BxK, live_BxK = lax.top_k(jnp.where(ended_BxC, -jnp.inf, new.logp_BxC), s.last_BxK.shape[1])
    return replace(
        s,
        step=length,
        cache=cache.reorder(_take(new.beam_BxC, live_BxK)),
        last_BxK=_take(new.token_BxC, live_BxK),
        tokens_BxKxN=_take(new.tokens_BxCxN, live_BxK),
        logp_BxK=logp_BxK,
        finished=finished,
        active_B=s.active_B & scorer.may_improve(logp_BxK[:, 0], finished.score[:, -1], length, limit_B),
    )


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_seq2seq(
    graphdef: nnx.GraphDef, params: Params, src_BxS: Array, first_B: Array, processors: LogitsProcessors,
    scorer: BeamScorer, *, beams: int, size: int,
) -> BeamState:
    """A search for translations, up to the first cache size; ``finish_search`` does the rest.

    Args:
        src_BxS: int32, padded sources, each with its end token.
        first_B: int32, the token that the decoder starts from.
        size: tokens that a translation may have.
    """
    model = nnx.merge(graphdef, params)
    mask_BxS = (src_BxS != model.config.pad_id).at[:, 0].set(True)  # a row of padding still needs something to read
    cache = model.init_cache(model.encode(src_BxS, mask_BxS), mask_BxS, 0)
    state = init_search(cache, first_B, processors, beams=beams, size=size)
    return run_search(model.decode, state, processors, scorer, capacity=_cache_sizes(size)[0])


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_decoder(
    graphdef: nnx.GraphDef, params: Params, prompts_BxP: Array, start_B: Array, processors: LogitsProcessors,
    scorer: BeamScorer, *, beams: int, size: int,
) -> BeamState:
    """A search for continuations, up to the first cache size; ``finish_search`` does the rest.

    Args:
        prompts_BxP: int32, right-aligned prompts.
        start_B: int32, the column in which each prompt begins.
        size: tokens that a continuation may have.
    """
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(prompts_BxP.shape[0], prompts_BxP.shape[1] - 1).replace(start=start_B)
    _, cache = model.decode(prompts_BxP[:, :-1], cache)
    state = init_search(cache, prompts_BxP[:, -1], processors, beams=beams, size=size)
    return run_search(model.decode, state, processors, scorer, capacity=_cache_sizes(size)[0])


@partial(jax.jit, static_argnames=("graphdef", "capacity"))
def _continue_search(
    graphdef: nnx.GraphDef, params: Params, state: BeamState, rows_B: Array, processors: LogitsProcessors,
    scorer: BeamScorer, *, capacity: int,
) -> BeamState:
    model = nnx.merge(graphdef, params)
    return run_search(model.decode, state.select(rows_B), processors, scorer, capacity=capacity)


def finish_search(
    graphdef: nnx.GraphDef, params: Params, state: BeamState, processors: LogitsProcessors, scorer: BeamScorer
) -> Hypotheses:
    """Runs a search to its end; the result holds NumPy arrays."""
    found = jax.tree.map(np.array, state.finished)
    batch, _, size = found.tokens.shape
    rows_B = np.arange(batch)
    for capacity in _cache_sizes(size)[1:]:
        active_B = np.flatnonzero(np.asarray(state.active_B)[: len(rows_B)])
        if not len(active_B):
            break
        rows_B = rows_B[active_B]
        while batch % 4 == 0 and batch // 4 >= len(active_B):  # few shapes, so that few programs are compiled
            batch //= 4
        repeated_B = np.resize(active_B, batch)
        processors = processors.select(repeated_B)
        state = _continue_search(graphdef, params, state, repeated_B, processors, scorer, capacity=capacity)
        for all_B, new_B in zip(*map(jax.tree.leaves, (found, state.finished)), strict=True):
            all_B[rows_B] = np.asarray(new_B)[: len(rows_B)]
    return found
