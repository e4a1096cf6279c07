"""Many requests at once through one model: continuous batching over a paged key/value cache (arXiv:2309.06180).

In every step each running sequence gets one more token, and some prompt tokens of new sequences are read beside that
(chunked prefill, arXiv:2403.02310), so that neither waits for the other. What a request yields depends on the request
alone: not on its neighbours, on when it came, or on whether it was preempted.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence as Rowlike
from typing import Any

from jaxlm.core.config import from_dict
from jaxlm.core.errors import UserError
from jaxlm.inference.detokenizer import Detokenizer
from jaxlm.inference.engine.block_allocator import BlockAllocator
from jaxlm.inference.engine.constraints import Constraint, GrammarCompiler
from jaxlm.inference.engine.options import EngineOptions
from jaxlm.inference.engine.outputs import EventQueue
from jaxlm.inference.engine.requests import Event, FinishReason, Request, Stats, TokenLogprob
from jaxlm.inference.engine.runner import Runner, SequenceOutput
from jaxlm.inference.engine.scheduler import Scheduler, Sequence
from jaxlm.inference.protocol import InferenceModel

__all__ = ["Engine"]


class Engine:
    """A model that serves requests. It is for one thread at a time.

    ``submit`` requests, then call ``step`` as long as the engine is ``busy``: it returns what was generated.

    Attributes:
        lm: the model.
        context: tokens of a prompt and its continuation at most.
        grammars: compiles constraints, in any thread.
    """

    def __init__(self, lm: InferenceModel, *, draft: InferenceModel | None = None, **options: Any):
        """
        Args:
            lm: a language model. It runs on the mesh of its parameters; one that splits "tensor" alone is best, for the
                key/value cache is split by heads and nothing else.
            draft: a model with the same tokens that proposes tokens ahead (speculative decoding), such as a compressed
                copy of ``lm``.
            options: fields of ``EngineOptions``: slots, context, page_size, num_pages, prefill_chunk, kv_cache,
                num_draft_tokens.

        Raises:
            UserError: when an option is unknown or outside its range, or a model cannot be served.
        """
        resolved = from_dict(EngineOptions, options).resolved(lm.config, None if draft is None else draft.config)
        self.lm, self.context = lm, resolved.context
        lm.generation.replace(num_beams=1).check()
        vocab_size = lm.config.vocab_size
        self._eos_ids = frozenset(lm.generation.eos_token_id or (lm.config.eos_id,))
        self.grammars = GrammarCompiler(lm.tokenizer, vocab_size, tuple(sorted(self._eos_ids)))
        self._scheduler = Scheduler(
            BlockAllocator(resolved.num_pages), slots=resolved.slots, page_size=resolved.page_size,
            prefill_chunk=resolved.prefill_chunk, num_draft_tokens=resolved.num_draft_tokens,
            rotation=resolved.rotation,
        )
        params = (lm.params,) if draft is None else (lm.params, draft.params)
        self._runner = Runner(params, lm.generation, resolved)
        self._stats = Stats(pages=resolved.num_pages)
        self._unfinished: dict[int, list[Sequence]] = {}  # the sequences of each request
        self._events = EventQueue()
        self._last_id = 0

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id, by which events name it.

        Raises:
            UserError: when the request cannot be served; then nothing is queued.
        """
        lm = self.lm
        request = request.resolved(lm.generation, self.context, lm.config.vocab_size)
        if request.stop and lm.tokenizer is None:
            raise UserError("stop strings need a tokenizer: put a tokenizer.json beside the model's config.json")
        if request.stop:  # decoded texts do not show special tokens
            special = lm.tokenizer.backend.special_tokens
            stop_tokens = (special[text] for text in request.stop if text in special)
            request = dataclasses.replace(request, stop_tokens=(*request.stop_tokens, *stop_tokens))
        seed = secrets.randbits(32) if request.seed is None else request.seed % 2**32
        grammar = request.constraint
        if isinstance(grammar, Constraint):
            grammar = self.grammars.compile(grammar)
        request_id, sequences = self._last_id + 1, []
        for index in range(request.samples):
            detokenizer = None if lm.tokenizer is None else Detokenizer(lm.tokenizer, request.prompt, request.stop)
            matcher = None if grammar is None else grammar.matcher()
            sequences.append(
                Sequence(request_id, index, request, seed, list(request.prompt), detokenizer, matcher)
            )
        self._last_id, self._unfinished[request_id] = request_id, sequences
        for sequence in sequences:
            self._scheduler.add(sequence)
        if request.samples > request.n:
            self._events.hold(request_id)
        return request_id

    def cancel(self, request_id: int) -> None:
        """Ends a request: its unfinished continuations get a last event. An unknown id is not an error."""
        sequences = self._unfinished.pop(request_id, [])
        self._events.cancel(request_id, sequences)
        for sequence in sequences:
            self._scheduler.remove(sequence)

    def step(self) -> list[Event]:
        """Does one step of work, and returns the events since the last step."""
        scheduler, stats = self._scheduler, self._stats
        scheduler.reserve_pages()
        for chunk in scheduler.schedule_prefill():
            self._runner.prefill(chunk)
            stats.prefill_tokens += chunk.count
        sequences = [sequence for sequence in scheduler.decoding() if self._prepare_matcher(sequence)]
        if sequences:
            num_draft_tokens = [scheduler.draft_budget(sequence) for sequence in sequences]
            for output in self._runner.decode(sequences, num_draft_tokens):
                self._process(output)
                stats.accepted_tokens += len(output.tokens) - 1
            stats.draft_tokens += sum(num_draft_tokens)
        stats.steps += 1
        return self._events.take()

    @property
    def busy(self) -> bool:
        """Whether there is work for ``step`` to do or an event for it to return."""
        return bool(self._unfinished or self._events)

    @property
    def stats(self) -> Stats:
        """What the engine holds now, and what it has done so far."""
        scheduler = self._scheduler
        return dataclasses.replace(
            self._stats, running=len(scheduler.running), waiting=len(scheduler.waiting),
            pages_used=scheduler.allocator.used, cached_tokens=scheduler.cached_tokens,
            preemptions=scheduler.preemptions, compilations=self._runner.compilations,
        )

    def warm_up(self) -> None:
        """Compiles every program that the engine uses. No request causes a compilation afterwards."""
        self._runner.warm_up()

    def _prepare_matcher(self, sequence: Sequence) -> bool:
        """Whether a sequence can go on. It ends with an error when the library gives up on its constraint."""
        if sequence.matcher is not None:
            try:
                sequence.matcher.prepare()
            except UserError as error:
                self._emit(sequence, [], [], "", "error", str(error))
                return False
        return True

    def _process(self, output: SequenceOutput) -> None:
        """Adds new tokens to a sequence, up to the first that ends the text, and emits an event."""
        sequence, request = output.sequence, output.sequence.request
        tokens, text, finish_reason, message = [], "", None, ""
        for token in output.tokens:
            if token in self._eos_ids and not request.ignore_eos or token in request.stop_tokens:
                finish_reason = "stop"
                break
            complete = False
            if sequence.matcher is not None:
                try:
                    complete = sequence.matcher.consume(token)
                except UserError as error:
                    finish_reason, message = "error", str(error)
                    break
            tokens.append(token)
            sequence.tokens.append(token)
            if sequence.detokenizer is not None:
                text += sequence.detokenizer.push(token)
            if complete or sequence.detokenizer is not None and sequence.detokenizer.stopped:
                finish_reason = "stop"
            elif sequence.num_generated == request.max_new_tokens:
                finish_reason = "length"
            if finish_reason:
                break
        self._stats.generated_tokens += len(tokens)
        sequence.logprob += sum(each.logprob for each in output.logprobs[: len(tokens)])
        self._scheduler.mark_decoded(sequence)
        logprobs = [] if request.logprobs is None else output.logprobs[: len(tokens)]
        self._emit(sequence, tokens, logprobs, text, finish_reason, message)

    def _emit(
        self, sequence: Sequence, tokens: list[int], logprobs: Rowlike[TokenLogprob], text: str,
        finish_reason: FinishReason | None, message: str = "",
    ) -> None:
        """Adds an event of a sequence. A sequence with a ``finish_reason`` leaves its slot."""
        request_id, finished = sequence.request_id, False
        if finish_reason is not None:
            text += sequence.detokenizer.finish() if sequence.detokenizer is not None else ""
            self._scheduler.remove(sequence)
            self._unfinished[request_id].remove(sequence)
            finished = not self._unfinished[request_id]
        self._events.put(
            Event(request_id, sequence.index, tuple(tokens), text, tuple(logprobs), finish_reason, message), sequence
        )
        if finished:
            del self._unfinished[request_id]
            self._events.release_best(request_id, sequence.request.n)
