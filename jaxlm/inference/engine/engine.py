"""Many requests at once through one model: continuous batching over a paged cache (arXiv:2309.06180).

At every step each sequence in a slot gets one more token, and some tokens of new prompts are read beside that
(arXiv:2403.02310), so that neither waits for the other. What a request yields depends on itself alone: not on its
neighbours, on when it came, or on whether it was stopped in between.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence as Rowlike

from jaxlm.core.errors import UserError
from jaxlm.inference.detokenizer import Detokenizer
from jaxlm.inference.engine.block_allocator import BlockAllocator
from jaxlm.inference.engine.constraints import Grammars
from jaxlm.inference.engine.requests import Event, FinishReason, Request, Stats, TokenLogprob
from jaxlm.inference.engine.runner import Draws, Runner
from jaxlm.inference.engine.scheduler import Scheduler, Sequence
from jaxlm.inference.generation_config import PLAIN
from jaxlm.nn.config import KVCache

__all__ = ["Engine"]

_CONTEXT, _NEW_TOKENS = 2048, 64  # where nothing says how long a text may be


class Engine:
    """A model that serves requests. For one thread at a time."""

    def __init__(
        self, lm, *, slots: int = 8, context: int | None = None, page_size: int = 16, num_pages: int | None = None,
        prefill_chunk: int = 256, kv_cache: KVCache | None = None, draft=None, num_draft_tokens: int = 4,
    ):
        """``lm`` has ``config``, ``params``, ``tokenizer`` and ``generation``, and runs on the mesh that its parameters
        lie on: best on one that splits "tensor" alone, for the cache is split by heads and nothing else.

        Args:
            slots: sequences that run at once.
            context: tokens of a prompt and its continuation at most; None: what the model reads, up to 2,048.
            page_size: tokens in a page of the cache.
            num_pages: of the cache, for all sequences together; None: as many as all slots could need.
            prefill_chunk: tokens of prompts that are read at a step at most.
            kv_cache: how keys and values are kept (``nn.attention.kv_cache``); None: as the model has it.
            draft: a model of the same tokens that guesses ahead, such as a compressed copy of ``lm``.
            num_draft_tokens: how many tokens it guesses at a step.

        UserError where the model or an option is of no use.
        """
        models = [lm] if draft is None else [lm, draft]
        self.context = _context([model.config for model in models], context)
        needed = -(-self.context // page_size) if page_size > 0 else 1
        options = {
            "slots": slots, "page_size": page_size, "prefill_chunk": prefill_chunk,
            "num_draft_tokens": num_draft_tokens,
        }
        for name, value in options.items():
            if value < 1:
                raise UserError(f"{name} is {value}: give 1 or more")
        num_pages = slots * needed if num_pages is None else num_pages
        if num_pages < needed:
            raise UserError(
                f"{num_pages} pages of {page_size} tokens do not hold one text of {self.context}: give {needed} or more"
            )
        if draft is not None and draft.config.vocab_size != lm.config.vocab_size:
            raise UserError(
                f"the draft knows {draft.config.vocab_size} tokens and the model {lm.config.vocab_size}: they must be "
                "the same"
            )
        if kv_cache is not None:
            models = [_configured(model, kv_cache) for model in models]
        self.lm = lm
        self._generation = getattr(lm, "generation", PLAIN)
        self._generation.check()
        self._ends = frozenset(self._generation.eos_token_id or (lm.config.eos_id,))
        self._grammars = Grammars(lm.tokenizer, lm.config.vocab_size, tuple(sorted(self._ends)))
        self._scheduler = Scheduler(
            BlockAllocator(num_pages), slots=slots, size=page_size, chunk=prefill_chunk,
            drafts=0 if draft is None else num_draft_tokens,
        )
        self._runner = Runner(
            models, self._generation, slots=slots, context=self.context, page=page_size, pages=num_pages,
            chunk=prefill_chunk, guesses=num_draft_tokens,
        )
        self._stats = Stats(pages=num_pages)
        self._open: dict[int, list[Sequence]] = {}  # what is not finished of each request
        self._best: dict[int, dict[int, list[tuple[float, Event]]]] = {}  # continuations to choose from
        self._events: list[Event] = []
        self._count = 0

    def submit(self, request: Request) -> int:
        """Queues a request and gives its number. UserError for what cannot be served."""
        request = self._resolved(request)
        constraint, seed = request.constraint, request.seed
        seed = secrets.randbits(32) if seed is None else seed % 2**32
        number, tokenizer, group = self._count + 1, self.lm.tokenizer, []
        for index in range(request.samples):
            text = None if tokenizer is None else Detokenizer(tokenizer, request.prompt, request.stop)
            matcher = None if constraint is None else self._grammars.matcher(constraint)
            group.append(Sequence(number, index, request, seed, list(request.prompt), text, matcher))
        self._count, self._open[number] = number, group
        for sequence in group:
            self._scheduler.add(sequence)
        if request.samples > request.n:
            self._best[number] = {}
        return number

    def cancel(self, number: int) -> None:
        """Ends a request: its continuations that are not finished get a last event. An unknown one is no error."""
        chosen = self._best.pop(number, None) is not None
        group = self._open.pop(number, [])
        left = range(group[0].request.n) if chosen else [sequence.index for sequence in group]
        self._events += [Event(number, index, finish_reason="cancelled") for index in left]
        for sequence in group:
            self._scheduler.remove(sequence)

    def step(self) -> list[Event]:
        """One step of work, and what came of it."""
        scheduler, stats = self._scheduler, self._stats
        scheduler.grow()
        for sequence, begin, count in scheduler.parts():
            self._runner.read(sequence, begin, count)
            stats.prefill_tokens += count
        ready = [sequence for sequence in scheduler.ready() if self._prepare(sequence)]
        if ready:
            guesses = [scheduler.guesses(sequence) for sequence in ready]
            for draws in self._runner.draw(ready, guesses):
                self._advance(draws)
                stats.accepted_tokens += len(draws.tokens) - 1
            stats.draft_tokens += sum(guesses)
        stats.steps += 1
        events, self._events = self._events, []
        return events

    @property
    def busy(self) -> bool:
        """Whether ``step`` has anything to do or to tell."""
        return bool(self._open or self._events)

    @property
    def stats(self) -> Stats:
        """What it does and has done."""
        scheduler = self._scheduler
        return dataclasses.replace(
            self._stats, running=len(scheduler.running), waiting=len(scheduler.waiting),
            pages_used=scheduler.ledger.used, cached_tokens=scheduler.hit, preemptions=scheduler.preemptions,
            compiles=self._runner.compiles,
        )

    def warm_up(self) -> None:
        """Compiles everything; afterwards nothing compiles."""
        self._runner.warm_up()

    def _resolved(self, request: Request) -> Request:
        """With the model's own settings where a request has none. UserError for what cannot be served."""
        generation = self._generation.given(
            top_k=request.top_k, top_p=request.top_p, min_p=request.min_p,
            repetition_penalty=request.repetition_penalty, max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.min_new_tokens,
        )
        length = len(request.prompt)
        room = self.context - length
        if room < 1:
            raise UserError(f"the prompt has {length} tokens, and with a token more there is room for {self.context}")
        own_temperature = generation.temperature if generation.do_sample else 0.0
        limit = generation.limits([length], _NEW_TOKENS)[0]
        least = generation.min_new_tokens or max(0, generation.min_length - length)
        request = dataclasses.replace(
            request, prompt=tuple(map(int, request.prompt)),
            max_new_tokens=min(limit, room) if request.max_new_tokens is None else request.max_new_tokens,
            temperature=own_temperature if request.temperature is None else request.temperature,
            top_k=generation.top_k, top_p=generation.top_p, min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
            min_new_tokens=0 if request.ignore_eos else least,
            stop=tuple(generation.stop_strings if request.stop is None else request.stop),
        )
        request.check(self.lm.config.vocab_size)
        if request.max_new_tokens > room:
            raise UserError(
                f"the prompt has {length} tokens, and {request.max_new_tokens} may follow; there is room for "
                f"{self.context}: lower max_new_tokens, or give a shorter prompt"
            )
        if request.stop and self.lm.tokenizer is None:
            raise UserError("stop strings need a tokenizer: put a tokenizer.json beside the model's config.json")
        return request

    def _prepare(self, sequence: Sequence) -> bool:
        """Whether a sequence can go on; one whose constraint turns out to be too much for the library ends."""
        if sequence.matcher is not None:
            try:
                sequence.matcher.prepare()
            except UserError as error:
                self._tell(sequence, [], [], "", "error", str(error))
                return False
        return True

    def _advance(self, draws: Draws) -> None:
        """Takes in the tokens that were drawn, up to the first that ends the text, and tells of them."""
        sequence, request = draws.sequence, draws.sequence.request
        tokens, text, finish, message, complete = [], "", None, "", False
        for token in draws.tokens:
            ends = token in self._ends and not request.ignore_eos or token in request.stop_tokens
            if sequence.matcher is not None and not ends:
                try:
                    complete = sequence.matcher.consume(token)
                except UserError as error:
                    finish, message = "error", str(error)
                    break
            if ends:
                finish = "stop"
                break
            tokens.append(token)
            sequence.tokens.append(token)
            if sequence.text is not None:
                text += sequence.text.push(token)
            if complete or sequence.text is not None and sequence.text.stopped:
                finish = "stop"
            elif sequence.drawn == request.max_new_tokens:
                finish = "length"
            if finish:
                break
        self._stats.generated_tokens += len(tokens)
        sequence.logprob += sum(each.logprob for each in draws.logprobs[: len(tokens)])
        self._scheduler.has_read(sequence, len(sequence.tokens) - 1)
        logprobs = [] if request.logprobs is None else draws.logprobs[: len(tokens)]
        self._tell(sequence, tokens, logprobs, text, finish, message)

    def _tell(
        self, sequence: Sequence, tokens: list[int], logprobs: Rowlike[TokenLogprob], text: str,
        finish: FinishReason | None, message: str = "",
    ) -> None:
        number, request = sequence.number, sequence.request
        if finish is not None:
            text += sequence.text.finish() if sequence.text is not None else ""
            self._scheduler.remove(sequence)
            self._open[number].remove(sequence)
            if not self._open[number]:
                del self._open[number]
        event = Event(number, sequence.index, tuple(tokens), text, tuple(logprobs), finish, message)
        if number not in self._best:
            self._events.append(event)
            return
        score = sequence.logprob / max(sequence.drawn, 1)
        self._best[number].setdefault(sequence.index, []).append((score, event))
        if number not in self._open:
            self._events += _best(self._best.pop(number), request.n)


