"""POST /v1/completions: continues texts."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from jaxlm.evaluation.insight import TokenScores, score_slices
from jaxlm.inference.engine.requests import Event, Request
from jaxlm.serving.models import ServedModel
from jaxlm.serving.protocol.errors import context_length_exceeded, invalid_field, too_many_choices
from jaxlm.serving.protocol.requests import MAX_CHOICES, CompletionRequest
from jaxlm.serving.protocol.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from jaxlm.serving.routes.generation import (
    check_collected_logprobs,
    check_logprobs,
    choice_count,
    engine_request,
    finite_logprob,
    prompt_tokens,
    token_text,
    with_deadline,
)
from jaxlm.serving.worker import Caller, GenerationStream

__all__ = ["CompletionJob"]

_DEFAULT_MAX_TOKENS = 16  # OpenAI's default

ScoredToken = tuple[int, float, Sequence[tuple[int, float]]]  # token, log-probability, the most likely alternatives


class CompletionJob:
    """One request: tokenizes the prompts, submits them, and puts the response together.

    Raises:
        ApiError: when fields contradict each other or a prompt cannot be served.
    """

    def __init__(self, served: ServedModel, body: CompletionRequest, prompts: list[list[int]], caller: Caller):
        self.served, self.body, self.prompts, self.caller = served, body, prompts, caller
        self.n = choice_count(body)
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        self._check()

    @classmethod
    async def create(cls, served: ServedModel, body: CompletionRequest, caller: Caller) -> CompletionJob:
        """Tokenizes the prompts in a thread."""
        return cls(served, body, await asyncio.to_thread(_tokenized, served, body.prompt), caller)

    def _check(self) -> None:
        body, served = self.body, self.served
        if body.max_tokens == 0 and not body.echo:
            raise invalid_field("max_tokens", "max_tokens is 0: give 1 or more, or echo: true to score the prompt")
        if body.best_of is not None and body.best_of < self.n:
            raise invalid_field("best_of", f"best_of is {body.best_of} and n is {self.n}: give best_of of n or more")
        if body.best_of is not None and body.stream and body.best_of > self.n:
            raise invalid_field("best_of", "best_of greater than n cannot be streamed: the best are known at the end")
        if (count := len(self.prompts) * max(self.n, body.best_of or 0)) > MAX_CHOICES:
            raise too_many_choices(count, MAX_CHOICES)
        vocabulary = served.lm.config.vocab_size
        if unknown := next((t for prompt in self.prompts for t in prompt if not 0 <= t < vocabulary), None):
            raise invalid_field("prompt", f"the prompt has token {unknown}, and the vocabulary has {vocabulary} tokens")
        if (longest := max(map(len, self.prompts))) > served.context:
            raise context_length_exceeded(served.name, served.context, longest, param="prompt")
        if body.echo:
            check_logprobs(sum(map(len, self.prompts)) * self.n, body.logprobs)

    def _requests(self) -> list[Request]:
        if self.body.max_tokens == 0:
            return []
        return [
            engine_request(
                self.served, self.body, prompt, max_tokens=self.body.max_tokens,
                default_max_tokens=_DEFAULT_MAX_TOKENS, logprobs=self.body.logprobs, best_of=self.body.best_of,
            ) for prompt in self.prompts
        ]

    async def submit(self) -> GenerationStream | None:
        """Gives the requests to the engine; None if nothing is to be generated."""
        requests = self._requests()
        check_collected_logprobs(self.body, requests)
        return await self.served.worker.submit(requests, self.caller) if requests else None

    async def complete(self, events: GenerationStream | None) -> Completion:
        """The whole response."""
        parts: dict[int, list[CompletionChoice]] = {}
        usage = Usage.of(sum(map(len, self.prompts)), 0)
        async for chunk in self._chunks(events):
            for part in chunk.choices:
                parts.setdefault(part.index, []).append(part)
            usage = chunk.usage or usage
        choices = await asyncio.to_thread(lambda: [_joined(parts[i]) for i in sorted(parts)])
        return Completion(**self._head, choices=choices, usage=usage)

    async def stream(self, events: GenerationStream | None) -> AsyncIterator[Completion]:
        """The response in parts; the usage comes last, if the request asks for it."""
        async for chunk in self._chunks(events):
            if chunk.choices or (self.body.stream_options and self.body.stream_options.include_usage):
                yield chunk

    async def _chunks(self, events: GenerationStream | None) -> AsyncIterator[Completion]:
        written = 0
        try:
            if self.body.echo:
                async for choice in with_deadline(self._echoed(), self.caller.timeout):
                    yield Completion(**self._head, choices=[choice])
            if events is not None:
                async for number, event in events:
                    written += len(event.tokens)
                    if event.tokens or event.text or event.finish_reason:
                        yield Completion(**self._head, choices=[self._choice(number, event)])
        finally:
            if events is not None:
                events.close()
        yield Completion(**self._head, choices=[], usage=Usage.of(sum(map(len, self.prompts)), written))

    async def _echoed(self) -> AsyncIterator[CompletionChoice]:
        """The prompts, with their log-probabilities if the request asks for them."""
        for number, prompt in enumerate(self.prompts):
            text, logprobs = self._prompt_text(number), None
            if self.body.logprobs is not None:
                slices = score_slices(self.served.lm, prompt, top=self.body.logprobs)
                scored = await self.served.worker.run(slices, self.caller.client)
                logprobs = await asyncio.to_thread(self._prompt_logprobs, prompt, scored)
            for i in range(self.n):
                yield CompletionChoice(
                    index=number * self.n + i, text=text, logprobs=logprobs,
                    finish_reason="length" if self.body.max_tokens == 0 else None,
                )

    def _prompt_text(self, number: int) -> str:
        given = self.body.prompt
        if isinstance(given, str):
            return given
        return given[number] if isinstance(given[0], str) else self.served.lm.tokenizer.decode(self.prompts[number])

    def _prompt_logprobs(self, prompt: Sequence[int], scored: TokenScores) -> CompletionLogprobs:
        first = token_text(self.served, prompt[0])
        out = CompletionLogprobs(
            tokens=[first], token_logprobs=[None], top_logprobs=[None] if self.body.logprobs else None, text_offset=[0]
        )
        return self._appended(out, list(zip(prompt[1:], scored.logprobs, scored.top, strict=True)), len(first))

    def _appended(self, out: CompletionLogprobs, tokens: Sequence[ScoredToken], offset: int) -> CompletionLogprobs:
        """``out`` with more tokens, the first of which begins at ``offset`` in the text."""
        for token, logprob, top in tokens:
            out.tokens.append(token_text(self.served, token))
            out.token_logprobs.append(finite_logprob(logprob))
            out.text_offset.append(offset)
            if out.top_logprobs is not None:
                out.top_logprobs.append({token_text(self.served, each): finite_logprob(value) for each, value in top})
            offset += len(out.tokens[-1])
        return out

    def _choice(self, number: int, event: Event) -> CompletionChoice:
        logprobs = None
        if self.body.logprobs is not None:
            out = CompletionLogprobs(top_logprobs=[] if self.body.logprobs else None)
            tokens = [(each.token, each.logprob, each.top[: self.body.logprobs]) for each in event.logprobs]
            logprobs = self._appended(out, tokens, 0)
        return CompletionChoice(
            index=number * self.n + event.index, text=event.text, logprobs=logprobs, finish_reason=event.finish_reason
        )


def _joined(parts: Sequence[CompletionChoice]) -> CompletionChoice:
    """Consecutive parts of a choice as one."""
    logprobs = None
    if parts[0].logprobs is not None:
        logprobs = CompletionLogprobs(top_logprobs=None if parts[0].logprobs.top_logprobs is None else [])
        end = 0
        for part in (part.logprobs for part in parts if part.logprobs is not None):
            logprobs.tokens += part.tokens
            logprobs.token_logprobs += part.token_logprobs
            logprobs.text_offset += [end + at for at in part.text_offset]
            if logprobs.top_logprobs is not None:
                logprobs.top_logprobs += part.top_logprobs
            end += sum(map(len, part.tokens))
    finish_reason = next((part.finish_reason for part in reversed(parts) if part.finish_reason), None)
    return CompletionChoice(
        index=parts[0].index, text="".join(part.text for part in parts), logprobs=logprobs, finish_reason=finish_reason
    )


def _tokenized(served: ServedModel, given: str | list[int] | list[str] | list[list[int]]) -> list[list[int]]:
    """The token ids of each prompt."""
    if isinstance(given, str):
        return [prompt_tokens(served, given)]
    if isinstance(given[0], int):
        return [list(given)]
    return [prompt_tokens(served, each) if isinstance(each, str) else list(each) for each in given]
