"""Continuations of token prompts, by sampling, greedily or by beam search: prefill and decoding in compiled programs.

A program is compiled for each combination of shapes only. Rows, prompt lengths and new tokens are rounded up to a few
sizes; sampling settings and parameters are arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params
from jaxlm.inference.batching import batches_by_length, bucket, pad_rows, power_of_two
from jaxlm.inference.beam import BeamScorer, finish_search, search_decoder
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.inference.logits_processors import LogitsProcessors, make_logits_processors
from jaxlm.inference.protocol import InferenceModel
from jaxlm.inference.sampling import Sampling, prompt_digest, sample, token_key
from jaxlm.nn.config import ModelConfig

__all__ = ["beam_tokens", "generate_tokens"]

_NEW_TOKENS = 64  # the limit where neither the caller nor the model gives one
_CHECK_EVERY = 32  # tokens between two calls of ``finished``

Finished = Callable[[int, list[int]], bool]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _DecodeState:
    step: Array  # tokens generated so far
    cache: Any
    last_B: Array  # the last token of each row
    tokens_BxN: Array
    done_B: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Sampler:
    """Everything but the logits that decides the next token of each row."""

    seed: Array  # uint32
    row_ids_Bx2: Array  # uint32: see ``token_key``
    num_before: Array  # int32, new tokens that are now part of the prompts
    sampling: Sampling
    processors: LogitsProcessors

    def next_token(self, logits_BxV: Array, tokens_BxN: Array, step: Array) -> Array:
        """int32 ``[B]``."""
        position = self.num_before + step
        keys_B = jax.vmap(token_key, (None, 0, None))(self.seed, self.row_ids_Bx2, position)
        return sample(self.processors.apply(logits_BxV, tokens_BxN, step, self.num_before), keys_B, self.sampling)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _decode_until(
    graphdef: nnx.GraphDef, params: Params, state: _DecodeState, until: Array, sampler: _Sampler
) -> _DecodeState:
    """Decodes until each row has ``until`` new tokens, or all rows are done."""
    model, processors = nnx.merge(graphdef, params), sampler.processors

    def body(s: _DecodeState) -> _DecodeState:
        logits_Bx1xV, cache = model.decode(s.last_B[:, None], s.cache)
        token_B = sampler.next_token(logits_Bx1xV[:, -1].astype(jnp.float32), s.tokens_BxN, s.step)
        token_B = jnp.where(s.done_B, processors.eos_E[0], token_B)
        at_limit_B = sampler.num_before + s.step + 1 >= processors.max_new_tokens_B
        return _DecodeState(
            step=s.step + 1,
            cache=cache,
            last_B=token_B,
            tokens_BxN=lax.dynamic_update_slice_in_dim(s.tokens_BxN, token_B[:, None], s.step, axis=1),
            done_B=s.done_B | processors.is_eos(token_B) | at_limit_B,
        )

    return lax.while_loop(lambda s: (s.step < until) & ~s.done_B.all(), body, state)


@partial(jax.jit, static_argnames=("graphdef", "size"))
def _prefill_and_decode(
    graphdef: nnx.GraphDef, params: Params, prompts_BxP: Array, start_B: Array, until: Array, sampler: _Sampler, *,
    size: int,
) -> _DecodeState:
    """Reads right-aligned prompts and decodes the first ``until`` of at most ``size`` new tokens.

    The loop reads the last token of the prompts, so the logits of the prompts are never computed.
    """
    model, processors = nnx.merge(graphdef, params), sampler.processors
    batch, length = prompts_BxP.shape
    cache = model.init_cache(batch, length + size).replace(start=start_B)
    _, cache = model.decode(prompts_BxP[:, :-1], cache)
    state = _DecodeState(
        step=jnp.int32(0),
        cache=cache,
        last_B=prompts_BxP[:, -1],
        tokens_BxN=jnp.broadcast_to(processors.eos_E[0], (batch, size)).astype(jnp.int32),
        done_B=processors.max_new_tokens_B == 0,
    )
    return _decode_until(graphdef, params, state, until, sampler)


def _row_ids(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """What tells the rows of a call apart (see ``token_key``): uint32 ``[B, 2]``.

    The first number is a digest of the prompt, the second counts equal prompts before it. Neither depends on the place
    of the row or on its neighbours, so these do not change what is sampled.
    """
    seen: Counter[int] = Counter()
    ids = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        digest = prompt_digest(prompt)
        ids[row] = digest, seen[digest]
        seen[digest] += 1
    return ids


def _padded_batch(
    config: ModelConfig, rows: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Right-aligned rows ``[B, P]`` of one of a few shapes, and the columns ``[B]`` in which they begin."""
    batch, length = power_of_two(len(rows)), bucket(max(map(len, rows)))
    starts_B = np.full(batch, length, np.int32)
    starts_B[: len(rows)] = [length - len(row) for row in rows]
    return pad_rows(rows, (batch, length), config.pad_id, left=True), starts_B