def _best(told: dict[int, list[tuple[float, Event]]], count: int) -> list[Event]:
    """The events of the ``count`` continuations that are likeliest a token in the end, numbered anew, best first; the
    scores are those of each continuation so far."""
    ranked = sorted(told, key=lambda index: (-told[index][-1][0], index))[:count]
    return [
        dataclasses.replace(event, index=rank) for rank, index in enumerate(ranked) for _, event in told[index]
    ]


def _context(configs: Rowlike, asked: int | None) -> int:
    """Tokens that a text may have. UserError where that is more than a model can read, or one is not for this."""
    most = []
    for config in configs:
        if config.kind != "decoder":
            raise UserError(
                f"an engine serves decoders with attention, not a model of kind {config.kind!r}: use generate or "
                "translate"
            )
        # Rotations by the length of the text would differ from request to request in pages that they share.
        method = config.rope_scaling.method if config.positions == "rotary" else "none"
        if config.positions == "learned" or method == "dynamic":
            most.append(config.max_positions)
        elif method == "longrope":
            most.append(config.rope_scaling.original_positions)
    if asked is None:
        return min(_CONTEXT, configs[0].max_positions, *most)
    if asked < 2 or asked > min(most, default=asked):
        raise UserError(f"context is {asked}: give 2 to {min(most)}" if most else f"context is {asked}: give 2 or more")
    return asked


def _configured(model, kv_cache: KVCache):
    return dataclasses.replace(model, config=dataclasses.replace(model.config, kv_cache=kv_cache))
