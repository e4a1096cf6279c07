"""A model that is a table of logits, and a reference beam search over it with Python lists."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

STATES = 211


def successor(state, token):
    return (state * 31 + token + 1) % STATES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class History:
    """The cache: a digest of all tokens so far, and the sentence of each row."""

    state: jax.Array  # [R]
    sentence: jax.Array  # [R]

    def fork(self, beams):
        return History(jnp.repeat(self.state, beams), jnp.repeat(self.sentence, beams))

    def grow(self, count):
        return self

    def reorder(self, beams_BxK):
        state_BxK = self.state.reshape(beams_BxK.shape)
        return replace(self, state=jnp.take_along_axis(state_BxK, beams_BxK, axis=1).reshape(-1))


def decode(table_BxSxV, tokens_RxT, cache: History):
    """The decoding protocol of ``jaxlm.nn``; the table holds the logits of each sentence and digest."""
    state = cache.state
    for t in range(tokens_RxT.shape[1]):
        state = successor(state, tokens_RxT[:, t])
    return table_BxSxV[cache.sentence, state][:, None], replace(cache, state=state)


def empty(sentences: int) -> History:
    return History(jnp.zeros(sentences, jnp.int32), jnp.arange(sentences))


def table(sentences: int, vocab: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=1.5, size=(sentences, STATES, vocab)).astype(np.float32)


def logp(table_SxV: np.ndarray, tokens) -> np.ndarray:
    """Log-probabilities of the token after ``tokens``, float64."""
    state = 0
    for token in tokens:
        state = successor(state, token)
    logits = table_SxV[state].astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


def total(table_SxV: np.ndarray, first: int, tokens) -> float:
    return sum(logp(table_SxV, (first, *tokens[:i]))[token] for i, token in enumerate(tokens))


def all_hypotheses(vocab: int, limit: int, eos: int):
    """Everything a search may return: ended by ``eos`` within ``limit`` tokens, or cut at ``limit``."""
    others = [token for token in range(vocab) if token != eos]
    for length in range(1, limit + 1):
        for head in product(others, repeat=length - 1):
            yield (*head, eos)
    yield from product(others, repeat=limit)


def beam_search_by_hand(table_SxV: np.ndarray, first: int, *, beams, limit, eos, alpha, exact):
    """The rules of ``jaxlm.inference.beam`` with Python lists and float64: [(score, tokens)], best first."""
    live: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, limit + 1):
        candidates = [
            (score + more, (*tokens, token))
            for score, tokens in live
            for token, more in enumerate(logp(table_SxV, (first, *tokens)))
        ]
        candidates = sorted(candidates, reverse=True)[: 2 * beams]
        ends = [tokens[-1] == eos or length == limit for _, tokens in candidates]
        done += [(s / length**alpha, t) for (s, t), end in zip(candidates[:beams], ends, strict=False) if end]
        done = sorted(done, reverse=True)[:beams]
        live = [candidate for candidate, end in zip(candidates, ends, strict=True) if not end][:beams]
        longest = limit if exact and alpha > 0 else length
        if not live or (len(done) == beams and live[0][0] / longest**alpha <= done[-1][0]):
            break
    return done
