"""The device side of an engine: the model with its pools, the settings of its slots, and the programs it runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence as Rowlike
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxlm import nn
from jaxlm.core.tree import Params
from jaxlm.inference.engine.programs import Drawn, Rows, Settings, draw, read, seat, start
from jaxlm.inference.engine.requests import MAX_LOGIT_BIASES, TokenLogprob
from jaxlm.inference.engine.scheduler import Sequence
from jaxlm.inference.engine.speculation import speculate
from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.inference.logits_processors import make_logits_processors
from jaxlm.inference.sampling import Sampling, digest

_SMALLEST = 16  # tokens that a program to read them takes, at least


@dataclass(frozen=True)
class Draws:
    """What came of a step for one sequence."""

    sequence: Sequence
    tokens: list[int]
    logprobs: list[TokenLogprob]  # of each of them, where anybody asks


class Runner:
    """A model, perhaps a draft of it, and what is in their memory."""

    def __init__(
        self, models: Rowlike, generation: GenerationConfig, *, slots: int, context: int, page: int, pages: int,
        chunk: int, guesses: int,
    ):
        """``models`` have ``config`` and ``params``, the draft second; ``pages`` does not count the one that is
        nobody's."""
        self._config, self._generation = models[0].config, generation
        self._graphdefs = tuple(nn.initializer(each.config)[0] for each in models)
        self._params = tuple(each.params for each in models)
        self._guesses = guesses if len(models) > 1 else 0
        self._context, self._pages_of_row = context, -(-context // page)
        self._sizes = _sizes(min(chunk, context))
        self._mesh = _mesh(models[0].params)
        self._slots = slots
        self._settings = _no_settings(slots, self._config.vocab_size)
        self._placed: Settings | None = None  # the same on devices
        vocabulary = self._config.vocab_size
        self._anything = np.zeros((slots, -(-vocabulary // 32)), np.int32)
        plain = generation.replace(
            repetition_penalty=1.0, min_new_tokens=0, min_length=0, forced_bos_token_id=None
        )
        zeros = np.zeros(1, np.int32)
        self._programs: set[str] = set()
        self._warm = False
        with self._on_mesh():
            self._rules = jax.device_put(make_logits_processors(plain, self._config, [1], [1], zeros[None], zeros))
            self._state = start(
                self._graphdefs, self._params, slots=slots, context=context, pages=pages + 1, size=page
            )

    @property
    def compiles(self) -> int:
        """Programs that it has run."""
        return len(self._programs)

    def warm_up(self) -> None:
        """Runs every program once on nothing; no other is run afterwards."""
        slots = self._slots
        with self._on_mesh():
            for _ in range(2):  # what a program returns may lie otherwise than what the first one was given
                self._seat(0, np.zeros(self._context, np.int32))
                for size in self._sizes:
                    self._read(np.zeros(size, np.int32), np.zeros(self._pages_of_row, np.int32), 0, 0)
                drawn = self._draw(_no_rows(slots, self._pages_of_row, self._anything))
            jax.block_until_ready(drawn)
        self._warm = True

    def read(self, sequence: Sequence, begin: int, count: int) -> None:
        """Puts tokens of a sequence into its pages."""
        self._sit(sequence)
        with self._on_mesh():
            while count > 0:
                size = next((size for size in self._sizes if size >= count), self._sizes[-1])
                now = min(size, count)
                tokens_T = _padded(sequence.tokens[begin : begin + now], size)
                self._read(tokens_T, _padded(sequence.pages, self._pages_of_row), begin, now)
                begin, count = begin + now, count - now

    def draw(self, sequences: Rowlike[Sequence], guesses: Rowlike[int]) -> list[Draws]:
        """One more token for each sequence; where there is a draft, up to as many more as it may guess."""
        rows = _no_rows(self._slots, self._pages_of_row, self._anything)
        if any(sequence.matcher for sequence in sequences):
            rows = dataclasses.replace(rows, allowed=self._anything.copy())
        for sequence, guessed in zip(sequences, guesses, strict=True):
            slot = self._sit(sequence)
            rows.table[slot, : len(sequence.pages)] = sequence.pages
            rows.length[slot], rows.drafts[slot] = len(sequence.tokens), guessed
            rows.behind[slot] = sequence.behind
            if sequence.matcher:
                rows.constrained[slot] = True
                rows.allowed[slot] = sequence.matcher.allowed_W
        with self._on_mesh():
            drawn = self._draw(rows)
        asked = any(sequence.request.scored for sequence in sequences)
        fetched = jax.device_get(drawn if asked else (drawn.tokens, drawn.count))  # the one wait of the step
        tokens_SxD, count_S = (fetched.tokens, fetched.count) if asked else fetched
        out = []
        for sequence, guessed in zip(sequences, guesses, strict=True):
            slot = sequence.slot
            count = int(count_S[slot])
            sequence.behind = count == guessed + 1
            logprobs = _logprobs(fetched, slot, count, sequence.request.logprobs or 0) if asked else []
            out.append(Draws(sequence, tokens_SxD[slot, :count].tolist(), logprobs))
        return out

    def _sit(self, sequence: Sequence) -> int:
        """Sees to it that a slot is that of its sequence."""
        slot = sequence.slot
        if not sequence.placed:
            sequence.placed = True
            _settle(self._settings, slot, sequence, self._generation, self._config)
            self._placed = None
            with self._on_mesh():
                self._seat(slot, _padded(sequence.tokens, self._context))
        return slot

    # Every program that is run, by what decides whether it compiles.

    def _seat(self, slot: int, tokens_C: np.ndarray) -> None:
        self._run("seat")
        self._state = seat(self._state, np.int32(slot), tokens_C)

    def _read(self, tokens_T: np.ndarray, table_P: np.ndarray, begin: int, count: int) -> None:
        self._run(f"read {len(tokens_T)}")
        self._state = read(
            self._graphdefs, self._params, self._state, tokens_T, table_P, np.int32(begin), np.int32(count)
        )

    def _draw(self, rows: Rows) -> Drawn:
        self._run("draw")
        if self._placed is None:
            self._placed = jax.device_put(jax.tree.map(np.copy, self._settings))
        args = (self._graphdefs, self._params, self._state, rows, self._placed, self._rules)
        self._state, drawn = speculate(*args, guesses=self._guesses) if self._guesses else draw(*args)
        return drawn

    def _run(self, program: str) -> None:
        assert not self._warm or program in self._programs, f"{program} would compile after warm_up"
        self._programs.add(program)

    def _on_mesh(self):
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _mesh(params: Params) -> Mesh | None:
    """The mesh that parameters lie on, where it is more than one device."""
    for leaf in jax.tree.leaves(params):
        if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def _sizes(chunk: int) -> list[int]:
    """Powers of two up to the first that holds a whole chunk."""
    sizes = [_SMALLEST]
    while sizes[-1] < chunk:
        sizes.append(2 * sizes[-1])
    return sizes


def _padded(values: Rowlike[int], size: int) -> np.ndarray:
    out = np.zeros(size, np.int32)
    out[: len(values)] = values
    return out


def _no_rows(slots: int, pages: int, allowed: np.ndarray) -> Rows:
    numbers, flags = (lambda: np.zeros(slots, np.int32)), (lambda: np.zeros(slots, bool))
    return Rows(np.zeros((slots, pages), np.int32), numbers(), flags(), allowed, numbers(), flags())


def _no_settings(slots: int, vocabulary: int) -> Settings:
    def numbers(value=0):
        return np.full(slots, value, np.int32)

    def reals(value=0.0):
        return np.full(slots, value, np.float32)

    return Settings(
        Sampling.rows(slots), np.zeros(slots, np.uint32), np.zeros((slots, 2), np.uint32), numbers(), numbers(),
        numbers(), numbers(-1), reals(1.0), reals(), reals(), np.full((slots, MAX_LOGIT_BIASES), vocabulary, np.int32),
        np.zeros((slots, MAX_LOGIT_BIASES), np.float32), np.zeros(slots, bool),
    )


def _settle(settings: Settings, slot: int, sequence: Sequence, generation: GenerationConfig, config) -> None:
    """Writes what a sequence asks for into its slot's place in the arrays."""
    request, length = sequence.request, len(sequence.request.prompt)
    sampling, forced = settings.sampling, generation.forced_bos_token_id
    sampling.temperature[slot], sampling.top_k[slot] = request.temperature, request.top_k
    sampling.top_p[slot], sampling.min_p[slot] = request.top_p, request.min_p
    settings.seed[slot], settings.marks[slot] = sequence.seed, (digest(request.prompt), sequence.index)
    settings.prompt[slot], settings.limit[slot] = length, request.max_new_tokens
    settings.least[slot] = request.min_new_tokens
    settings.first[slot] = forced if forced is not None and length == 1 else -1
    settings.repetition[slot] = request.repetition_penalty
    settings.presence[slot], settings.frequency[slot] = request.presence_penalty, request.frequency_penalty
    settings.bias_ids[slot] = config.vocab_size
    settings.bias_ids[slot, : len(request.logit_bias)] = list(request.logit_bias)
    settings.biases[slot, : len(request.logit_bias)] = list(request.logit_bias.values())
    settings.logprobs[slot] = request.scored


def _logprobs(drawn: Drawn, slot: int, count: int, asked: int) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            int(drawn.tokens[slot, i]), float(drawn.logprob[slot, i]),
            tuple(zip(drawn.top[slot, i, :asked].tolist(), drawn.top_logprob[slot, i, :asked].tolist(), strict=True)),
        )
        for i in range(count)
    ]
