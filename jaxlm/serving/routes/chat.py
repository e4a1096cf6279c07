"""POST /v1/chat/completions: conversations answered."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

from jaxlm.inference.engine.requests import Event, TokenLogprob
from jaxlm.serving.models import Served
from jaxlm.serving.protocol.errors import ApiError
from jaxlm.serving.protocol.requests import ChatRequest
from jaxlm.serving.protocol.responses import (
    AnswerMessage,
    Chat,
    ChatChoice,
    ChatChunk,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    Delta,
    Usage,
)
from jaxlm.serving.routes.generation import alternative, chosen, engine_request, gather, joined_content, within
from jaxlm.serving.worker import Stream

__all__ = ["Answer"]


class Answer:
    """One request: the conversation written as a prompt, work submitted, answers put together."""

    def __init__(self, served: Served, body: ChatRequest, prompt: list[int], seconds: float):
        self.served, self.body, self.prompt, self.seconds = served, body, prompt, seconds
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        if body.max_tokens == 0:
            raise ApiError(400, "max_tokens is 0: give 1 or more", param="max_tokens")
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}

    @classmethod
    async def of(cls, served: Served, body: ChatRequest, seconds: float) -> Answer:
        """UserError where the model has no chat template, or it refuses the conversation."""
        return cls(served, body, await asyncio.to_thread(_prompt, served, body), seconds)

    async def open(self) -> Stream:
        """Submits it; to be followed by ``whole`` or ``parts``."""
        body = self.body
        most = body.max_completion_tokens or body.max_tokens or self.served.lm.generation.max_new_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        request = engine_request(self.served, body, self.prompt, most=most, logprobs=logprobs)
        return await self.served.worker.open([request]).start()

    async def whole(self, stream: Stream) -> Chat:
        """The answer in one piece."""
        found: dict[int, list[Event]] = {i: [] for i in range(chosen(self.body.n))}
        await gather(stream, self.seconds, lambda _, event: found[event.index].append(event))
        return Chat(
            **self._head, choices=[self._choice(i, events) for i, events in found.items()],
            usage=Usage.of(len(self.prompt), sum(len(event.tokens) for events in found.values() for event in events)),
        )

    async def parts(self, stream: Stream) -> AsyncIterator[ChatChunk]:
        """The answer in pieces; the usage comes last, where it is asked for."""
        written = 0
        try:
            for i in range(chosen(self.body.n)):
                yield self._chunk(ChatDelta(index=i, delta=Delta(role="assistant", content="")))
            async for _, event in within(self.seconds, aiter(stream)):
                written += len(event.tokens)
                if event.text or event.logprobs or event.finish_reason:
                    delta = Delta(content=event.text) if event.text or event.logprobs else Delta()
                    yield self._chunk(ChatDelta(
                        index=event.index, delta=delta, logprobs=self._logprobs(event.logprobs),
                        finish_reason=event.finish_reason,
                    ))
        finally:
            stream.close()
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield ChatChunk(**self._head, choices=[], usage=Usage.of(len(self.prompt), written))

    def _chunk(self, choice: ChatDelta) -> ChatChunk:
        return ChatChunk(**self._head, choices=[choice])

    def _choice(self, index: int, events: list[Event]) -> ChatChoice:
        return ChatChoice(
            index=index, message=AnswerMessage(content="".join(event.text for event in events)),
            logprobs=self._logprobs([each for event in events for each in event.logprobs]),
            finish_reason=events[-1].finish_reason,
        )

    def _logprobs(self, tokens: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return ChatLogprobs(content=[
            ChatLogprob(
                **alternative(self.served, each.token, each.logprob).model_dump(),
                top_logprobs=[
                    alternative(self.served, *other) for other in each.top[: self.body.top_logprobs or 0]
                ],
            ) for each in tokens
        ])


def _prompt(served: Served, body: ChatRequest) -> list[int]:
    messages = [
        {"role": message.role, "content": joined_content(message.content)}
        | ({} if message.name is None else {"name": message.name})
        for message in body.messages
    ]
    tokenizer = served.lm.tokenizer
    return tokenizer.encode_prompt(tokenizer.chat_template.render(messages), parse_special=True)
