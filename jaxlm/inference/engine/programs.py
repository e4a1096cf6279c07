"""What an engine runs on devices: reading parts of prompts, and one more token for every row.

The rows are the slots of the engine, always as many; what is in them is data. So each of these functions compiles once
(``read`` once a size of its part), whatever requests come.
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
from jaxlm.inference.sampling import Sampling, row_key, sample, top_k
from jaxlm.nn.attention.paged import PagedCache, PagePool

Models = tuple[tuple[nnx.GraphDef, ...], tuple[Params, ...]]  # the model, and its draft where it has one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """What stays on the devices, and is given up for its successor at every step."""

    pools: tuple[PagePool, ...]  # of the model, and of its draft; a page has the same number in both
    history_SxC: Array  # int32: the tokens of each slot's sequence


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Settings:
    """How each slot draws its tokens. Changes when a slot changes hands."""

    sampling: Sampling
    seed: Array  # uint32 [S]
    marks: Array  # uint32 [S, 2]: see ``sampling.row_key``
    prompt: Array  # int32 [S]: tokens of the prompt
    limit: Array  # int32 [S]: tokens that may follow it
    least: Array  # int32 [S]: tokens before an end token may come
    first: Array  # int32 [S]: the first new token, or -1
    repetition: Array  # float32 [S]
    presence: Array  # float32 [S]
    frequency: Array  # float32 [S]
    bias_ids: Array  # int32 [S, N]; V where there is none
    biases: Array  # float32 [S, N]
    logprobs: Array  # bool [S]: whether they are asked for


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """What the slots hold at this step."""

    table: Array  # int32 [S, P]: pages
    length: Array  # int32 [S]: tokens of the sequence, the last of which is to be read now; 0: nothing to do
    constrained: Array  # bool [S]
    allowed: Array  # int32 [S, V / 32]: bits of the tokens that a constraint allows
    drafts: Array  # int32 [S]: tokens that the draft may guess
    behind: Array  # bool [S]: whether the draft has yet to read the token before the last


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """New tokens of each slot, ``count`` of D."""

    tokens: Array  # int32 [S, D]
    count: Array  # int32 [S]
    logprob: Array  # float32 [S, D]; these and the next are zeros where nobody asks for them
    top_logprob: Array  # float32 [S, D, N]
    top: Array  # int32 [S, D, N]


def pinned(state: State) -> State:
    """Split over devices by key/value heads, as the products with weights that make and read them are."""
    def pin(pool):
        return constrain(pool, (None, None, None, "kv_heads", None)[: pool.ndim])

    return State(jax.tree.map(pin, state.pools), constrain(state.history_SxC, (None, None)))


@partial(jax.jit, static_argnames=("graphdefs", "slots", "context", "pages", "size"))
def start(graphdefs, params, *, slots: int, context: int, pages: int, size: int) -> State:
    """Empty pools, and slots with nothing in them."""
    pools = tuple(
        nnx.merge(graphdef, each).init_pages(pages, size) for graphdef, each in zip(graphdefs, params, strict=True)
    )
    return pinned(State(pools, jnp.zeros((slots, context), jnp.int32)))


@partial(jax.jit, donate_argnames=("state",))
def seat(state: State, slot: Array, tokens_C: Array) -> State:
    """Puts a sequence into a slot."""
    return pinned(dataclasses.replace(state, history_SxC=state.history_SxC.at[slot].set(tokens_C)))


@partial(jax.jit, static_argnames=("graphdefs",), donate_argnames=("state",))
def read(graphdefs, params, state: State, tokens_T: Array, table_P: Array, index: Array, count: Array) -> State:
    """Reads ``count`` tokens of one sequence from its slot ``index`` on, and draws none."""
    real_1xT = (jnp.arange(tokens_T.shape[0]) < count)[None]
    pools = []
    for graphdef, each, pool in zip(graphdefs, params, state.pools, strict=True):
        cache = PagedCache(pool, table_P[None], index[None], real_1xT)
        pools.append(nnx.merge(graphdef, each).decode(tokens_T[None], cache)[1].pool)
    return pinned(dataclasses.replace(state, pools=tuple(pools)))


@partial(jax.jit, static_argnames=("graphdefs",), donate_argnames=("state",))
def draw(graphdefs, params, state: State, rows: Rows, settings: Settings, shared: LogitsProcessors) -> tuple[State, Drawn]:
    """Reads the last token of every sequence and draws the next."""
    active_S = rows.length > 0
    last_Sx1 = jnp.take_along_axis(state.history_SxC, jnp.maximum(rows.length - 1, 0)[:, None], axis=1)
    cache = PagedCache(state.pools[0], rows.table, rows.length - 1, active_S[:, None])
    logits_Sx1xV, cache = nnx.merge(graphdefs[0], params[0]).decode(last_Sx1, cache)
    logits_SxV = logits_Sx1xV[:, 0].astype(jnp.float32)
    scores_SxV = allowed_only(scores(logits_SxV, state.history_SxC, rows.length, settings, shared), rows)
    token_S = sample(scores_SxV, keys(settings, rows.length), settings.sampling)
    tokens_Sx1 = token_S[:, None]
    history_SxC = write(state.history_SxC, rows.length, active_S, token_S)
    drawn = Drawn(tokens_Sx1, active_S.astype(jnp.int32), *logprobs(logits_Sx1xV, tokens_Sx1, settings))
    return pinned(State((cache.pool,), history_SxC)), drawn


def write(history_SxC: Array, slot_S: Array, real_S: Array, token_S: Array) -> Array:
    """History with a token more in the rows where it is real."""
    S, C = history_SxC.shape
    return history_SxC.at[jnp.arange(S), jnp.where(real_S, slot_S, C)].set(token_S, mode="drop")


def keys(settings: Settings, length_S: Array) -> Array:
    """The key of each row's next token, where it has so many."""
    return jax.vmap(row_key)(settings.seed, settings.marks, length_S - settings.prompt)


