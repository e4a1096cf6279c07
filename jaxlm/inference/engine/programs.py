"""The compiled programs of an engine: prefill of prompts, and decoding of one more token for every slot.

The rows of a batch are the slots of the engine. Their number is fixed, and what they hold is data. So each function
compiles once (``prefill`` once for each size of its chunk), whatever requests come.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from jaxlm.core.sharding import constrain
from jaxlm.core.tree import Params
from jaxlm.inference.engine.requests import MAX_LOGPROBS
from jaxlm.inference.logits_processors import LogitsProcessors
from jaxlm.inference.sampling import Sampling, sample, token_key, top_k
from jaxlm.nn.attention.paged import PagedCache, PagePool

GraphDefs, AllParams = tuple[nnx.GraphDef, ...], tuple[Params, ...]  # of the model, and of its draft if it has one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class EngineState:
    """What stays on the devices. Every program takes a state and returns its successor in the same memory."""

    pools: tuple[PagePool, ...]  # of the model, and of its draft; a page has the same number in both
    history_SxC: Array  # int32: the tokens of each slot's sequence


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotSettings:
    """How the sequence in each slot chooses its tokens. It changes when a slot gets another sequence."""

    sampling: Sampling
    seed: Array  # uint32 [S]
    row_ids: Array  # uint32 [S, 2]: see ``sampling.token_key``
    prompt_length: Array  # int32 [S]
    max_new_tokens: Array  # int32 [S]
    min_new_tokens: Array  # int32 [S]: tokens before an end token may come
    forced_first: Array  # int32 [S]: the first new token, or -1
    repetition_penalty: Array  # float32 [S]
    presence_penalty: Array  # float32 [S]
    frequency_penalty: Array  # float32 [S]
    bias_tokens: Array  # int32 [S, N]: tokens whose logits get a bias; V where there is none
    bias_values: Array  # float32 [S, N]
    needs_logprobs: Array  # bool [S]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeInput:
    """What the slots hold in this step."""

    page_table: Array  # int32 [S, P]: the pages of each sequence; 0 where it has none
    length: Array  # int32 [S]: tokens of the sequence, the last one to be read now; 0: the slot does not decode
    constrained: Array  # bool [S]
    allowed: Array  # int32 [S, V / 32]: a bit for each token that the constraint allows
    num_draft_tokens: Array  # int32 [S]: tokens that the draft may propose
    draft_lags: Array  # bool [S]: whether the draft has yet to read the token before the last


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeOutput:
    """The new tokens of each slot: the first ``count`` of D."""

    tokens: Array  # int32 [S, D]
    count: Array  # int32 [S]
    logprob: Array  # float32 [S, D]; this and the next two are zero if no slot needs them
    top_logprobs: Array  # float32 [S, D, N]
    top_tokens: Array  # int32 [S, D, N]


def constrain_state(state: EngineState) -> EngineState:
    """Splits the pools over devices by key/value heads, as the projections that make keys and values are split."""

    def split(pool: Array) -> Array:
        return constrain(pool, (None, None, None, "kv_heads", None)[: pool.ndim])

    return EngineState(jax.tree.map(split, state.pools), constrain(state.history_SxC, (None, None)))


@partial(jax.jit, static_argnames=("graphdefs", "slots", "context", "num_pages", "page_size"))
def init_state(
    graphdefs: GraphDefs, params: AllParams, *, slots: int, context: int, num_pages: int, page_size: int
) -> EngineState:
    """Empty pools and empty slots."""
    pools = tuple(
        nnx.merge(graphdef, each).init_pages(num_pages, page_size)
        for graphdef, each in zip(graphdefs, params, strict=True)
    )
    return constrain_state(EngineState(pools, jnp.zeros((slots, context), jnp.int32)))


@partial(jax.jit, donate_argnames=("state",))
def assign_slot(state: EngineState, slot: Array, tokens_C: Array) -> EngineState:
    """Puts the tokens of a sequence into a slot."""
    return constrain_state(dataclasses.replace(state, history_SxC=state.history_SxC.at[slot].set(tokens_C)))


@partial(jax.jit, static_argnames=("graphdefs",), donate_argnames=("state",))
def prefill(
    graphdefs: GraphDefs, params: AllParams, state: EngineState, tokens_T: Array, pages_P: Array, begin: Array,
    count: Array, length: Array,
) -> EngineState:
    """Computes keys and values of ``count`` tokens of a sequence of ``length``, which stand at ``begin``; decodes none.
    """
    real_1xT = (jnp.arange(tokens_T.shape[0]) < count)[None]
    pools = []
    for graphdef, each, pool in zip(graphdefs, params, state.pools, strict=True):
        cache = PagedCache(pool, pages_P[None], begin[None], real_1xT, length[None])
        pools.append(nnx.merge(graphdef, each).decode(tokens_T[None], cache)[1].pool)
    return constrain_state(dataclasses.replace(state, pools=tuple(pools)))


@partial(jax.jit, static_argnames=("graphdefs",), donate_argnames=("state",))
def decode_step(
    graphdefs: GraphDefs, params: AllParams, state: EngineState, inputs: DecodeInput, settings: SlotSettings,
    processors: LogitsProcessors,
) -> tuple[EngineState, DecodeOutput]:
    """Reads the last token of every sequence and chooses the next."""
    active_S = inputs.length > 0
    last_Sx1 = jnp.take_along_axis(state.history_SxC, jnp.maximum(inputs.length - 1, 0)[:, None], axis=1)
    cache = PagedCache(state.pools[0], inputs.page_table, inputs.length - 1, active_S[:, None], inputs.length)
    logits_Sx1xV, cache = nnx.merge(graphdefs[0], params[0]).decode(last_Sx1, cache)
    logits_SxV = logits_Sx1xV[:, 0].astype(jnp.float32)
    scores_SxV = process_logits(logits_SxV, state.history_SxC, inputs.length, settings, processors)
    token_S = sample(apply_constraints(scores_SxV, inputs), token_keys(settings, inputs.length), settings.sampling)
    tokens_Sx1 = token_S[:, None]
    history_SxC = append_tokens(state.history_SxC, inputs.length, active_S, token_S)
    output = DecodeOutput(tokens_Sx1, active_S.astype(jnp.int32), *token_logprobs(logits_Sx1xV, tokens_Sx1, settings))
    return constrain_state(EngineState((cache.pool,), history_SxC)), output


def append_tokens(history_SxC: Array, length_S: Array, active_S: Array, token_S: Array) -> Array:
    """The history with one more token after ``length`` in the active rows."""
    S, C = history_SxC.shape
    return history_SxC.at[jnp.arange(S), jnp.where(active_S, length_S, C)].set(token_S, mode="drop")


def token_keys(settings: SlotSettings, length_S: Array) -> Array:
    """The random key of each row's next token when its sequence has ``length`` tokens."""
    return jax.vmap(token_key)(settings.seed, settings.row_ids, length_S - settings.prompt_length)


