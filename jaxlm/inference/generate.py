"""Text from a language model: prefill and cached decoding in one compiled program.

A program is compiled per shape only: rows, prompt length and new tokens are rounded up to a few sizes, sampling
settings and the parameters are arguments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from jaxlm.inference.beam import Stopping, finish, search_decoder
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.inference.logits_processors import LogitsProcessors, make_logits_processors
from jaxlm.inference.sampling import Sampling, digest, row_key, sample

_NEW_TOKENS = 64  # where nothing says how many
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
    rules: LogitsProcessors

    def keys(self, step: Array) -> Array:
        """A key for each row's token number ``drawn + step``."""
        return jax.vmap(row_key, (None, 0, None))(self.seed, self.marks_Bx2, self.drawn + step)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("state",))
def _advance(graphdef, params, state: _State, until: Array, draw: _Draw) -> _State:
    """Decodes until ``until`` tokens are there or every row is done."""
    model = nnx.merge(graphdef, params)

    def body(s: _State) -> _State:
        logits_Bx1xV, cache = model.decode(s.last_B[:, None], s.cache)
        logits_BxV = logits_Bx1xV[:, -1].astype(jnp.float32)
        logits_BxV = draw.rules.apply(logits_BxV, s.tokens_BxN, s.step, draw.drawn)
        token_B = sample(logits_BxV, draw.keys(s.step), draw.sampling)
        token_B = jnp.where(s.done_B, draw.rules.eos_E[0], token_B)
        return _State(
            step=s.step + 1,
            cache=cache,
            last_B=token_B,
            tokens_BxN=lax.dynamic_update_slice_in_dim(s.tokens_BxN, token_B[:, None], s.step, axis=1),
            done_B=s.done_B | draw.rules.ends(token_B) | (draw.drawn + s.step + 1 >= draw.rules.limit_B),
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
        tokens_BxN=jnp.broadcast_to(draw.rules.eos_E[0], (batch, size)).astype(jnp.int32),
        done_B=draw.rules.limit_B == 0,
    )
    return _advance(graphdef, params, state, until, draw)


