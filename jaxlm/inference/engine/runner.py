"""The device side of an engine: parameters, page pools and slot settings, and the programs that run on them."""

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
from jaxlm.inference.engine.options import ResolvedOptions
from jaxlm.inference.engine.programs import (
    DecodeInput,
    DecodeOutput,
    SlotSettings,
    assign_slot,
    decode_step,
    init_state,
    prefill,
)
from jaxlm.inference.engine.requests import MAX_LOGIT_BIASES, TokenLogprob
from jaxlm.inference.engine.scheduler import PrefillChunk, Sequence
from jaxlm.inference.engine.speculation import speculative_decode_step
from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.inference.logits_processors import make_logits_processors
from jaxlm.inference.sampling import Sampling, prompt_digest

__all__ = ["Runner", "SequenceOutput"]

_SMALLEST_CHUNK = 16  # tokens


@dataclass(frozen=True)
class SequenceOutput:
    """What one step yielded for one sequence."""

    sequence: Sequence
    tokens: list[int]
    logprobs: list[TokenLogprob]  # of these tokens; empty if no sequence needs them


class Runner:
    """A model, perhaps with a draft, and the state of its slots on the devices."""

    def __init__(self, params: tuple[Params, ...], generation: GenerationConfig, options: ResolvedOptions):
        """
        Args:
            params: of the model, and of its draft if it has one.
            generation: the model's settings.
            options: of the engine.
        """
        self._params, self._generation, self._options = params, generation, options
        self._graphdefs = tuple(nn.initializer(config)[0] for config in options.configs)
        self._chunk_sizes = _chunk_sizes(min(options.prefill_chunk, options.context))
        self._mesh = _mesh(params[0])
        vocab_size = options.configs[0].vocab_size
        self._settings = _empty_settings(options.slots, vocab_size)
        self._device_settings: SlotSettings | None = None  # a copy of the settings; None when they have changed
        self._all_zero_SxW = np.zeros((options.slots, -(-vocab_size // 32)), np.int32)
        self._programs: set[str] = set()
        self._warm = False
        shared = generation.replace(  # without what each slot has as a setting of its own
            repetition_penalty=1.0, min_new_tokens=0, min_length=0, forced_bos_token_id=None
        )
        zeros = np.zeros(1, np.int32)
        with self._on_mesh():
            processors = make_logits_processors(shared, options.configs[0], [1], [1], zeros[None], zeros)
            self._processors = jax.device_put(processors)
            self._state = init_state(
                self._graphdefs, self._params, slots=options.slots, context=options.context,
                num_pages=options.num_pages + 1, page_size=options.page_size,
            )

    @property
    def compilations(self) -> int:
        """Different programs that have run."""
        return len(self._programs)

    def warm_up(self) -> None:
        """Runs every program once with empty slots; no other program runs afterwards."""
        options = self._options
        with self._on_mesh():
            for _ in range(2):  # the output of a program may have another layout than its first input
                self._run_assign_slot(0, np.zeros(options.context, np.int32))
                for size in self._chunk_sizes:
                    no_pages_P = np.zeros(options.pages_per_sequence, np.int32)
                    self._run_prefill(np.zeros(size, np.int32), no_pages_P, 0, 0, 0)
                output = self._run_decode(self._empty_input())
            jax.block_until_ready(output)
        self._warm = True

    def prefill(self, chunk: PrefillChunk) -> None:
        """Computes the keys and values of a chunk of a prompt."""
        sequence, begin, count = chunk
        self._place(sequence)
        pages_P, length = _padded(sequence.pages, self._options.pages_per_sequence), len(sequence.tokens)
        with self._on_mesh():
            while count > 0:
                size = next((size for size in self._chunk_sizes if size >= count), self._chunk_sizes[-1])
                now = min(size, count)
                self._run_prefill(_padded(sequence.tokens[begin : begin + now], size), pages_P, begin, now, length)
                begin, count = begin + now, count - now

    def decode(self, sequences: Rowlike[Sequence], num_draft_tokens: Rowlike[int]) -> list[SequenceOutput]:
        """One more token for each sequence; with a draft, up to ``num_draft_tokens`` more."""
        inputs = self._empty_input()
        if any(sequence.matcher for sequence in sequences):
            inputs = dataclasses.replace(inputs, allowed=self._all_zero_SxW.copy())
        for sequence, proposed in zip(sequences, num_draft_tokens, strict=True):
            slot = self._place(sequence)
            inputs.page_table[slot, : len(sequence.pages)] = sequence.pages
            inputs.length[slot], inputs.num_draft_tokens[slot] = len(sequence.tokens), proposed
            inputs.draft_lags[slot] = sequence.draft_lags
            if sequence.matcher:
                inputs.constrained[slot] = True
                inputs.allowed[slot] = sequence.matcher.allowed_W
        with self._on_mesh():
            output = self._run_decode(inputs)
        scored = any(sequence.request.needs_logprobs for sequence in sequences)
        fetched = jax.device_get(output if scored else (output.tokens, output.count))  # the step waits here only
        tokens_SxD, count_S = (fetched.tokens, fetched.count) if scored else fetched
        outputs = []
        for sequence, proposed in zip(sequences, num_draft_tokens, strict=True):
            slot = sequence.slot
            count = int(count_S[slot])
            sequence.draft_lags = count == proposed + 1
            logprobs = _logprobs(fetched, slot, count, sequence.request.logprobs or 0) if scored else []
            outputs.append(SequenceOutput(sequence, tokens_SxD[slot, :count].tolist(), logprobs))
        return outputs

    def _place(self, sequence: Sequence) -> int:
        """The slot of a sequence, after its tokens and settings have been written there if they were not."""
        slot = sequence.slot
        if not sequence.on_device:
            sequence.on_device = True
            _write_settings(self._settings, sequence, self._generation, self._options.configs[0].vocab_size)
            self._device_settings = None
            with self._on_mesh():
                self._run_assign_slot(slot, _padded(sequence.tokens, self._options.context))
        return slot

    def _empty_input(self) -> DecodeInput:
        slots = self._options.slots
        return DecodeInput(
            page_table=np.zeros((slots, self._options.pages_per_sequence), np.int32),
            length=np.zeros(slots, np.int32), constrained=np.zeros(slots, bool), allowed=self._all_zero_SxW,
            num_draft_tokens=np.zeros(slots, np.int32), draft_lags=np.zeros(slots, bool),
        )

    # The programs. Each notes what decides whether it compiles.

    def _run_assign_slot(self, slot: int, tokens_C: np.ndarray) -> None:
        self._note("assign_slot")
        self._state = assign_slot(self._state, np.int32(slot), tokens_C)

    def _run_prefill(self, tokens_T: np.ndarray, pages_P: np.ndarray, begin: int, count: int, length: int) -> None:
        self._note(f"prefill {len(tokens_T)}")
        self._state = prefill(
            self._graphdefs, self._params, self._state, tokens_T, pages_P, np.int32(begin), np.int32(count),
            np.int32(length),
        )

    def _run_decode(self, inputs: DecodeInput) -> DecodeOutput:
        self._note("decode")
        if self._device_settings is None:
            self._device_settings = jax.device_put(jax.tree.map(np.copy, self._settings))
        args = (self._graphdefs, self._params, self._state, inputs, self._device_settings, self._processors)
        if num_draft_tokens := self._options.num_draft_tokens:
            self._state, output = speculative_decode_step(*args, num_draft_tokens=num_draft_tokens)
        else:
            self._state, output = decode_step(*args)
        return output

    def _note(self, program: str) -> None:
        assert not self._warm or program in self._programs, f"{program} would compile after warm_up"
        self._programs.add(program)

    def _on_mesh(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _mesh(params: Params) -> Mesh | None:
    """The mesh that the parameters lie on, if it has more than one device."""
    for leaf in jax.tree.leaves(params):
        if isinstance(sharding := getattr(leaf, "sharding", None), NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


def _chunk_sizes(chunk: int) -> list[int]:
    """Powers of two, up to the first that holds a whole chunk."""
    sizes = [_SMALLEST_CHUNK]
    while sizes[-1] < chunk:
        sizes.append(2 * sizes[-1])
    return sizes


def _padded(values: Rowlike[int], size: int) -> np.ndarray:
    out = np.zeros(size, np.int32)
    out[: len(values)] = values
    return out


def _empty_settings(slots: int, vocab_size: int) -> SlotSettings:
    """NumPy arrays, to be written slot by slot."""

    def integers(value: int = 0) -> np.ndarray:
        return np.full(slots, value, np.int32)

    def floats(value: float = 0.0) -> np.ndarray:
        return np.full(slots, value, np.float32)

    return SlotSettings(
        sampling=Sampling.for_batch(slots), seed=np.zeros(slots, np.uint32), row_ids=np.zeros((slots, 2), np.uint32),
        prompt_length=integers(), max_new_tokens=integers(), min_new_tokens=integers(), forced_first=integers(-1),
        repetition_penalty=floats(1.0), presence_penalty=floats(), frequency_penalty=floats(),
        bias_tokens=np.full((slots, MAX_LOGIT_BIASES), vocab_size, np.int32),
        bias_values=np.zeros((slots, MAX_LOGIT_BIASES), np.float32), needs_logprobs=np.zeros(slots, bool),
    )


def _write_settings(
    settings: SlotSettings, sequence: Sequence, generation: GenerationConfig, vocab_size: int
) -> None:
    """Writes the settings of a sequence's request into its slot."""
    slot, request = sequence.slot, sequence.request
    length, biases = len(request.prompt), len(request.logit_bias)
    sampling, forced = settings.sampling, generation.forced_bos_token_id
    sampling.temperature[slot], sampling.top_k[slot] = request.temperature, request.top_k
    sampling.top_p[slot], sampling.min_p[slot] = request.top_p, request.min_p
    settings.seed[slot], settings.row_ids[slot] = sequence.seed, (prompt_digest(request.prompt), sequence.index)
    settings.prompt_length[slot], settings.max_new_tokens[slot] = length, request.max_new_tokens
    settings.min_new_tokens[slot] = request.min_new_tokens
    settings.forced_first[slot] = forced if forced is not None and length == 1 else -1
    settings.repetition_penalty[slot] = request.repetition_penalty
    settings.presence_penalty[slot] = request.presence_penalty
    settings.frequency_penalty[slot] = request.frequency_penalty
    settings.bias_tokens[slot] = vocab_size
    settings.bias_tokens[slot, :biases] = list(request.logit_bias)
    settings.bias_values[slot, :biases] = list(request.logit_bias.values())
    settings.needs_logprobs[slot] = request.needs_logprobs


def _logprobs(output: DecodeOutput, slot: int, count: int, alternatives: int) -> list[TokenLogprob]:
    top = (output.top_tokens[slot, :, :alternatives], output.top_logprobs[slot, :, :alternatives])
    return [
        TokenLogprob(
            int(output.tokens[slot, i]), float(output.logprob[slot, i]),
            tuple(zip(*(each[i].tolist() for each in top), strict=True)),
        )
        for i in range(count)
    ]
