"""POST /v1/completions: texts continued."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import partial

from jaxlm.evaluation.insight import TokenScores, score_tokens
from jaxlm.inference.engine.requests import Event, Request
from jaxlm.serving.models import Served
from jaxlm.serving.protocol.errors import ApiError
from jaxlm.serving.protocol.requests import MOST_CHOICES, CompletionRequest
from jaxlm.serving.protocol.responses import Completion, CompletionChoice, CompletionLogprobs, Usage
from jaxlm.serving.routes.generation import chosen, engine_request, floor, prompt_tokens, token_text, within
from jaxlm.serving.worker import Stream

_LENGTH = 16  # tokens of an answer where nobody says how many


class Completions:
    """One request: prompts read, work submitted, answers put together."""

    def __init__(self, served: Served, body: CompletionRequest, prompts: list[list[int]], seconds: float):
        self.served, self.body, self.prompts, self.seconds = served, body, prompts, seconds
        self.n = chosen(body.n)
        self.most = _LENGTH if body.max_tokens is None else body.max_tokens
        if body.max_tokens is None and served.lm.generation.max_new_tokens:
            self.most = served.lm.generation.max_new_tokens
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}
        self._texts = [""] * len(prompts)
        self._check()

    @classmethod
    async def of(cls, served: Served, body: CompletionRequest, seconds: float) -> Completions:
        return cls(served, body, await asyncio.to_thread(_prompts, served, body.prompt), seconds)

    def _check(self) -> None:
        body = self.body
        if self.most == 0 and not body.echo:
            raise ApiError(400, "max_tokens is 0: with echo that scores the prompt, without there is nothing to do",
                           param="max_tokens")
        if body.best_of is not None and body.best_of < self.n:
            raise ApiError(400, f"best_of is {body.best_of} and n {self.n}: give n or more", param="best_of")
        if body.best_of is not None and body.stream and body.best_of > self.n:
            raise ApiError(400, "best_of cannot be streamed: what is best is known at the end", param="best_of")
        if len(self.prompts) * max(self.n, body.best_of or 0) > MOST_CHOICES:
            raise ApiError(400, f"this asks for more than {MOST_CHOICES} answers at once", param="n")
        vocabulary = self.served.lm.config.vocab_size
        if wrong := next((t for prompt in self.prompts for t in prompt if not 0 <= t < vocabulary), None):
            raise ApiError(400, f"the prompt has the token {wrong}, and the model knows {vocabulary}", param="prompt")
        longest = max(map(len, self.prompts))
        if longest > self.served.context:
            raise ApiError(400, f"{self.served.name} reads {self.served.context} tokens: the prompt has {longest}",
                           param="prompt", code="context_length_exceeded")

    def requests(self) -> list[Request]:
        if self.most == 0:
            return []
        return [
            engine_request(
                self.served, self.body, prompt, most=self.most, logprobs=self.body.logprobs, best_of=self.body.best_of
            ) for prompt in self.prompts
        ]

    async def open(self) -> Stream | None:
        """Submits what is to be generated; to be followed by ``whole`` or ``parts``."""
        requests = self.requests()
        return await self.served.worker.open(requests).start() if requests else None

    async def whole(self, stream: Stream | None) -> Completion:
        """The answer in one piece."""
        choices: dict[int, CompletionChoice] = {}
        usage = Usage.of(sum(map(len, self.prompts)), 0)
        async for chunk in self._chunks(stream):
            for part in chunk.choices:
                choice = choices.setdefault(part.index, part)
                if choice is not part:
                    choices[part.index] = _joined(choice, part)
            usage = chunk.usage or usage
        return Completion(**self._head, choices=[choices[i] for i in sorted(choices)], usage=usage)

    async def parts(self, stream: Stream | None) -> AsyncIterator[Completion]:
        """The answer in pieces; the usage comes last, where it is asked for."""
        async for chunk in self._chunks(stream):
            if chunk.choices or (self.body.stream_options and self.body.stream_options.include_usage):
                yield chunk

    async def _chunks(self, stream: Stream | None) -> AsyncIterator[Completion]:
        written = 0
        try:
            if self.body.echo:
                async for choice in within(self.seconds, self._echoed()):
                    yield Completion(**self._head, choices=[choice])
            if stream is not None:
                async for place, event in within(self.seconds, aiter(stream)):
                    written += len(event.tokens)
                    if event.tokens or event.text or event.finish_reason:
                        yield Completion(**self._head, choices=[self._choice(place, event)])
        finally:
            if stream is not None:
                stream.close()
        yield Completion(**self._head, choices=[], usage=Usage.of(sum(map(len, self.prompts)), written))

    async def _echoed(self) -> AsyncIterator[CompletionChoice]:
        """The prompts themselves, scored where log-probabilities are asked for."""
        for place, prompt in enumerate(self.prompts):
            text, logprobs = self._prompt_text(place), None
            if self.body.logprobs is not None:
                job = partial(score_tokens, self.served.lm, prompt, top=self.body.logprobs)
                logprobs = self._scored(prompt, await self.served.worker.run(job))
            for i in range(self.n):
                yield CompletionChoice(
                    index=place * self.n + i, text=text, logprobs=logprobs,
                    finish_reason="length" if self.most == 0 else None,
                )

    def _prompt_text(self, place: int) -> str:
        given = self.body.prompt
        if isinstance(given, str):
            return given
        return given[place] if isinstance(given[0], str) else self.served.lm.tokenizer.decode(self.prompts[place])

    def _scored(self, prompt: Sequence[int], scored: TokenScores) -> CompletionLogprobs:
        first = token_text(self.served, prompt[0])
        out = CompletionLogprobs(
            tokens=[first], token_logprobs=[None], top_logprobs=[None] if self.body.logprobs else None, text_offset=[0]
        )
        rest = zip(prompt[1:], scored.logprobs, scored.top, strict=True)
        return self._listed(out, [(token, logprob, top) for token, logprob, top in rest], len(first))

    def _listed(self, out: CompletionLogprobs, tokens: Sequence[tuple], offset: int) -> CompletionLogprobs:
        for token, logprob, top in tokens:
            out.tokens.append(token_text(self.served, token))
            out.token_logprobs.append(floor(logprob))
            out.text_offset.append(offset)
            if out.top_logprobs is not None:
                out.top_logprobs.append({token_text(self.served, each): floor(value) for each, value in top})
            offset += len(out.tokens[-1])
        return out

    def _choice(self, place: int, event: Event) -> CompletionChoice:
        logprobs = None
        if self.body.logprobs is not None:
            out = CompletionLogprobs(top_logprobs=[] if self.body.logprobs else None)
            tokens = [(each.token, each.logprob, each.top[: self.body.logprobs]) for each in event.logprobs]
            logprobs = self._listed(out, tokens, 0)
        return CompletionChoice(
            index=place * self.n + event.index, text=event.text, logprobs=logprobs, finish_reason=event.finish_reason
        )


def _joined(a: CompletionChoice, b: CompletionChoice) -> CompletionChoice:
    logprobs = a.logprobs
    if a.logprobs is not None and b.logprobs is not None:
        begin = a.logprobs.text_offset[-1] + len(a.logprobs.tokens[-1]) if a.logprobs.tokens else 0
        shifted = b.logprobs.model_copy(update={"text_offset": [begin + at for at in b.logprobs.text_offset]})
        fields = {
            name: None if (first := getattr(a.logprobs, name)) is None else [*first, *getattr(shifted, name)]
            for name in CompletionLogprobs.model_fields
        }
        logprobs = CompletionLogprobs(**fields)
    return CompletionChoice(
        index=a.index, text=a.text + b.text, logprobs=logprobs, finish_reason=b.finish_reason or a.finish_reason
    )


def _prompts(served: Served, given) -> list[list[int]]:
    if isinstance(given, str):
        return [prompt_tokens(served, given)]
    if isinstance(given[0], int):
        return [list(given)]
    return [prompt_tokens(served, each) if isinstance(each, str) else list(each) for each in given]