def _marks(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Two numbers a row, ``[B, 2]`` uint32: a digest of the prompt's tokens and how often the prompt came before. Not
    its place or its neighbours, so that these do not change what is drawn."""
    seen: Counter[int] = Counter()
    marks = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        mark = digest(prompt)
        marks[row] = mark, seen[mark]
        seen[mark] += 1
    return marks


def generate_tokens(
    lm,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    seed: int = 0,
    batch_size: int = 16,
    finished: Callable[[int, list[int]], bool] | None = None,
    **options: Any,
) -> list[list[int]]:
    """Continuations of token prompts, without the end token.

    ``options`` are those of ``GenerationConfig.given`` and take the place of what ``generation`` says; its beams are
    those of ``beam_tokens``. ``finished(i, tokens)`` is asked every 32 tokens whether prompt ``i`` has enough. What a
    prompt yields does not depend on the other prompts; equal prompts get different samples. A model with learned
    positions sees at most ``max_positions`` tokens: when they are used up it goes on from the last half of them.
    """
    config, generation = lm.config, generation.given(**options)
    generation.check()
    limits = generation.limits([len(prompt) for prompt in prompts], _NEW_TOKENS)
    context = config.max_positions if getattr(config, "positions", "") == "learned" else None
    eos = set(generation.eos_token_id or (config.eos_id,))
    sampling = _sampling(generation)
    marks = _marks(prompts)
    texts: list[list[int]] = [list(prompt) for prompt in prompts]
    new: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))

    def window(i: int) -> list[int]:
        tokens = texts[i] + new[i]
        return tokens if context is None or len(tokens) < context else tokens[-(context // 2) :]

    def run(rows: list[int], room: int) -> None:
        """At most ``room`` more tokens for rows that have all drawn equally many."""
        windows, drawn = [window(i) for i in rows], len(new[rows[0]])
        batch, size = power_of_two(len(rows)), bucket(room)
        length = bucket(max(map(len, windows)))
        starts = np.full(batch, length, np.int32)
        starts[: len(rows)] = [length - len(tokens) for tokens in windows]
        prompts_BxP = pad_rows(windows, (batch, length), config.pad_id, left=True)
        rules = make_logits_processors(
            generation, config, [len(prompts[i]) for i in rows], [limits[i] for i in rows], prompts_BxP, starts
        )
        settings = jax.tree.map(lambda x: np.repeat(x, batch), sampling)
        draw = _Draw(np.uint32(seed % 2**32), marks[np.resize(rows, batch)], np.int32(drawn), settings, rules)
        until = min(_CHECK_EVERY, room) if finished else room
        state = _start(lm.graphdef, lm.params, prompts_BxP, starts, np.int32(until), draw, size=size)
        before = [new[i] for i in rows]
        while True:
            tokens_BxN, done_B = np.asarray(state.tokens_BxN)[:, :until], np.array(state.done_B)
            for r, i in enumerate(rows):
                fresh = tokens_BxN[r, : limits[i] - drawn].tolist()
                end = next((at for at, token in enumerate(fresh) if token in eos), None)
                new[i] = before[r] + fresh[:end]
                if end is not None or (finished is not None and finished(i, new[i])):
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
            by_length.setdefault(len(prompt) if len(prompt) + limits[i] > context else 0, []).append(i)
        groups = list(by_length.values())
    for group in groups:
        for batch in batches_by_length([len(prompts[i]) for i in group], batch_size):
            rows = [group[j] for j in batch]
            while rows := [i for i in rows if i in open_rows and len(new[i]) < limits[i]]:
                left = max(limits[i] - len(new[i]) for i in rows)
                run(rows, left if context is None else min(left, context - max(len(window(i)) for i in rows)))
    return new


def _sampling(generation: GenerationConfig) -> Sampling:
    return Sampling.rows(
        1, temperature=generation.temperature if generation.do_sample else 0.0, top_k=generation.top_k,
        top_p=generation.top_p, min_p=generation.min_p,
    )


def beam_tokens(
    lm,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    batch_size: int = 8,
    **options: Any,
) -> list[list[int]]:
    """The best continuation of each token prompt by beam search, without the end token.

    ``options`` are those of ``GenerationConfig.given`` and take the place of what ``generation`` says. UserError where
    it would not fit a model with learned positions.
    """
    config, generation = lm.config, generation.given(**options)
    generation.check()
    limits = generation.limits([len(prompt) for prompt in prompts], _NEW_TOKENS)
    longest = max((len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True)), default=0)
    if getattr(config, "positions", "") == "learned" and longest > config.max_positions:
        raise UserError(
            f"a prompt and its continuation make {longest} tokens and the model reads {config.max_positions}: lower "
            "max_new_tokens, or do not use a beam"
        )
    stopping = Stopping.of(generation)
    out: list[list[int]] = [[] for _ in prompts]
    for rows in batches_by_length([len(prompt) for prompt in prompts], batch_size):
        batch, length = power_of_two(len(rows)), bucket(len(prompts[rows[0]]))
        starts = np.full(batch, length, np.int32)
        starts[: len(rows)] = [length - len(prompts[i]) for i in rows]
        padded = pad_rows([prompts[i] for i in rows], (batch, length), config.pad_id, left=True)
        rules = make_logits_processors(
            generation, config, [len(prompts[i]) for i in rows], [limits[i] for i in rows], padded, starts
        )
        state = search_decoder(
            lm.graphdef, lm.params, padded, starts, rules, stopping, beams=generation.num_beams or 1,
            size=bucket(max(limits[i] for i in rows)),
        )
        found = finish(lm.graphdef, lm.params, state, rules, stopping)
        for i, tokens in zip(rows, found.best(rules), strict=False):
            out[i] = tokens
    return out


def _first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the earliest stop string begins; -1 if none is there."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found, default=-1)


Chat = Sequence[Mapping[str, Any]]  # messages, each with a "role" and a "content"


def generate(
    lm,
    prompts: str | Chat | Sequence[str | Chat],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    beam: int | None = None,
    length_penalty: float | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Continuations of ``prompts`` (the new text only), one each. A prompt is a text, or a conversation for the chat
    template of the tokenizer to write as one: ``[{"role": "user", "content": "Hello"}]``.

    Options that are not given are those of ``lm.generation``, what generation_config.json says; where it says nothing,
    64 new tokens, greedy. Other settings are changed there: ``lm.replace(generation=...)``.

    A text ends before the first of the ``stop`` strings, at an end token or after ``max_new_tokens``. ``temperature`` 0
    is greedy; the other sampling options are those of ``Sampling``. ``beam`` above 1 searches instead of sampling.
    ``lm`` has ``config``, ``graphdef``, ``params``, ``tokenizer`` and ``generation``. UserError on options that mean
    nothing, and on a setting of the model's that is not supported.
    """
    one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
    prompts = [prompts] if one else list(prompts)
    _check(lm, max_new_tokens, temperature, beam)
    generation = lm.generation.given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, beam=beam,
        length_penalty=length_penalty,
    )
    stop = generation.stop_strings if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if "" in stop:
        raise UserError("an empty stop string stops everything: leave it out")
    searches = (generation.num_beams or 1) > 1
    if searches and generation.do_sample:
        raise UserError("beam search does not sample: give either beam or temperature")
    tokenizer = lm.tokenizer
    begin = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), lm.config.bos_id)
    ids = [_encode(tokenizer, prompt) or [begin] for prompt in prompts]
    heads = [tokenizer.decode(tokens) for tokens in ids]

    def text_of(i: int, tokens: list[int]) -> str:
        """Decoded together with the prompt: some tokenizers drop a leading space."""
        whole = tokenizer.decode(ids[i] + tokens)
        return whole[len(heads[i]) :] if whole.startswith(heads[i]) else tokenizer.decode(tokens)

    if searches:
        found = beam_tokens(lm, ids, generation, batch_size=batch_size)
    else:
        found = generate_tokens(
            lm, ids, generation, seed=seed, batch_size=batch_size,
            finished=(lambda i, tokens: _first_stop(text_of(i, tokens), stop) >= 0) if stop else None,
        )
    texts = [text_of(i, tokens) for i, tokens in enumerate(found)]
    cuts = [_first_stop(text, stop) for text in texts]
    return [text if cut < 0 else text[:cut] for text, cut in zip(texts, cuts, strict=True)]


def _encode(tokenizer, prompt: str | Chat) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return tokenizer.encode_prompt(tokenizer.chat_template.render(prompt), parse_special=True)


def _check(lm, max_new_tokens: int | None, temperature: float | None, beam: int | None) -> None:
    if lm.config.kind == "seq2seq":
        raise UserError("this is a translation model: use translate instead of generate")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give 0 or more")
    if temperature is not None and temperature < 0:
        raise UserError(f"temperature is {temperature}: give 0 (greedy) or more")
    if beam is not None and beam < 1:
        raise UserError(f"beam is {beam}: give 1 (no search) or more")