def scores(logits_RxV: Array, history_RxC: Array, length_R: Array, settings: Settings, shared: LogitsProcessors) -> Array:
    """Logits of the next token by the rules of the model (``shared``) and each row's own settings."""
    vocabulary = logits_RxV.shape[1]

    def one(logits_V: Array, history_C: Array, length: Array, row: Settings) -> Array:
        slot_C, none = jnp.arange(history_C.shape[0]), jnp.zeros(1, jnp.int32)
        rules = dataclasses.replace(
            shared, limit_B=row.limit[None], least_B=row.least[None], first_B=row.first[None],
            prompt_BxP=jnp.zeros((1, 0), jnp.int32), start_B=none, repetition_penalty=row.repetition,
        )
        logits_V = rules.apply(logits_V[None], history_C[None], length, -row.prompt)[0]
        written_C = (slot_C >= row.prompt) & (slot_C < length)
        count_V = jnp.zeros(vocabulary, jnp.int32).at[history_C].add(written_C.astype(jnp.int32), mode="drop")
        logits_V = logits_V - row.frequency * count_V - row.presence * (count_V > 0)
        return logits_V.at[row.bias_ids].add(row.biases, mode="drop")

    def ruled(logits_RxV: Array) -> Array:
        return jax.vmap(one)(logits_RxV, history_RxC, length_R, settings)

    if shared.active:
        return ruled(logits_RxV)
    asked_R = (settings.repetition != 1) | (settings.presence != 0) | (settings.frequency != 0)
    asked_R |= (settings.least > 0) | (settings.first >= 0) | (settings.bias_ids < vocabulary).any(-1)
    return lax.cond(asked_R.any(), ruled, lambda logits_RxV: logits_RxV, logits_RxV)


def allowed_only(scores_SxV: Array, rows: Rows) -> Array:
    """Scores of what constraints allow; -inf elsewhere."""
    def only(scores_SxV: Array) -> Array:
        token_V = jnp.arange(scores_SxV.shape[1])
        allowed_SxV = (rows.allowed[:, token_V // 32] >> (token_V % 32)) & 1 > 0
        return jnp.where(allowed_SxV | ~rows.constrained[:, None], scores_SxV, -jnp.inf)

    return lax.cond(rows.constrained.any(), only, lambda scores_SxV: scores_SxV, scores_SxV)


def logprobs(logits_SxDxV: Array, tokens_SxD: Array, settings: Settings) -> tuple[Array, Array, Array]:
    """Of the tokens, and of the likeliest ones with their ids, by the model itself."""
    S, D, V = logits_SxDxV.shape
    count = min(MAX_LOGPROBS, V)

    def of(logits_SxDxV: Array):
        logp_SxDxV = jax.nn.log_softmax(logits_SxDxV, axis=-1)
        values, ids = top_k(logp_SxDxV.reshape(S * D, V), count)
        own_SxD = jnp.take_along_axis(logp_SxDxV, tokens_SxD[:, :, None], axis=2)[:, :, 0]
        return own_SxD, values.reshape(S, D, count), ids.reshape(S, D, count).astype(jnp.int32)

    def none(_):
        return jnp.zeros((S, D)), jnp.zeros((S, D, count)), jnp.zeros((S, D, count), jnp.int32)

    return lax.cond(settings.logprobs.any(), of, none, logits_SxDxV)
