"""Speculative decoding (arXiv:2211.17192): a cheap draft model proposes tokens, and the model verifies them at once.

The distribution of the text is exactly the model's. A token x that the draft proposed with probability q(x) is accepted
with probability min(1, p(x) / q(x)); the first that is rejected is replaced by a sample from the residual distribution,
max(p - q, 0). Greedy decoding is the case in which both p and q are 0 or 1.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxlm.inference.engine.programs import (
    AllParams,
    DecodeInput,
    DecodeOutput,
    EngineState,
    GraphDefs,
    SlotSettings,
    append_tokens,
    apply_constraints,
    constrain_state,
    process_logits,
    token_keys,
    token_logprobs,
)
from jaxlm.inference.logits_processors import LogitsProcessors
from jaxlm.inference.sampling import filter_logits, greedy
from jaxlm.nn.attention.paged import PagedCache, PagePool

_PROPOSE, _ACCEPT, _RESAMPLE = 1, 2, 3  # purposes of a token's key; without a draft the key itself is used


class _Proposal(NamedTuple):
    """The N tokens that the draft proposes for each slot."""

    pool: PagePool  # of the draft
    history_SxC: Array  # with the proposed tokens
    token_SxN: Array
    q_SxNxV: Array  # the draft's distributions


@partial(jax.jit, static_argnames=("graphdefs", "num_draft_tokens"), donate_argnames=("state",))
def speculative_decode_step(
    graphdefs: GraphDefs, params: AllParams, state: EngineState, inputs: DecodeInput, settings: SlotSettings,
    processors: LogitsProcessors, *, num_draft_tokens: int,
) -> tuple[EngineState, DecodeOutput]:
    """As ``programs.decode_step``, with up to ``num_draft_tokens`` tokens more in each row."""
    model, draft = (nnx.merge(graphdef, each) for graphdef, each in zip(graphdefs, params, strict=True))
    active_S = inputs.length > 0
    distribution = partial(_distribution, inputs=inputs, settings=settings, processors=processors)
    proposal = _propose(draft, state, inputs, settings, distribution, num_draft_tokens)

    # The model reads the last token and all proposed ones.
    position_D = jnp.arange(num_draft_tokens + 1)
    last_Sx1 = jnp.take_along_axis(state.history_SxC, jnp.maximum(inputs.length - 1, 0)[:, None], axis=1)
    real_SxD = active_S[:, None] & (position_D <= inputs.num_draft_tokens[:, None])
    cache = PagedCache(state.pools[0], inputs.page_table, inputs.length - 1, real_SxD, inputs.length)
    logits_SxDxV, cache = model.decode(jnp.concatenate([last_Sx1, proposal.token_SxN], axis=1), cache)
    p_SxDxV = jax.vmap(
        lambda logits_SxV, position: distribution(logits_SxV, proposal.history_SxC, position, constrained=True),
        (1, 0), 1,
    )(logits_SxDxV, position_D)

    accepted_S = _count_accepted(p_SxDxV, proposal, inputs, settings)
    last_S = _last_token(accepted_S, p_SxDxV, proposal.q_SxNxV, inputs, settings)
    history_SxC = append_tokens(proposal.history_SxC, inputs.length + accepted_S, active_S, last_S)
    padded_SxD = jnp.pad(proposal.token_SxN, ((0, 0), (0, 1)))
    tokens_SxD = jnp.where(position_D < accepted_S[:, None], padded_SxD, last_S[:, None])
    count_S = jnp.where(active_S, accepted_S + 1, 0)
    output = DecodeOutput(tokens_SxD, count_S, *token_logprobs(logits_SxDxV, tokens_SxD, settings))
    return constrain_state(EngineState((cache.pool, proposal.pool), history_SxC)), output


def _propose(
    draft, state: EngineState, inputs: DecodeInput, settings: SlotSettings, distribution, num_draft_tokens: int
) -> _Proposal:
    """Decodes ``num_draft_tokens`` with the draft."""
    drafting_S = (inputs.length > 0) & (inputs.num_draft_tokens > 0)

    def propose(logits_SxV: Array, history_SxC: Array, position: Array | int) -> tuple[Array, Array, Array]:
        q_SxV = distribution(logits_SxV, history_SxC, position, constrained=False)
        token_S = _sample(q_SxV, _split(token_keys(settings, inputs.length + position), _PROPOSE))
        real_S = drafting_S & (position < inputs.num_draft_tokens)
        return q_SxV, token_S, append_tokens(history_SxC, inputs.length + position, real_S, token_S)

    def step(carry: tuple[PagePool, Array, Array], position: Array):
        pool, token_S, history_SxC = carry
        real_S = drafting_S & (position < inputs.num_draft_tokens)
        cache = PagedCache(pool, inputs.page_table, inputs.length + position - 1, real_S[:, None], inputs.length)
        logits_Sx1xV, cache = draft.decode(token_S[:, None], cache)
        q_SxV, token_S, history_SxC = propose(logits_Sx1xV[:, 0], history_SxC, position)
        return (cache.pool, token_S, history_SxC), (q_SxV, token_S)

    # The draft reads the last token. If all that it proposed before was accepted, it has not read the token before yet.
    two_Sx2 = jnp.maximum(inputs.length[:, None] - jnp.array([2, 1]), 0)
    two_Sx2 = jnp.take_along_axis(state.history_SxC, two_Sx2, axis=1)
    real_Sx2 = drafting_S[:, None] & jnp.stack([inputs.draft_lags, jnp.ones_like(inputs.draft_lags)], axis=1)
    cache = PagedCache(state.pools[1], inputs.page_table, inputs.length - 2, real_Sx2, inputs.length)
    logits_Sx2xV, cache = draft.decode(two_Sx2, cache)
    q_SxV, token_S, history_SxC = propose(logits_Sx2xV[:, 1], state.history_SxC, 0)

    carry = (cache.pool, token_S, history_SxC)
    (pool, _, history_SxC), (q_NxSxV, token_NxS) = lax.scan(step, carry, jnp.arange(1, num_draft_tokens))
    return _Proposal(
        pool, history_SxC, jnp.concatenate([token_S[None], token_NxS]).T,
        jnp.concatenate([q_SxV[None], q_NxSxV]).swapaxes(0, 1),
    )


def _distribution(
    logits_SxV: Array, history_SxC: Array, position: Array | int, *, constrained: bool, inputs: DecodeInput,
    settings: SlotSettings, processors: LogitsProcessors,
) -> Array:
    """The probabilities of the new token at ``position`` of this step, by a model's logits: ``[S, V]``."""
    length_S = inputs.length + position
    scores_SxV = process_logits(logits_SxV.astype(jnp.float32), history_SxC, length_S, settings, processors)
    return _probabilities(apply_constraints(scores_SxV, inputs) if constrained else scores_SxV, settings)