def process_logits(
    logits_RxV: Array, history_RxC: Array, length_R: Array, settings: SlotSettings, processors: LogitsProcessors
) -> Array:
    """Logits of the next token, changed by the model's processors and by each row's own settings: ``[R, V]``."""
    vocab_size = logits_RxV.shape[1]

    def process_row(logits_V: Array, history_C: Array, length: Array, row: SlotSettings) -> Array:
        column_C = jnp.arange(history_C.shape[0])
        own = dataclasses.replace(
            processors, max_new_tokens_B=row.max_new_tokens[None], min_new_tokens_B=row.min_new_tokens[None],
            forced_first_B=row.forced_first[None], repetition_penalty=row.repetition_penalty,
            prompt_BxP=jnp.zeros((1, 0), jnp.int32), prompt_start_B=jnp.zeros(1, jnp.int32),
        )
        # The history has the prompt in it, so ``length`` counts it as new tokens; -prompt_length takes it off again.
        logits_V = own.apply(logits_V[None], history_C[None], length, -row.prompt_length)[0]
        generated_C = (column_C >= row.prompt_length) & (column_C < length)
        count_V = jnp.zeros(vocab_size, jnp.int32).at[history_C].add(generated_C.astype(jnp.int32), mode="drop")
        logits_V = logits_V - row.frequency_penalty * count_V - row.presence_penalty * (count_V > 0)
        return logits_V.at[row.bias_tokens].add(row.bias_values, mode="drop")

    def process(logits_RxV: Array) -> Array:
        return jax.vmap(process_row)(logits_RxV, history_RxC, length_R, settings)

    if processors.active:
        return process(logits_RxV)
    changed_R = (settings.repetition_penalty != 1) | (settings.presence_penalty != 0)
    changed_R |= (settings.frequency_penalty != 0) | (settings.min_new_tokens > 0) | (settings.forced_first >= 0)
    changed_R |= (settings.bias_tokens < vocab_size).any(-1)
    return lax.cond(changed_R.any(), process, lambda logits_RxV: logits_RxV, logits_RxV)


def apply_constraints(scores_SxV: Array, inputs: DecodeInput) -> Array:
    """Scores with -inf for the tokens that a row's constraint does not allow: ``[S, V]``."""

    def mask(scores_SxV: Array) -> Array:
        token_V = jnp.arange(scores_SxV.shape[1])
        allowed_SxV = (inputs.allowed[:, token_V // 32] >> (token_V % 32)) & 1 > 0
        return jnp.where(allowed_SxV | ~inputs.constrained[:, None], scores_SxV, -jnp.inf)

    return lax.cond(inputs.constrained.any(), mask, lambda scores_SxV: scores_SxV, scores_SxV)


def token_logprobs(logits_SxDxV: Array, tokens_SxD: Array, settings: SlotSettings) -> tuple[Array, Array, Array]:
    """Log-probabilities by the model itself: of the tokens ``[S, D]``, and of the N likeliest ones with their ids
    ``[S, D, N]``."""
    S, D, V = logits_SxDxV.shape
    count = min(MAX_LOGPROBS, V)

    def compute(logits_SxDxV: Array) -> tuple[Array, Array, Array]:
        logp_SxDxV = jax.nn.log_softmax(logits_SxDxV, axis=-1)
        values, ids = top_k(logp_SxDxV.reshape(S * D, V), count)
        own_SxD = jnp.take_along_axis(logp_SxDxV, tokens_SxD[:, :, None], axis=2)[:, :, 0]
        return own_SxD, values.reshape(S, D, count), ids.reshape(S, D, count).astype(jnp.int32)

    def zeros(_: Array) -> tuple[Array, Array, Array]:
        return jnp.zeros((S, D)), jnp.zeros((S, D, count)), jnp.zeros((S, D, count), jnp.int32)

    return lax.cond(settings.needs_logprobs.any(), compute, zeros, logits_SxDxV)
