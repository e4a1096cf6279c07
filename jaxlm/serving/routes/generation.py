"""What completions and chat have in common: from the fields of a request to those of the engine, and prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from jaxlm.inference.engine.requests import Constraint, Event, Request
from jaxlm.serving.models import Served
from jaxlm.serving.protocol.errors import ApiError, too_slow
from jaxlm.serving.protocol.requests import AnyObject, ByJsonSchema, Sampled
from jaxlm.serving.protocol.responses import Alternative
from jaxlm.serving.worker import Stream

T = TypeVar("T")


def engine_request(
    served: Served, body: Sampled, prompt: Sequence[int], *, most: int | None, logprobs: int | None,
    best_of: int | None = None,
) -> Request:
    """For ``prompt`` tokens and at most ``most`` new ones (None: as many as there is room for). ApiError if there is no
    such room."""
    room = served.context - len(prompt)
    if room < (most or 1):
        raise ApiError(
            400, f"{served.name} reads {served.context} tokens: the prompt has {len(prompt)}"
            + (f" and the answer may have {most} (max_tokens)" if most else " and leaves no room for an answer"),
            param="max_tokens" if most and room > 0 else None, code="context_length_exceeded",
        )
    temperature = body.temperature
    if temperature is None and not served.lm.generation.do_sample:
        temperature = 1.0  # OpenAI's
    stop = (body.stop,) if isinstance(body.stop, str) else body.stop
    return Request(
        tuple(prompt), max_new_tokens=most or room, temperature=temperature, top_k=body.top_k, top_p=body.top_p,
        min_p=body.min_p, repetition_penalty=body.repetition_penalty, presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        min_new_tokens=body.min_tokens, seed=None if body.seed is None else body.seed % 2**32,
        stop=None if stop is None else tuple(stop), stop_tokens=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos), logprobs=logprobs, n=chosen(body.n), best_of=best_of,
        constraint=constraint(body),
    )


def constraint(body: Sampled) -> Constraint | None:
    """What ``response_format`` asks for."""
    match body.response_format:
        case AnyObject():
            return Constraint(json={"type": "object"})
        case ByJsonSchema(json_schema=described):
            return Constraint(json=described.schema_)
    return None


def prompt_tokens(served: Served, text: str) -> list[int]:
    """Of a text, or what a text begins with where there is none."""
    tokenizer = served.lm.tokenizer
    return tokenizer.encode_prompt(text) or [_begin(served)]


def _begin(served: Served) -> int:
    tokenizer = served.lm.tokenizer
    return next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), served.lm.config.bos_id)


def token_text(served: Served, token: int) -> str:
    """A token by itself, special ones as they are spelled."""
    return served.lm.tokenizer.decode([token], skip_special=False)


def alternative(served: Served, token: int, logprob: float) -> Alternative:
    text = token_text(served, token)
    return Alternative(token=text, logprob=floor(logprob), bytes=None if "\ufffd" in text else list(text.encode()))


def floor(logprob: float) -> float:
    """What cannot come has a log-probability of minus infinity, which JSON has not; OpenAI says -9999."""
    return max(logprob, -9999.0)


async def within(seconds: float, work: AsyncIterator[T]) -> AsyncIterator[T]:
    """The items, for so long; ApiError 504 afterwards."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(end):
                item = await anext(work)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise too_slow(seconds) from None
        yield item


async def gather(stream: Stream, seconds: float, tell: Callable[[int, Event], None]) -> None:
    """Tells of every event until all have come, and closes the stream."""
    try:
        async for place, event in within(seconds, aiter(stream)):
            tell(place, event)
    finally:
        stream.close()


def chosen(n: int | None) -> int:
    return 1 if n is None else n


def joined_content(content: Any) -> str:
    """The text of a message, which may come in parts."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