def generate_tokens(
    lm: InferenceModel,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    seed: int = 0,
    batch_size: int = 16,
    finished: Finished | None = None,
    **options: Any,
) -> list[list[int]]:
    """Greedy or sampled continuations of token prompts, without the end token.

    What a prompt yields does not depend on the other prompts; equal prompts get different samples. A model with learned
    positions sees at most ``max_positions`` tokens: when they are used up, it continues from the last half of them.

    Args:
        lm: the model; its tokenizer and its own generation settings are not used.
        prompts: tokens, at least one in each prompt.
        generation: the settings. ``num_beams`` has no effect (see ``beam_tokens``).
        seed: of the samples.
        batch_size: prompts in a batch.
        finished: called as ``finished(i, tokens)`` every 32 tokens; prompt ``i`` ends when it returns True.
        options: options of ``GenerationConfig.given``, which replace those of ``generation``.

    Raises:
        UserError: when a setting is not supported, or a prompt leaves no room for new tokens.
    """
    generation = generation.given(**options)
    generation.check()
    return _Generation(lm, prompts, generation, seed, finished).run(batch_size)


class _Generation:
    """The work of one call of ``generate_tokens``: windows of the texts, decoded batch by batch."""

    def __init__(
        self, lm: InferenceModel, prompts: Sequence[Sequence[int]], generation: GenerationConfig, seed: int,
        finished: Finished | None,
    ):
        config = lm.config
        self._lm, self._prompts, self._generation, self._finished = lm, prompts, generation, finished
        self._seed, self._row_ids = np.uint32(seed % 2**32), _row_ids(prompts)
        self._limits = generation.limits([len(prompt) for prompt in prompts], _NEW_TOKENS)
        self._context = config.position_limit
        self._eos = set(generation.eos_token_id or (config.eos_id,))
        self._sampling = Sampling.for_batch(
            1, temperature=generation.temperature if generation.do_sample else 0.0, top_k=generation.top_k,
            top_p=generation.top_p, min_p=generation.min_p,
        )
        self._new: list[list[int]] = [[] for _ in prompts]
        self._open = set(range(len(prompts)))  # prompts that may get more tokens

    def run(self, batch_size: int) -> list[list[int]]:
        """The new tokens of every prompt."""
        for rows in self._batches(batch_size):
            while rows := [i for i in rows if i in self._open and len(self._new[i]) < self._limits[i]]:
                count = max(self._limits[i] - len(self._new[i]) for i in rows)
                if self._context is not None:
                    count = min(count, self._context - max(len(self._window(i)) for i in rows))
                self._decode(rows, count)
        return self._new

    def _batches(self, batch_size: int) -> Iterator[list[int]]:
        """Prompts that are decoded together; if their window will move, they are equally long, so it moves at once."""
        groups: dict[int, list[int]] = {}
        for i, prompt in enumerate(self._prompts):
            moves = self._context is not None and len(prompt) + self._limits[i] > self._context
            groups.setdefault(len(prompt) if moves else 0, []).append(i)
        for group in groups.values():
            for batch in batches_by_length([len(self._prompts[i]) for i in group], batch_size):
                yield [group[j] for j in batch]

    def _window(self, i: int) -> list[int]:
        """The tokens of a text that the model reads."""
        tokens = [*self._prompts[i], *self._new[i]]
        fits = self._context is None or len(tokens) < self._context
        return tokens if fits else tokens[-(self._context // 2) :]

    def _decode(self, rows: list[int], count: int) -> None:
        """At most ``count`` more tokens for rows that have equally many new tokens."""
        lm, before = self._lm, [self._new[i] for i in rows]
        prompts_BxP, starts_B = _padded_batch(lm.config, [self._window(i) for i in rows])
        sampler = self._sampler(rows, prompts_BxP, starts_B)
        until = min(_CHECK_EVERY, count) if self._finished else count
        state = _prefill_and_decode(
            lm.graphdef, lm.params, prompts_BxP, starts_B, np.int32(until), sampler, size=bucket(count)
        )
        while True:
            done_B = self._take_in(rows, before, np.asarray(state.tokens_BxN)[:, :until], np.array(state.done_B))
            if done_B.all() or until == count:
                return
            until = min(until + _CHECK_EVERY, count)
            state = _decode_until(lm.graphdef, lm.params, replace(state, done_B=done_B), np.int32(until), sampler)

    def _sampler(self, rows: list[int], prompts_BxP: np.ndarray, starts_B: np.ndarray) -> _Sampler:
        processors = make_logits_processors(
            self._generation, self._lm.config, [len(self._prompts[i]) for i in rows],
            [self._limits[i] for i in rows], prompts_BxP, starts_B,
        )
        batch = len(prompts_BxP)
        return _Sampler(
            self._seed, self._row_ids[np.resize(rows, batch)], np.int32(len(self._new[rows[0]])),
            jax.tree.map(lambda x: np.repeat(x, batch), self._sampling), processors,
        )

    def _take_in(
        self, rows: list[int], before: list[list[int]], tokens_BxN: np.ndarray, done_B: np.ndarray
    ) -> np.ndarray:
        """Adds tokens to what the rows had ``before``; returns which rows are done."""
        for row, i in enumerate(rows):
            fresh = tokens_BxN[row, : self._limits[i] - len(before[row])].tolist()
            end = next((at for at, token in enumerate(fresh) if token in self._eos), None)
            self._new[i] = before[row] + fresh[:end]
            if end is not None or (self._finished is not None and self._finished(i, self._new[i])):
                done_B[row] = True
                self._open.discard(i)
        return done_B


def beam_tokens(
    lm: InferenceModel,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    batch_size: int = 8,
    **options: Any,
) -> list[list[int]]:
    """The best continuation of each token prompt by beam search, without the end token.

    ``options`` are those of ``GenerationConfig.given`` and replace what ``generation`` says.

    Raises:
        UserError: when a prompt and its continuation do not fit a model with learned positions, or a setting is not
            supported.
    """
    config, generation = lm.config, generation.given(**options)
    generation.check()
    limits = generation.limits([len(prompt) for prompt in prompts], _NEW_TOKENS)
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
    if config.position_limit is not None and longest > config.position_limit:
        raise UserError(
            f"a prompt and its continuation have {longest} tokens, and the model reads {config.position_limit}: lower "
            "max_new_tokens, or do not use a beam"
        )
    scorer = BeamScorer.of(generation)
    out: list[list[int]] = [[] for _ in prompts]
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        prompts_BxP, starts_B = _padded_batch(config, [prompts[i] for i in rows])
        row_limits = [limits[i] for i in rows]
        processors = make_logits_processors(
            generation, config, [len(prompts[i]) for i in rows], row_limits, prompts_BxP, starts_B
        )
        state = search_decoder(
            lm.graphdef, lm.params, prompts_BxP, starts_B, processors, scorer, beams=generation.num_beams or 1,
            size=bucket(max(row_limits)),
        )
        found = finish_search(lm.graphdef, lm.params, state, processors, scorer)
        for i, tokens in zip(rows, found.best(processors), strict=False):
            out[i] = tokens
    return out
