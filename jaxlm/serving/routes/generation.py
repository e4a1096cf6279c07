"""What completions and chat share: from the fields of a request to those of the engine, tokens, and deadlines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Protocol, TypeVar

from pydantic import BaseModel

from jaxlm.inference.engine.constraints import Constraint
from jaxlm.inference.engine.requests import Request
from jaxlm.serving.models import ServedModel
from jaxlm.serving.protocol.errors import context_length_exceeded, request_timeout, too_many_logprobs
from jaxlm.serving.protocol.requests import (
    MAX_RESPONSE_LOGPROBS,
    GenerationRequest,
    JsonObjectFormat,
    JsonSchemaFormat,
)
from jaxlm.serving.protocol.responses import TopLogprob
from jaxlm.serving.worker import GenerationStream

T = TypeVar("T")


class GenerationJob(Protocol):
    """One request that generates text. ``submit`` comes first, then either ``complete`` or ``stream``."""

    body: GenerationRequest

    async def submit(self) -> GenerationStream | None:
        """Gives the work to the engine; None if nothing is to be generated."""

    async def complete(self, events: GenerationStream | None) -> BaseModel:
        """The whole response."""

    def stream(self, events: GenerationStream | None) -> AsyncIterator[BaseModel]:
        """The response in parts; the usage comes last, if the request asks for it."""


def engine_request(
    served: ServedModel, body: GenerationRequest, prompt: Sequence[int], *, max_tokens: int | None,
    default_max_tokens: int | None = None, logprobs: int | None, best_of: int | None = None,
) -> Request:
    """The engine's request for a prompt of token ids.

    ``max_tokens`` is what the body asks for. If that is None, the number of new tokens is that of the server's owner,
    of the model's generation_config.json, or else ``default_max_tokens``, but never more than fit into the context.
    If nothing gives a number, the text may fill the context.

    Raises:
        ApiError: when prompt and ``max_tokens`` do not fit into the context.
    """
    room = served.context - len(prompt)
    if room < (max_tokens or 1):
        raise context_length_exceeded(
            served.name, served.context, len(prompt), max_tokens,
            param="max_tokens" if max_tokens and room > 0 else None,
        )
    if max_tokens is None:
        default = served.default_max_tokens or served.lm.generation.max_new_tokens or default_max_tokens
        max_tokens = min(default or room, room)
    temperature = body.temperature
    if temperature is None and not served.lm.generation.do_sample:
        temperature = 1.0  # OpenAI's default
    stop = (body.stop,) if isinstance(body.stop, str) else body.stop
    return Request(
        tuple(prompt), max_new_tokens=max_tokens, temperature=temperature, top_k=body.top_k,
        top_p=body.top_p, min_p=body.min_p, repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0, frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        min_new_tokens=body.min_tokens, seed=None if body.seed is None else body.seed % 2**32,
        stop=None if stop is None else tuple(stop), stop_tokens=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos), logprobs=logprobs, n=choice_count(body), best_of=best_of,
        constraint=_constraint(body),
    )


def _constraint(body: GenerationRequest) -> Constraint | None:
    """The constraint that ``response_format`` asks for."""
    match body.response_format:
        case JsonObjectFormat():
            return Constraint(json={"type": "object"})
        case JsonSchemaFormat(json_schema=described):
            return Constraint(json=described.schema_)
    return None


def check_logprobs(tokens: int, top: int | None) -> None:
    """For a response with that many tokens and ``top`` alternatives each (None: without log-probabilities).

    Raises:
        ApiError: when they are too many for one response.
    """
    if top is not None and tokens * (top + 1) > MAX_RESPONSE_LOGPROBS:
        raise too_many_logprobs(tokens, top, MAX_RESPONSE_LOGPROBS)


def check_collected_logprobs(body: GenerationRequest, requests: Sequence[Request]) -> None:
    """``check_logprobs`` of what the requests generate, if it is not streamed."""
    if not body.stream:
        for request in requests[:1]:
            tokens = sum(each.n * each.max_new_tokens for each in requests)
            check_logprobs(tokens, request.logprobs)


def choice_count(body: GenerationRequest) -> int:
    """How many continuations of a prompt the request asks for."""
    return 1 if body.n is None else body.n


def prompt_tokens(served: ServedModel, text: str) -> list[int]:
    """The token ids of a prompt; for an empty one, the token with which texts begin."""
    return served.lm.tokenizer.encode_prompt(text) or [_first_token(served)]


def _first_token(served: ServedModel) -> int:
    tokenizer = served.lm.tokenizer
    return next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), served.lm.config.bos_id)


def token_text(served: ServedModel, token: int) -> str:
    """The text of a single token; special tokens by their names."""
    return served.lm.tokenizer.decode([token], skip_special=False)


def top_logprob(served: ServedModel, token: int, logprob: float) -> TopLogprob:
    """A token with its log-probability as a chat response has it."""
    text = token_text(served, token)
    is_partial = "\ufffd" in text  # a part of a character
    return TopLogprob(token=text, logprob=finite_logprob(logprob), bytes=None if is_partial else list(text.encode()))


def finite_logprob(logprob: float) -> float:
    """JSON has no infinity: like OpenAI, an impossible token has the log-probability -9999."""
    return max(logprob, -9999.0)


async def with_deadline(items: AsyncIterator[T], seconds: float) -> AsyncIterator[T]:
    """The items that come within ``seconds`` from the first call on.

    Raises:
        ApiError: with status 504 when they take longer.
    """
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(end):
                item = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise request_timeout(seconds) from None
        yield item
