"""Why a model chose a token: where its attention goes, which tokens the choice rests on, and the other candidates.

Attributions are of the log-probability of one next token to the embeddings before it: gradient times input (Shrikumar
et al., arXiv:1605.01713), or integrated gradients (Sundararajan et al., arXiv:1703.01365), which add up to the change
of that log-probability from a baseline: here a text in which every token is the average one, made as long as vectors of
tokens are, for norms make much of small vectors.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxlm.core.leaves import dequantize_tree
from jaxlm.core.tree import Params
from jaxlm.inference.batching import bucket
from jaxlm.inference.engine.requests import MAX_LOGPROBS
from jaxlm.inference.sampling import top_k
from jaxlm.nn.config import StackConfig
from jaxlm.nn.embeddings import embed, head_logits
from jaxlm.nn.models import initializer
from jaxlm.nn.stack import Stack, run_layer

__all__ = [
    "Insight", "Slices", "TokenScores", "attention", "attributions", "inspect_slices", "inspect_tokens", "next_tokens",
    "score_slices", "score_tokens",
]

_AVERAGED = 4096  # embeddings that the average token is the mean of
_CHUNK = 64  # tokens whose logits are there at a time
_SLICE = 128  # tokens that are scored at a time

T = TypeVar("T")
# Work in slices, for whoever has to do other things between them. Each slice is a call of a compiled function, with its
# static arguments by name; its result is sent back. What the generator returns is the result of all.
Slices = Generator[partial, Any, T]
Method = Literal["integrated_gradients", "gradient_x_input"]
Tokens = tuple[Array, ...]  # of one text: (tokens [T],), or (source [S], decoder inputs [T])
Lengths = tuple[Array | int, ...]  # how many of each are real; the others are at the right


@dataclass(frozen=True)
class Insight:
    """What ``inspect_tokens`` found.

    ``attention`` has weights ``[L, H, T, S]`` by name: "self", and of a translation model also "encoder" and "cross".
    ``scores`` has an attribution ``[T]`` for each of the inputs; ``total`` is the explained token's log-probability
    less that at the baseline. ``next`` are the likeliest next tokens and their probabilities.
    """

    next: list[tuple[int, float]]
    token: int
    probability: float
    scores: tuple[np.ndarray, ...]
    total: float
    attention: dict[str, np.ndarray]


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of the tokens of a text but the first, and the likeliest tokens in the place of each."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


def inspect_tokens(
    lm, inputs: Sequence[Sequence[int]], *, token: int | None = None, method: Method = "integrated_gradients",
    steps: int = 32, top: int = 10,
) -> Insight:
    """Explains why ``token`` (the likeliest, where none is given) comes next.

    Args:
        lm: has ``config``, ``graphdef`` and ``params``, of a Transformer.
        inputs: the tokens that are read; of a translation model those of the source, and of the decoder.
        steps: points on the path of integrated gradients.
        top: next tokens to list.
    """
    return _all(inspect_slices(lm, inputs, token=token, method=method, steps=steps, top=top))


def inspect_slices(
    lm, inputs: Sequence[Sequence[int]], *, token: int | None, method: Method, steps: int, top: int
) -> Slices[Insight]:
    """``inspect_tokens`` in slices, each about as long as a forward and a backward pass."""
    lengths = tuple(np.int32(len(row)) for row in inputs)
    padded = tuple(_padded(lm.config, row) for row in inputs)
    logp_V = np.asarray((yield partial(_next_tokens, lm.params, padded, lengths, graphdef=lm.graphdef)))
    best = np.argsort(-logp_V, kind="stable")[:top]
    token = int(best[0]) if token is None else token
    scores, total = yield from _attribution_slices(
        lm.graphdef, lm.params, padded, lengths, np.int32(token), method, steps
    )
    weights = yield partial(_attention, lm.params, padded, lengths, graphdef=lm.graphdef)
    source, target = int(lengths[0]), int(lengths[-1])
    real = {"self": (target, target), "encoder": (source, source), "cross": (target, source)}
    return Insight(
        next=[(int(i), float(np.exp(logp_V[i]))) for i in best], token=token, probability=float(np.exp(logp_V[token])),
        scores=tuple(np.asarray(each)[:n] for each, n in zip(scores, lengths, strict=True)), total=float(total),
        attention={name: np.asarray(x)[:, :, : real[name][0], : real[name][1]] for name, x in weights.items()},
    )


def _padded(config, row: Sequence[int]) -> np.ndarray:
    """A row in one of a few lengths, so that few programs are compiled."""
    size = bucket(len(row))
    size = min(size, config.max_positions) if config.positions == "learned" else size
    return np.pad(np.asarray(row, np.int32), (0, max(size, len(row)) - len(row)), constant_values=config.pad_id)


def _all(slices: Slices[T]) -> T:
    """Does all slices, one after the other."""
    found = None
    while True:
        try:
            found = slices.send(found)()
        except StopIteration as end:
            return end.value


def attention(graphdef: nnx.GraphDef, params: Params, tokens: Tokens, lengths: Lengths) -> dict[str, Array]:
    """Attention weights ``[L, H, T, S]`` of every layer and head, rows summing to 1, before any dropout.

    "self" are the decoder's; a translation model also has "encoder", and "cross" from the decoder to the source.
    """
    return _attention(params, tokens, lengths, graphdef=graphdef)


@partial(jax.jit, static_argnames=("graphdef",))
def _attention(params: Params, tokens: Tokens, lengths: Lengths, *, graphdef: nnx.GraphDef) -> dict[str, Array]:
    model = nnx.merge(graphdef, params)
    inputs = _embeddings(model, tokens)
    if len(tokens) == 1:
        return {"self": _walk(model.decoder, inputs[0], {"length_B": lengths[0][None]})[1][0]}
    real_1xS = _real(tokens[0], lengths[0])
    memory, (encoder,) = _walk(model.encoder, inputs[0], {"real_BxT": real_1xS})
    masks = {"memory_mask_BxM": real_1xS, "length_B": lengths[1][None]}
    own, cross = _walk(model.decoder, inputs[1], masks, memory)[1]
    return {"self": own, "encoder": encoder, "cross": cross}


def _walk(stack: Stack, x_TxD: Array, masks: dict[str, Array], memory: Array | None = None):
    """Through all layers: the output ``[1, T, D]``, and the weights of their attention, then of cross-attention."""
    x_1xTxD, context, _ = stack.start(x_TxD[None], **masks)
    found = []
    for group, block in enumerate(stack.layers):
        graphdef, params = nnx.split(block)
        x_1xTxD, seen = _walk_group(
            stack.config, graphdef, params, stack.layer_settings(group), x_1xTxD, context, memory
        )
        found.append(seen)
    return stack.finish(x_1xTxD), tuple(jnp.concatenate(each) for each in zip(*found, strict=True))


@partial(jax.jit, static_argnums=(0, 1))  # groups that are alike are traced once
def _walk_group(config: StackConfig, graphdef: nnx.GraphDef, params, settings, x_1xTxD, context, memory):
    def body(x, xs):
        layer, layer_settings = xs
        seen: list[Array] = []
        block = nnx.merge(graphdef, layer)
        x, *_ = run_layer(config, block, x, context, layer_settings, memory_BxMxD=memory, seen=seen)
        return x, tuple(weights[0] for weights in seen)

    return jax.lax.scan(body, x_1xTxD, (params, settings))


def next_tokens(graphdef: nnx.GraphDef, params: Params, tokens: Tokens, lengths: Lengths) -> Array:
    """Log-probabilities ``[V]`` of the token after the last one."""
    return _next_tokens(params, tokens, lengths, graphdef=graphdef)


@partial(jax.jit, static_argnames=("graphdef",))
def _next_tokens(params: Params, tokens: Tokens, lengths: Lengths, *, graphdef: nnx.GraphDef) -> Array:
    model = nnx.merge(graphdef, params)
    return _last_logp(model, _embeddings(model, tokens), tokens, lengths)


def attributions(
    graphdef: nnx.GraphDef, params: Params, tokens: Tokens, lengths: Lengths, token: Array | int, *, method: Method,
    steps: int = 32,
) -> tuple[tuple[Array, ...], Array]:
    """How much each token adds to the log-probability of ``token`` as the next one, float32 ``[T]`` for each input, and
    that log-probability less what it is at the baseline.

    Integrated gradients are taken at the points of Gauss-Legendre quadrature on the way from the baseline. Gradients
    are those of the dense weights that compressed ones stand for.
    """
    return _all(_attribution_slices(graphdef, params, tokens, lengths, np.int32(token), method, steps))


def _attribution_slices(
    graphdef: nnx.GraphDef, params: Params, tokens: Tokens, lengths: Lengths, token: Array, method: Method, steps: int
) -> Slices[tuple[tuple[Array, ...], Array]]:
    inputs = (params, tokens, lengths, token)
    total = yield partial(_rise, *inputs, graphdef=graphdef)
    if method == "gradient_x_input":
        return (yield partial(_gradient_x_input, *inputs, graphdef=graphdef)), total
    at, weight = np.polynomial.legendre.leggauss(steps)
    scores = tuple(np.zeros(len(row), np.float32) for row in tokens)
    for where, share in zip((at + 1) / 2, weight / 2, strict=True):
        scores = yield partial(_add_point, *inputs, scores, np.float32(where), np.float32(share), graphdef=graphdef)
    return scores, total


@dataclass(frozen=True)
class _Path:
    """The way of the embeddings from the baseline to the text, and the log-probability of a token on it."""

    model: Any
    tokens: Tokens
    lengths: Lengths
    token: Array

    @property
    def end(self) -> tuple[Array, ...]:
        return _embeddings(self.model, self.tokens)

    @property
    def begin(self) -> tuple[Array, ...]:
        average = _average(self.model, len(self.tokens))
        return tuple(jnp.broadcast_to(row_D, x.shape) for row_D, x in zip(average, self.end, strict=True))

    def logp(self, inputs: tuple[Array, ...]) -> Array:
        return _last_logp(self.model, inputs, self.tokens, self.lengths)[self.token]


def _path(graphdef: nnx.GraphDef, params: Params, *rest: Any) -> _Path:
    return _Path(nnx.merge(graphdef, dequantize_tree(params)), *rest)


@partial(jax.jit, static_argnames=("graphdef",))
def _rise(params: Params, tokens: Tokens, lengths: Lengths, token: Array, *, graphdef: nnx.GraphDef) -> Array:
    """The log-probability of the token less that at the baseline."""
    path = _path(graphdef, params, tokens, lengths, token)
    return path.logp(path.end) - path.logp(path.begin)


@partial(jax.jit, static_argnames=("graphdef",))
def _gradient_x_input(
    params: Params, tokens: Tokens, lengths: Lengths, token: Array, *, graphdef: nnx.GraphDef
) -> tuple[Array, ...]:
    path = _path(graphdef, params, tokens, lengths, token)
    return jax.tree.map(_dot, jax.grad(path.logp)(path.end), path.end)


@partial(jax.jit, static_argnames=("graphdef",))
def _add_point(
    params: Params, tokens: Tokens, lengths: Lengths, token: Array, scores: tuple[Array, ...], where: Array,
    share: Array, *, graphdef: nnx.GraphDef,
) -> tuple[Array, ...]:
    """The scores with the gradient at one point of the path."""
    path = _path(graphdef, params, tokens, lengths, token)
    begin = path.begin
    difference = jax.tree.map(jnp.subtract, path.end, begin)
    here = jax.tree.map(lambda b, d: b + where.astype(b.dtype) * d, begin, difference)
    return jax.tree.map(lambda s, g, d: s + share * _dot(g, d), scores, jax.grad(path.logp)(here), difference)


def _dot(a_TxD: Array, b_TxD: Array) -> Array:
    return (a_TxD.astype(jnp.float32) * b_TxD.astype(jnp.float32)).sum(-1)


def _embeddings(model, tokens: Tokens) -> tuple[Array, ...]:
    """``[T, D]`` for each input."""
    target = embed(model.embed, tokens[-1][None], model.config)[0]
    return (target,) if len(tokens) == 1 else (model.embed_source(tokens[0][None])[0], target)


def _average(model, inputs: int) -> tuple[Array, ...]:
    """The average token ``[D]`` for each input, over evenly spaced ones of the vocabulary and as long as they are."""

    def ids(size: int) -> Array:
        return jnp.arange(0, size, max(1, size // _AVERAGED))

    config = model.config
    own = ids(config.vocab_size)
    tokens = (own,) if inputs == 1 else (ids(config.src_vocab_size or config.vocab_size), own)
    return tuple(_mean(x) for x in _embeddings(model, tokens))


def _mean(x_VxD: Array) -> Array:
    length, mean_D = jnp.linalg.norm(x_VxD, axis=-1).mean(), x_VxD.mean(0)
    return mean_D * (length / jnp.linalg.norm(mean_D))


def _real(tokens_T: Array, length: Array | int) -> Array:
    """``[1, T]``: which tokens are no padding."""
    return (jnp.arange(tokens_T.shape[0]) < length)[None]


def _last_logp(model, inputs: tuple[Array, ...], tokens: Tokens, lengths: Lengths) -> Array:
    masks = {}
    if len(inputs) == 2:
        real_1xS = _real(tokens[0], lengths[0])
        memory = model.encoder(inputs[0][None], real_BxT=real_1xS)[0]
        masks = {"memory_BxMxD": memory, "memory_mask_BxM": real_1xS}
    x_1xTxD = model.decoder(inputs[-1][None], length_B=lengths[-1][None], **masks)[0]
    last_1x1xD = jax.lax.dynamic_slice_in_dim(x_1xTxD, lengths[-1] - 1, 1, axis=1)
    return jax.nn.log_softmax(head_logits(model, last_1x1xD)[0, 0])


def score_tokens(lm, tokens: Sequence[int], *, top: int = 0) -> TokenScores:
    """Log-probabilities of the tokens of a text given those before, with up to 20 alternatives each."""
    return _all(score_slices(lm, tokens, top=top))


def score_slices(lm, tokens: Sequence[int], *, top: int) -> Slices[TokenScores]:
    """``score_tokens`` in slices of up to 128 tokens, whose keys and values are cached in full precision. A text whose
    rotations go by its length is one slice."""
    if len(tokens) < 2:
        return TokenScores([], [])
    n, config = len(tokens) - 1, lm.config
    padded = _padded(config, tokens[:-1])
    size = len(padded) if config.rotates_by_length else min(_SLICE, len(padded))
    length = -(-n // size) * size
    tokens_T, targets_T = (np.full(length, config.pad_id, np.int32) for _ in range(2))
    tokens_T[:n], targets_T[:n] = tokens[:-1], tokens[1:]
    graphdef, cache, found = lm.graphdef, None, []
    if not config.rotates_by_length:
        if config.kv_cache != "full":
            graphdef, _ = initializer(replace(config, kv_cache="full"))
        cache = yield partial(_empty_cache, lm.params, length=bucket(length), graphdef=graphdef)
    for begin in range(0, length, size):
        rows = tokens_T[begin : begin + size], targets_T[begin : begin + size]
        cache, *scores = yield partial(_scores, lm.params, cache, *rows, np.int32(n), graphdef=graphdef)
        found.append([np.asarray(x) for x in scores])
    logp_T, best_Txk, ids_Txk = (np.concatenate(each)[:n] for each in zip(*found, strict=True))
    best = [list(zip(ids[:top].tolist(), row[:top].tolist(), strict=True)) for ids, row in
            zip(ids_Txk, best_Txk, strict=True)]
    return TokenScores(logp_T.tolist(), best)


@partial(jax.jit, static_argnames=("graphdef", "length"))
def _empty_cache(params: Params, *, graphdef: nnx.GraphDef, length: int) -> Any:
    return nnx.merge(graphdef, params).init_cache(1, length)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("cache",))
def _scores(
    params: Params, cache: Any, tokens_T: Array, targets_T: Array, length: Array, *, graphdef: nnx.GraphDef
) -> tuple[Any, Array, Array, Array]:
    """The cache with more tokens; without one, the text has ``length`` tokens. And of the target at each place the
    log-probability ``[T]``, and the likeliest tokens there ``[T, k]``: their log-probabilities and ids. Logits are
    there for a few places at a time."""
    model = nnx.merge(graphdef, params)
    x_1xTxD = _embeddings(model, (tokens_T,))[0][None]
    if cache is None:
        x_1xTxD = model.decoder(x_1xTxD, length_B=length[None])[0]
    else:
        x_1xTxD, cache = model.decoder.decode(x_1xTxD, cache)
    most = min(MAX_LOGPROBS, model.config.vocab_size)

    def place(xs):
        x_D, target = xs
        logp_V = jax.nn.log_softmax(head_logits(model, x_D[None, None])[0, 0])
        values, ids = top_k(logp_V[None], most)
        return logp_V[target], values[0], ids[0]

    return cache, *jax.lax.map(place, (x_1xTxD[0], targets_T), batch_size=_CHUNK)
