"""Text from a language model: prefill and cached decoding in one compiled program.

A program is compiled per shape only: rows, prompt length and new tokens are rounded up to a few sizes, sampling
settings and the parameters are arguments.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from jaxlm.core.errors import UserError
from jaxlm.inference.batching import batches_by_length, bucket, pad_rows, power_of_two
from jaxlm.inference.beam import search_decoder
from jaxlm.inference.sampling import Sampling, sample

_CHECK_EVERY = 32  # tokens between looks at the text for stop strings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    step: Array  # tokens generated so far
    cache: Any
    last_B: Array
    tokens_BxN: Array
    done_B: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Draw:
    """What decides the next token of each row, given its logits."""

    seed: Array  # uint32
    marks_Bx2: Array  # uint32, what tells rows apart (see ``_marks``)
    drawn: Array  # int32, tokens drawn before
    sampling: Sampling

    def keys(self, step: Array) -> Array:
        """A key for each row's token number ``drawn + step``."""

        def key(mark_2: Array) -> Array:
            row = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), mark_2[0]), mark_2[1])
            return jax.random.fold_in(row, self.drawn + step)

        return jax.vmap(key)(self.marks_Bx2)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _advance(graphdef, params, state: _State, until: Array, draw: _Draw) -> _State:
    """Decodes until ``until`` tokens are there or every row is done."""
    model = nnx.merge(graphdef, params)

    def body(s: _State) -> _State:
        logits_Bx1xV, cache = model.decode(s.last_B[:, None], s.cache)
        token_B = sample(logits_Bx1xV[:, -1].astype(jnp.float32), draw.keys(s.step), draw.sampling)
        token_B = jnp.where(s.done_B, model.config.eos_id, token_B)
        return _State(
            step=s.step + 1,
            cache=cache,
            last_B=token_B,
            tokens_BxN=lax.dynamic_update_slice_in_dim(s.tokens_BxN, token_B[:, None], s.step, axis=1),
            done_B=s.done_B | (token_B == model.config.eos_id),
        )

    return lax.while_loop(lambda s: (s.step < until) & ~s.done_B.all(), body, state)


@partial(jax.jit, static_argnames=("graphdef", "size"))
def _start(graphdef, params, prompts_BxP: Array, start_B: Array, until: Array, draw: _Draw, *, size: int) -> _State:
    """Reads left-padded prompts and decodes the first ``until`` of at most ``size`` tokens.

    The last prompt token is left to the loop, so that the logits of the prompt are never computed.
    """
    model = nnx.merge(graphdef, params)
    batch, length = prompts_BxP.shape
    cache = model.init_cache(batch, length + size).replace(start=start_B)
    _, cache = model.decode(prompts_BxP[:, :-1], cache)
    state = _State(
        step=jnp.int32(0),
        cache=cache,
        last_B=prompts_BxP[:, -1],
        tokens_BxN=jnp.full((batch, size), model.config.eos_id, jnp.int32),
        done_B=start_B == length,  # a row of nothing but padding
    )
    return _advance(graphdef, params, state, until, draw)


