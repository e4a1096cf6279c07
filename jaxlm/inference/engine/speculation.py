"""Speculative decoding (arXiv:2211.17192): a cheap draft guesses some tokens, the model reads them all at once and
keeps as many as it would have drawn itself.

The distribution of the text is the model's, exactly: a guess x that the draft made with probability q(x) is kept with
probability min(1, p(x) / q(x)), and the first that is not kept is drawn from what is left of p, max(p - q, 0). Greedy
is the case where both are certain.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxlm.inference.engine.programs import (
    Drawn,
    Rows,
    Settings,
    State,
    allowed_only,
    keys,
    logprobs,
    pinned,
    scores,
    write,
)
from jaxlm.inference.logits_processors import LogitsProcessors
from jaxlm.inference.sampling import greedy, restrict
from jaxlm.nn.attention.paged import PagedCache

_GUESS, _KEEP, _REST = 1, 2, 3  # what a token's key is split for; the key itself draws as without a draft


@partial(jax.jit, static_argnames=("graphdefs", "guesses"), donate_argnames=("state",))
def speculate(
    graphdefs, params, state: State, rows: Rows, settings: Settings, shared: LogitsProcessors, *, guesses: int
) -> tuple[State, Drawn]:
    """As ``programs.draw``, with up to ``guesses`` tokens more a row."""
    models = [nnx.merge(graphdef, each) for graphdef, each in zip(graphdefs, params, strict=True)]
    active_S, history_SxC = rows.length > 0, state.history_SxC

    def distribution(logits_SxV, history_SxC, number: Array | int, constrain: bool) -> Array:
        """Probabilities of the token ``number`` after the last."""
        scores_SxV = scores(logits_SxV.astype(jnp.float32), history_SxC, rows.length + number, settings, shared)
        return probabilities(allowed_only(scores_SxV, rows) if constrain else scores_SxV, settings)

    def guess(logits_SxV, history_SxC, number) -> tuple[Array, Array, Array]:
        q_SxV = distribution(logits_SxV, history_SxC, number, False)
        token_S = choose(q_SxV, split(keys(settings, rows.length + number), _GUESS))
        real_S = active_S & (number < rows.drafts)
        return q_SxV, token_S, write(history_SxC, rows.length + number, real_S, token_S)

    # The draft reads the last token, and the one before it where it guessed that itself and was right to the end.
    two_Sx2 = jnp.take_along_axis(history_SxC, jnp.maximum(rows.length[:, None] - jnp.array([2, 1]), 0), axis=1)
    drafting_S = active_S & (rows.drafts > 0)
    real_Sx2 = drafting_S[:, None] & jnp.stack([rows.behind, jnp.ones_like(rows.behind)], axis=1)
    logits_Sx2xV, cache = models[1].decode(two_Sx2, PagedCache(state.pools[1], rows.table, rows.length - 2, real_Sx2))
    q_SxV, guess_S, history_SxC = guess(logits_Sx2xV[:, 1], history_SxC, 0)

    def more(carry, number):
        pool, token_S, history_SxC = carry
        real_S = active_S & (number < rows.drafts)
        cache = PagedCache(pool, rows.table, rows.length + number - 1, real_S[:, None])
        logits_Sx1xV, cache = models[1].decode(token_S[:, None], cache)
        q_SxV, token_S, history_SxC = guess(logits_Sx1xV[:, 0], history_SxC, number)
        return (cache.pool, token_S, history_SxC), (q_SxV, token_S)

    carry = (cache.pool, guess_S, history_SxC)
    (draft_pool, _, history_SxC), (q_NxSxV, guess_NxS) = lax.scan(more, carry, jnp.arange(1, guesses))
    q_SxNxV = jnp.concatenate([q_SxV[None], q_NxSxV]).swapaxes(0, 1)
    guess_SxN = jnp.concatenate([guess_S[None], guess_NxS]).T

    # The model reads the last token and all guesses.
    slot_D = jnp.arange(guesses + 1)
    last_Sx1 = jnp.take_along_axis(state.history_SxC, jnp.maximum(rows.length - 1, 0)[:, None], axis=1)
    real_SxD = active_S[:, None] & (slot_D <= rows.drafts[:, None])
    cache = PagedCache(state.pools[0], rows.table, rows.length - 1, real_SxD)
    logits_SxDxV, cache = models[0].decode(jnp.concatenate([last_Sx1, guess_SxN], axis=1), cache)
    p_SxDxV = jax.vmap(lambda logits_SxV, number: distribution(logits_SxV, history_SxC, number, True), (1, 0), 1)(
        logits_SxDxV, slot_D
    )

    kept_S = _kept(p_SxDxV, q_SxNxV, guess_SxN, rows, settings)
    end_S = _after(kept_S, p_SxDxV, q_SxNxV, rows, settings)
    history_SxC = write(history_SxC, rows.length + kept_S, active_S, end_S)
    padded_SxD = jnp.pad(guess_SxN, ((0, 0), (0, 1)))
    tokens_SxD = jnp.where(slot_D < kept_S[:, None], padded_SxD, end_S[:, None])
    drawn = Drawn(tokens_SxD, jnp.where(active_S, kept_S + 1, 0), *logprobs(logits_SxDxV, tokens_SxD, settings))
    return pinned(State((cache.pool, draft_pool), history_SxC)), drawn


def probabilities(scores_SxV: Array, settings: Settings) -> Array:
    """Of each next token, as ``sampling.sample`` draws it: 1 for the likeliest where that is greedy."""
    sampling = settings.sampling
    certain_SxV = jax.nn.one_hot(greedy(scores_SxV), scores_SxV.shape[1])

    def spread(scores_SxV):
        drawn_SxV = jax.nn.softmax(restrict(scores_SxV, sampling), axis=-1)
        return jnp.where(sampling.temperature[:, None] > 0, drawn_SxV, certain_SxV)

    return lax.cond((sampling.temperature > 0).any(), spread, lambda _: certain_SxV, scores_SxV)


def split(keys_S: Array, part: int) -> Array:
    """Keys for a part of what happens to a token."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_S, part)


