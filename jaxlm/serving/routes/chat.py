"""POST /v1/chat/completions: answers conversations."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence

from jaxlm.inference.engine.requests import Event, TokenLogprob
from jaxlm.serving.models import ServedModel
from jaxlm.serving.protocol.errors import invalid_field
from jaxlm.serving.protocol.requests import ChatCompletionRequest
from jaxlm.serving.protocol.responses import (
    ChatCompletion,
    ChatCompletionChoice,
    ChatCompletionChunk,
    ChatCompletionChunkChoice,
    ChatCompletionMessage,
    ChatCompletionTokenLogprob,
    ChoiceDelta,
    ChoiceLogprobs,
    Usage,
)
from jaxlm.serving.routes.generation import check_collected_logprobs, choice_count, engine_request, top_logprob
from jaxlm.serving.worker import Caller, GenerationStream

__all__ = ["ChatCompletionJob"]


class ChatCompletionJob:
    """One request: writes the conversation as a prompt, submits it, and puts the response together.

    Raises:
        ApiError: when fields contradict each other.
    """

    def __init__(self, served: ServedModel, body: ChatCompletionRequest, prompt: list[int], caller: Caller):
        if body.top_logprobs is not None and not body.logprobs:
            raise invalid_field("top_logprobs", "top_logprobs needs logprobs: true")
        if body.max_tokens == 0:
            raise invalid_field("max_tokens", "max_tokens is 0: give 1 or more")
        self.served, self.body, self.prompt, self.caller = served, body, prompt, caller
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": served.name}

    @classmethod
    async def create(cls, served: ServedModel, body: ChatCompletionRequest, caller: Caller) -> ChatCompletionJob:
        """Tokenizes the conversation in a thread.

        Raises:
            UserError: when the model has no chat template, or the template refuses the conversation.
        """
        return cls(served, body, await asyncio.to_thread(_prompt_tokens, served, body), caller)

    async def submit(self) -> GenerationStream:
        """Gives the request to the engine."""
        body = self.body
        most = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        request = engine_request(self.served, body, self.prompt, max_tokens=most, logprobs=logprobs)
        check_collected_logprobs(body, [request])
        return await self.served.worker.submit([request], self.caller)

    async def complete(self, events: GenerationStream) -> ChatCompletion:
        """The whole response."""
        found: dict[int, list[Event]] = {i: [] for i in range(choice_count(self.body))}
        try:
            async for _, event in events:
                found[event.index].append(event)
        finally:
            events.close()
        written = sum(len(event.tokens) for each in found.values() for event in each)
        choices = await asyncio.to_thread(lambda: [self._choice(index, each) for index, each in found.items()])
        return ChatCompletion(**self._head, choices=choices, usage=Usage.of(len(self.prompt), written))

    async def stream(self, events: GenerationStream) -> AsyncIterator[ChatCompletionChunk]:
        """The response in parts; the usage comes last, if the request asks for it."""
        written = 0
        try:
            for i in range(choice_count(self.body)):
                yield self._chunk(
                    ChatCompletionChunkChoice(index=i, delta=ChoiceDelta(role="assistant", content=""))
                )
            async for _, event in events:
                written += len(event.tokens)
                if event.text or event.logprobs or event.finish_reason:
                    delta = ChoiceDelta(content=event.text) if event.text or event.logprobs else ChoiceDelta()
                    yield self._chunk(ChatCompletionChunkChoice(
                        index=event.index, delta=delta, logprobs=self._logprobs(event.logprobs),
                        finish_reason=event.finish_reason,
                    ))
        finally:
            events.close()
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield ChatCompletionChunk(**self._head, choices=[], usage=Usage.of(len(self.prompt), written))

    def _chunk(self, choice: ChatCompletionChunkChoice) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head, choices=[choice])

    def _choice(self, index: int, events: list[Event]) -> ChatCompletionChoice:
        return ChatCompletionChoice(
            index=index, message=ChatCompletionMessage(content="".join(event.text for event in events)),
            logprobs=self._logprobs([each for event in events for each in event.logprobs]),
            finish_reason=events[-1].finish_reason,
        )

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> ChoiceLogprobs | None:
        if not self.body.logprobs:
            return None
        most = self.body.top_logprobs or 0
        return ChoiceLogprobs(content=[
            ChatCompletionTokenLogprob(
                **top_logprob(self.served, each.token, each.logprob).model_dump(),
                top_logprobs=[top_logprob(self.served, *other) for other in each.top[:most]],
            ) for each in tokens
        ])


def _prompt_tokens(served: ServedModel, body: ChatCompletionRequest) -> list[int]:
    messages = [
        {"role": message.role, "content": message.text} | ({} if message.name is None else {"name": message.name})
        for message in body.messages
    ]
    return served.lm.tokenizer.encode_chat(messages)
