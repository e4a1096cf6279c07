"""Beam search, for translation and language models alike, as one compiled loop.

The rules are those of ``transformers`` (``early_stopping=False``), so scores and outputs agree with it: a hypothesis
scores its summed log-probability over ``length ** length_penalty``, its length counting the end token; of the ``2K``
best continuations those that end within the first ``K`` are kept as finished, the best ``K`` of the others go on;
a sentence is closed when its best live beam, ending here, could not beat the worst of ``K`` finished hypotheses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxlm.inference.sampling import top_k

Decode = Callable[[Array, Any], tuple[Array, Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hypotheses:
    """Up to K finished hypotheses a sentence, best first. A slot that was never filled scores -inf and has length 0."""

    tokens: Array  # [B, K, N] int32, the end token included
    length: Array  # [B, K] int32
    score: Array  # [B, K] float32


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


def search(
    decode: Decode,
    cache: Any,
    first_B: Array,
    *,
    beams: int,
    size: int,
    eos_id: int,
    limit_B: Array,
    length_penalty: Array | float = 1.0,
    exact: Array | bool = False,
) -> Hypotheses:
    """The best continuations of ``first_B`` (the last token before them, int32 ``[B]``); call it inside ``jit``.

    ``decode(tokens_RxT, cache) -> (logits_RxTxV, cache)``, ``cache.fork(beams)`` and ``cache.reorder(beams_BxK)`` are
    the decoding protocol of ``jaxlm.nn``; ``cache`` holds B rows and everything before ``first_B``. Sentence ``b`` gets
    at most ``limit_B[b] <= size`` new tokens. ``exact`` searches on until no continuation of any allowed length could
    win, where the rule above only asks about ending now (they differ for a positive length penalty).
    """
    batch = first_B.shape[0]

    def scaled(logp, length):
        return logp / jnp.asarray(length, jnp.float32) ** length_penalty

    def body(s: _State) -> _State:
        logits_Rx1xV, cache = decode(s.last_BxK.reshape(-1, 1), s.cache)
        logits_RxV = logits_Rx1xV[:, -1].astype(jnp.float32)
        vocab = logits_RxV.shape[-1]

        # The 2K best continuations of a sentence are among the 2K best of each of its beams.
        n = min(2 * beams, vocab)
        values_Rxn, token_Rxn = top_k(logits_RxV, n)
        logp_Rxn = values_Rxn - jax.nn.logsumexp(logits_RxV, axis=-1, keepdims=True)
        logp_BxC = (logp_Rxn.reshape(batch, beams, n) + s.logp_BxK[:, :, None]).reshape(batch, beams * n)
        logp_Bx2K, index_Bx2K = lax.top_k(logp_BxC, 2 * beams)
        beam_Bx2K = index_Bx2K // n
        token_Bx2K = _take(token_Rxn.reshape(batch, beams * n), index_Bx2K)
        tokens_Bx2KxN = _take(s.tokens_BxKxN, beam_Bx2K)
        tokens_Bx2KxN = lax.dynamic_update_slice_in_dim(tokens_Bx2KxN, token_Bx2K[:, :, None], s.step, axis=2)
        length = s.step + 1
        ends_Bx2K = (token_Bx2K == eos_id) | (length >= limit_B)[:, None]

        counts_Bx2K = ends_Bx2K & (jnp.arange(2 * beams) < beams) & s.open_B[:, None]
        pool_BxP = jnp.concatenate(
            [s.finished.score, jnp.where(counts_Bx2K, scaled(logp_Bx2K, length), -jnp.inf)], axis=1
        )
        score_BxK, kept_BxK = lax.top_k(pool_BxP, beams)
        length_BxP = jnp.concatenate([s.finished.length, jnp.full_like(token_Bx2K, length)], axis=1)
        finished = Hypotheses(
            tokens=_take(jnp.concatenate([s.finished.tokens, tokens_Bx2KxN], axis=1), kept_BxK),
            length=jnp.where(score_BxK > -jnp.inf, _take(length_BxP, kept_BxK), 0),
            score=score_BxK,
        )

        logp_BxK, live_BxK = lax.top_k(jnp.where(ends_Bx2K, -jnp.inf, logp_Bx2K), beams)
        longest_B = jnp.where(jnp.asarray(exact) & (jnp.asarray(length_penalty) > 0), limit_B, length)
        hopeful_B = scaled(logp_BxK[:, 0], longest_B) > score_BxK[:, -1]
        return _State(
            step=length,
            cache=cache.reorder(_take(beam_Bx2K, live_BxK)),
            last_BxK=_take(token_Bx2K, live_BxK),
            tokens_BxKxN=_take(tokens_Bx2KxN, live_BxK),
            logp_BxK=logp_BxK,
            finished=finished,
            open_B=s.open_B & hopeful_B,
        )

    tokens_BxKxN = jnp.full((batch, beams, size), eos_id, jnp.int32)
    no_score_BxK = jnp.full((batch, beams), -jnp.inf)
    start = _State(
        step=jnp.int32(0),
        cache=cache.fork(beams),
        last_BxK=jnp.broadcast_to(first_B[:, None], (batch, beams)),
        tokens_BxKxN=tokens_BxKxN,
        logp_BxK=no_score_BxK.at[:, 0].set(0.0),  # the beams are still one
        finished=Hypotheses(tokens_BxKxN, jnp.zeros((batch, beams), jnp.int32), no_score_BxK),
        open_B=limit_B > 0,
    )
    return lax.while_loop(lambda s: s.open_B.any(), body, start).finished


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_seq2seq(
    graphdef, params, src_BxS: Array, limit_B: Array, length_penalty: Array, exact: Array, *, beams: int, size: int
) -> Hypotheses:
    """Translations of padded sources (each ending with the end token); ``limit_B`` 0 marks a row of padding."""
    model = nnx.merge(graphdef, params)
    config = model.config
    mask_BxS = (src_BxS != config.pad_id).at[:, 0].set(True)  # a row of padding still needs something to attend to
    cache = model.init_cache(model.encode(src_BxS, mask_BxS), mask_BxS, size)
    first_B = jnp.full(src_BxS.shape[0], config.bos_id, jnp.int32)
    return search(
        model.decode, cache, first_B, beams=beams, size=size, eos_id=config.eos_id, limit_B=limit_B,
        length_penalty=length_penalty, exact=exact,
    )


@partial(jax.jit, static_argnames=("graphdef", "beams", "size"))
def search_decoder(
    graphdef, params, prompts_BxP: Array, start_B: Array, limit_B: Array, length_penalty: Array, exact: Array, *,
    beams: int, size: int,
) -> Hypotheses:
    """Continuations of left-padded prompts with ``start_B`` slots of padding each."""
    model = nnx.merge(graphdef, params)
    cache = model.init_cache(prompts_BxP.shape[0], prompts_BxP.shape[1] + size).replace(start=start_B)
    _, cache = model.decode(prompts_BxP[:, :-1], cache)
    return search(
        model.decode, cache, prompts_BxP[:, -1], beams=beams, size=size, eos_id=model.config.eos_id, limit_B=limit_B,
        length_penalty=length_penalty, exact=exact,
    )