def choose(p_SxV: Array, keys_S: Array) -> Array:
    """A token of each row by its probabilities, which need not sum to 1: int32 ``[S]``."""
    return jax.vmap(jax.random.categorical)(keys_S, jnp.log(p_SxV)).astype(jnp.int32)


def _kept(p_SxDxV: Array, q_SxNxV: Array, guess_SxN: Array, rows: Rows, settings: Settings) -> Array:
    """How many guesses are kept, ``[S]``."""
    N = guess_SxN.shape[1]

    def of_guess(p_SxDxV):
        return jnp.take_along_axis(p_SxDxV, guess_SxN[:, :, None], axis=2)[:, :, 0]

    each = [jax.vmap(jax.random.uniform)(split(keys(settings, rows.length + i), _KEEP)) for i in range(N)]
    right_SxN = jnp.stack(each, axis=1) * of_guess(q_SxNxV) < of_guess(p_SxDxV[:, :N])
    right_SxN &= jnp.arange(N) < rows.drafts[:, None]
    return jnp.cumprod(right_SxN, axis=1).sum(1)


def _after(kept_S: Array, p_SxDxV: Array, q_SxNxV: Array, rows: Rows, settings: Settings) -> Array:
    """The token after those that are kept, ``[S]``."""
    padded_SxDxV = jnp.pad(q_SxNxV, ((0, 0), (0, 1), (0, 0)))
    p_SxV, q_SxV = (jnp.take_along_axis(x, kept_S[:, None, None], axis=1)[:, 0] for x in (p_SxDxV, padded_SxDxV))
    wrong_S = kept_S < rows.drafts  # a guess was refused, so what the draft would have said less often is left
    left_SxV = jnp.maximum(p_SxV - q_SxV, 0.0)
    wrong_S &= left_SxV.sum(-1) > 0  # else p and q differ by rounding alone
    key_S = keys(settings, rows.length + kept_S)
    left = choose(left_SxV, split(key_S, _REST))
    return jnp.where(wrong_S, left, choose(p_SxV, key_S))