def _probabilities(scores_SxV: Array, settings: SlotSettings) -> Array:
    """The distribution from which ``sampling.sample`` draws: in greedy rows, 1 for the likeliest token."""
    sampling = settings.sampling
    greedy_SxV = jax.nn.one_hot(greedy(scores_SxV), scores_SxV.shape[1])

    def mixed(scores_SxV: Array) -> Array:
        sampled_SxV = jax.nn.softmax(filter_logits(scores_SxV, sampling), axis=-1)
        return jnp.where(sampling.temperature[:, None] > 0, sampled_SxV, greedy_SxV)

    return lax.cond((sampling.temperature > 0).any(), mixed, lambda _: greedy_SxV, scores_SxV)


def _split(keys_S: Array, purpose: int) -> Array:
    """Keys for one of the purposes that a token needs random numbers for."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys_S, purpose)


def _sample(p_SxV: Array, keys_S: Array) -> Array:
    """A token for each row by its probabilities, which need not sum to 1: int32 ``[S]``."""
    return jax.vmap(jax.random.categorical)(keys_S, jnp.log(p_SxV)).astype(jnp.int32)


def _count_accepted(p_SxDxV: Array, proposal: _Proposal, inputs: DecodeInput, settings: SlotSettings) -> Array:
    """How many of the proposed tokens are accepted: ``[S]``."""
    N = proposal.token_SxN.shape[1]

    def of_token(p_SxNxV: Array) -> Array:
        return jnp.take_along_axis(p_SxNxV, proposal.token_SxN[:, :, None], axis=2)[:, :, 0]

    keys = [_split(token_keys(settings, inputs.length + i), _ACCEPT) for i in range(N)]
    uniform_SxN = jnp.stack([jax.vmap(jax.random.uniform)(keys_S) for keys_S in keys], axis=1)
    accepted_SxN = uniform_SxN * of_token(proposal.q_SxNxV) < of_token(p_SxDxV[:, :N])
    accepted_SxN &= jnp.arange(N) < inputs.num_draft_tokens[:, None]
    return jnp.cumprod(accepted_SxN, axis=1).sum(1)


def _last_token(
    accepted_S: Array, p_SxDxV: Array, q_SxNxV: Array, inputs: DecodeInput, settings: SlotSettings
) -> Array:
    """The token after the accepted ones: ``[S]``."""
    padded_SxDxV = jnp.pad(q_SxNxV, ((0, 0), (0, 1), (0, 0)))
    p_SxV, q_SxV = (jnp.take_along_axis(x, accepted_S[:, None, None], axis=1)[:, 0] for x in (p_SxDxV, padded_SxDxV))
    residual_SxV = jnp.maximum(p_SxV - q_SxV, 0.0)
    rejected_S = accepted_S < inputs.num_draft_tokens
    rejected_S &= residual_SxV.sum(-1) > 0  # if it is 0, p and q differ by rounding alone
    keys_S = token_keys(settings, inputs.length + accepted_S)
    replacement_S = _sample(residual_SxV, _split(keys_S, _RESAMPLE))
    return jnp.where(rejected_S, replacement_S, _sample(p_SxV, keys_S))
