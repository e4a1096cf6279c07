"""The requests that an ``Engine`` takes, and the events and statistics that it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from jaxlm.core.errors import UserError
from jaxlm.inference.engine.constraints import Constraint, Grammar
from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.inference.sampling import check_sampling

__all__ = ["Event", "FinishReason", "Request", "Stats", "TokenLogprob"]

MAX_LOGPROBS = 20  # alternatives of a token at most; all of them are computed if any request asks for some
MAX_LOGIT_BIASES = 300  # entries of ``logit_bias``
_NEW_TOKENS = 64  # the limit where neither the request nor the model gives one
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    An option that is None has the value of the model's generation_config.json; where that says nothing, the text is
    greedy and has 64 tokens.

    ``n`` continuations are generated, each with its own random key. With ``best_of``, that number is generated, and the
    ``n`` with the highest mean log-probability of a token are returned once all are finished. A text ends before the
    first of the ``stop`` strings, at an end token of the model (unless ``ignore_eos``), or at one of ``stop_tokens``.
    ``logprobs=k`` asks for the log-probabilities of each token and of the k likeliest alternatives, by the model
    itself: before temperature, penalties and all other options.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int | None = None
    temperature: float | None = None  # 0: greedy; for this and the next three see ``sampling.Sampling``
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None  # for tokens of prompt and text (arXiv:1909.05858, section 4.1)
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the text has
    frequency_penalty: float = 0.0  # subtracted once for each time that the text has the token
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))  # token id: value to add
    min_new_tokens: int | None = None  # before an end token may come
    seed: int | None = None  # None: a new one for each request
    stop: tuple[str, ...] | None = None
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    constraint: Constraint | Grammar | None = None  # a compiled one is used as it is
    owner: tuple[str, ...] = ()  # for fairness, from the whole to the part: see ``Scheduler``

    @property
    def samples(self) -> int:
        """Continuations that are generated."""
        return max(self.n, self.best_of or 0)

    @property
    def needs_logprobs(self) -> bool:
        """Whether the log-probabilities of its tokens must be computed."""
        return self.logprobs is not None or self.samples > self.n

    def check(self, vocab_size: int) -> None:
        """Checks a request without None for the model's own settings (see ``resolved``).

        Raises:
            UserError: when an option is outside its range.
        """
        if not self.prompt:
            raise UserError("the prompt is empty: give at least one token")
        for name in ("prompt", "stop_tokens", "logit_bias"):
            if wrong := [token for token in getattr(self, name) if not 0 <= token < vocab_size]:
                raise UserError(f"{name} has the token {wrong[0]}, and the model knows {vocab_size}")
        check_sampling({name: getattr(self, name) for name in ("top_k", "top_p", "min_p")})
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 (1 is off)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a number (0 is off)"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a number (0 is off)"),
            ("min_new_tokens", self.min_new_tokens >= 0, "0 or more"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
            ("n", self.n >= 1, "1 or more"),
            ("best_of", self.best_of is None or self.best_of >= self.n, "n or more"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}: give {wanted}")
        if "" in self.stop:
            raise UserError("an empty stop string would end every text at once: leave it out")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise UserError(f"logit_bias names {len(self.logit_bias)} tokens: give at most {MAX_LOGIT_BIASES}")
        if not all(map(math.isfinite, self.logit_bias.values())):
            raise UserError("logit_bias has a value that is not finite: give -100 for a token that must not come")
        if isinstance(self.constraint, Constraint):
            self.constraint.check()

    def resolved(self, generation: GenerationConfig, context: int, vocab_size: int) -> Request:
        """The request with the model's own settings in place of None.

        Args:
            generation: the model's settings.
            context: tokens of a prompt and its continuation at most.
            vocab_size: tokens that the model knows.

        Raises:
            UserError: when an option is outside its range, or prompt and continuation do not fit.
        """
        own = generation.given(
            beam=1, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_new_tokens=self.max_new_tokens, min_new_tokens=self.min_new_tokens,
        )
        own.check()
        length = len(self.prompt)
        room = context - length
        if room < 1:
            raise UserError(f"the prompt has {length} tokens; with one more token there is room for {context}")
        temperature = own.temperature if own.do_sample else 0.0
        limit = min(own.limits([length], _NEW_TOKENS)[0], room)
        least = own.min_new_tokens or max(0, own.min_length - length)
        request = replace(
            self, prompt=tuple(map(int, self.prompt)),
            max_new_tokens=limit if self.max_new_tokens is None else self.max_new_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_k=own.top_k, top_p=own.top_p, min_p=own.min_p, repetition_penalty=own.repetition_penalty,
            min_new_tokens=0 if self.ignore_eos else least,
            stop=tuple(own.stop_strings if self.stop is None else self.stop),
        )
        request.check(vocab_size)
        if request.max_new_tokens > room:
            raise UserError(
                f"the prompt has {length} tokens, and {request.max_new_tokens} may follow; there is room for {context} "
                "together: lower max_new_tokens, or give a shorter prompt"
            )
        return request


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and those of the likeliest alternatives, best first. The token may be one."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability)


@dataclass(frozen=True)
class Event:
    """News of one continuation: what was generated since its last event, and whether it is finished.

    The texts of all events of a continuation are its text. A piece ends between two characters, and what may be the
    beginning of a stop string is held back. ``tokens`` are reported at once, even if their text is held back; they
    include those of a stop string, but not the end token. ``logprobs``, if asked for, are those of ``tokens``.

    ``finish_reason`` is "stop" at an end token, a stop string or the end of a constraint's text, "length" after
    ``max_new_tokens``, "cancelled", or "error", which ``message`` explains.
    """

    request_id: int
    index: int  # which of the request's ``n`` continuations
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    message: str = ""


@dataclass
class Stats:
    """What an engine holds now, and what it has done so far."""

    running: int = 0  # continuations in slots
    waiting: int = 0  # continuations in the queue
    pages: int = 0  # of the key/value cache
    pages_used: int = 0
    prefill_tokens: int = 0  # prompt tokens computed
    cached_tokens: int = 0  # prompt tokens found in pages of earlier requests
    generated_tokens: int = 0
    draft_tokens: int = 0  # tokens that the draft proposed
    accepted_tokens: int = 0  # of these, tokens that the model accepted
    preemptions: int = 0
    steps: int = 0
    compilations: int = 0  # programs compiled