def _marks(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Two numbers a row, ``[B, 2]`` uint32: a digest of the prompt's tokens and how often the prompt came before. Not
    its place or its neighbours, so that these do not change what is drawn."""
    seen: Counter[int] = Counter()
    marks = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        digest = zlib.crc32(np.asarray(prompt, np.int32).tobytes())
        marks[row] = digest, seen[digest]
        seen[digest] += 1
    return marks


def generate_tokens(
    lm,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    finished: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continuations of token prompts, without the end token.

    ``finished(i, tokens)`` is asked every 32 tokens whether prompt ``i`` has enough. What a prompt yields does not
    depend on the other prompts; equal prompts get different samples. A model with learned positions sees at most
    ``max_positions`` tokens: when they are used up it goes on from the last half of them.
    """
    config = lm.config
    context = config.max_positions if getattr(config, "positions", "") == "learned" else None
    sampling = Sampling.rows(1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    marks = _marks(prompts)
    texts: list[list[int]] = [list(prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts))) if max_new_tokens > 0 else set()

    def window(i: int) -> list[int]:
        tokens = texts[i] + new[i]
        return tokens if context is None or len(tokens) < context else tokens[-(context // 2) :]

    def run(rows: list[int], room: int) -> None:
        """At most ``room`` more tokens for rows that have all drawn equally many."""
        windows = [window(i) for i in rows]
        batch, size = power_of_two(len(rows)), bucket(room)
        length = bucket(max(map(len, windows)))
        starts = np.full(batch, length, np.int32)
        starts[: len(rows)] = [length - len(tokens) for tokens in windows]
        settings = jax.tree.map(lambda x: np.repeat(x, batch), sampling)
        draw = _Draw(np.uint32(seed % 2**32), marks[np.resize(rows, batch)], np.int32(len(new[rows[0]])), settings)
        prompts_BxP = pad_rows(windows, (batch, length), config.pad_id, left=True)
        until = min(_CHECK_EVERY, room) if finished else room
        state = _start(lm.graphdef, lm.params, prompts_BxP, starts, np.int32(until), draw, size=size)
        before = [new[i] for i in rows]
        while True:
            tokens_BxN, done_B = np.asarray(state.tokens_BxN)[:, :until], np.array(state.done_B)
            for r, i in enumerate(rows):
                fresh = tokens_BxN[r].tolist()
                ended = config.eos_id in fresh
                new[i] = before[r] + (fresh[: fresh.index(config.eos_id)] if ended else fresh)
                if ended or (finished is not None and finished(i, new[i])):
                    done_B[r] = True
                    open_rows.discard(i)
            if done_B.all() or until == room:
                return
            until = min(until + _CHECK_EVERY, room)
            state = _advance(lm.graphdef, lm.params, replace(state, done_B=done_B), np.int32(until), draw)

    groups = [list(range(len(prompts)))]
    if context is not None:  # where a window must restart depends on its length alone
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt) if len(prompt) + max_new_tokens > context else 0, []).append(i)
        groups = list(by_length.values())
    for group in groups:
        for batch in batches_by_length([len(prompts[i]) for i in group], batch_size):
            rows = [group[j] for j in batch]
            while rows := [i for i in rows if i in open_rows and len(new[i]) < max_new_tokens]:
                left = max_new_tokens - len(new[rows[0]])
                run(rows, left if context is None else min(left, context - max(len(window(i)) for i in rows)))
    return new


def beam_tokens(
    lm,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    beam: int = 4,
    length_penalty: float = 1.0,
    batch_size: int = 8,
) -> list[list[int]]:
    """The best continuation of each token prompt by beam search, without the end token.

    UserError where it would not fit a model with learned positions.
    """
    config = lm.config
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    if getattr(config, "positions", "") == "learned" and longest > config.max_positions:
        raise UserError(
            f"a prompt and its continuation make {longest} tokens and the model reads {config.max_positions}: lower "
            "max_new_tokens, or do not use a beam"
        )
    out: list[list[int]] = [[] for _ in prompts]
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        batch, length = power_of_two(len(rows)), bucket(len(prompts[rows[0]]))
        starts, limits = np.full(batch, length, np.int32), np.zeros(batch, np.int32)
        starts[: len(rows)] = [length - len(prompts[i]) for i in rows]
        limits[: len(rows)] = max_new_tokens
        padded = pad_rows([prompts[i] for i in rows], (batch, length), config.pad_id, left=True)
        found = search_decoder(
            lm.graphdef, lm.params, padded, starts, limits, np.float32(length_penalty), False, beams=beam,
            size=bucket(max_new_tokens),
        )
        best, lengths = np.asarray(found.tokens[:, 0]), np.asarray(found.length[:, 0])
        for r, i in enumerate(rows):
            out[i] = [token for token in best[r, : lengths[r]].tolist() if token != config.eos_id]
    return out


def _first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the earliest stop string begins; -1 if none is there."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found, default=-1)


def generate(
    lm,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    beam: int = 1,
    length_penalty: float = 1.0,
    batch_size: int = 16,
) -> list[str]:
    """Continuations of ``prompts`` (the new text only), one each.

    A text ends before the first of the ``stop`` strings, at the end token or after ``max_new_tokens``. ``temperature``
    0 is greedy; the other sampling options are those of ``Sampling``. ``beam`` above 1 searches instead of sampling.
    ``lm`` has ``config``, ``graphdef``, ``params`` and ``tokenizer``. UserError on options that mean nothing.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    stop = [stop] if isinstance(stop, str) else list(stop)
    _check(lm, max_new_tokens, temperature, stop, beam)
    tokenizer = lm.tokenizer
    begin = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), lm.config.bos_id)
    ids = [tokenizer.encode_prompt(prompt) or [begin] for prompt in prompts]
    heads = [tokenizer.decode(tokens) for tokens in ids]

    def text_of(i: int, tokens: list[int]) -> str:
        """Decoded together with the prompt: some tokenizers drop a leading space."""
        whole = tokenizer.decode(ids[i] + tokens)
        return whole[len(heads[i]) :] if whole.startswith(heads[i]) else tokenizer.decode(tokens)

    if beam > 1:
        found = beam_tokens(
            lm, ids, max_new_tokens=max_new_tokens, beam=beam, length_penalty=length_penalty, batch_size=batch_size
        )
    else:
        found = generate_tokens(
            lm, ids, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            seed=seed, batch_size=batch_size,
            finished=(lambda i, tokens: _first_stop(text_of(i, tokens), stop) >= 0) if stop else None,
        )
    texts = [text_of(i, tokens) for i, tokens in enumerate(found)]
    cuts = [_first_stop(text, stop) for text in texts]
    return [text if cut < 0 else text[:cut] for text, cut in zip(texts, cuts, strict=True)]


def _check(lm, max_new_tokens: int, temperature: float, stop: Sequence[str], beam: int) -> None:
    if lm.config.kind == "seq2seq":
        raise UserError("this is a translation model: use translate instead of generate")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give 0 or more")
    if "" in stop:
        raise UserError("an empty stop string stops everything: leave it out")
    if beam < 1:
        raise UserError(f"beam is {beam}: give 1 (no search) or more")
    if beam > 1 and temperature > 0:
        raise UserError("beam search does not sample: give either beam or temperature")
