"""What an ``Engine`` is asked for and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from jaxlm.core.errors import UserError

__all__ = ["Constraint", "Event", "FinishReason", "Request", "Stats", "TokenLogprob"]

MAX_LOGPROBS = 20  # alternatives a token, at most: what is computed where anybody asks for some
MAX_LOGIT_BIASES = 300  # entries of ``logit_bias``, at most
FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Constraint:
    """What the text must be: exactly one of the three.

    ``json`` is a JSON schema (``{"type": "object"}``: any object), ``regex`` a regular expression for the whole text,
    ``choice`` the texts there are to choose from.
    """

    json: Mapping[str, Any] | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def check(self) -> None:
        """UserError unless it is one of the three."""
        if sum((self.json is not None, self.regex is not None, bool(self.choice))) != 1:
            raise UserError("a constraint is either a JSON schema, or a regular expression, or a choice of texts")


@dataclass(frozen=True)
class Request:
    """A prompt and how to go on from it. Where an option is None it is as generation_config.json of the model has it;
    where that says nothing, greedy, and 64 tokens.

    ``n`` continuations are drawn, each by its own key; of ``best_of`` of them the ``n`` likeliest a token are answered,
    once all are there. The text ends before the first of the ``stop`` strings, at an end token of the model (unless
    ``ignore_eos``) or one of ``stop_tokens``. ``logprobs`` asks for the log-probability of each token by the model (as
    it is, before all options) and of as many of the likeliest alternatives.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int | None = None
    temperature: float | None = None  # 0: greedy; this and the next three as in ``sampling.Sampling``
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None  # of tokens in prompt and text: see ``rules.LogitsProcessors``
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the text
    frequency_penalty: float = 0.0  # subtracted as many times as the text has the token
    logit_bias: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))  # added, a token
    min_new_tokens: int | None = None  # before an end token may come
    seed: int | None = None  # None: another one each time
    stop: tuple[str, ...] | None = None
    stop_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    constraint: Constraint | None = None

    @property
    def samples(self) -> int:
        """Continuations that are drawn."""
        return max(self.n, self.best_of or 0)

    @property
    def scored(self) -> bool:
        """Whether the log-probabilities of tokens are of interest."""
        return self.logprobs is not None or self.samples > self.n

    def check(self, vocabulary: int) -> None:
        """UserError where an option means nothing, of which none is None that stands for the model's own."""
        if not self.prompt:
            raise UserError("the prompt is empty: give at least one token")
        for name in ("prompt", "stop_tokens", "logit_bias"):
            if wrong := [token for token in getattr(self, name) if not 0 <= token < vocabulary]:
                raise UserError(f"{name} has the token {wrong[0]}, and the model knows {vocabulary}")
        for name, good, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
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
            raise UserError("an empty stop string stops everything: leave it out")
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise UserError(f"logit_bias names {len(self.logit_bias)} tokens: give at most {MAX_LOGIT_BIASES}")
        if not all(map(math.isfinite, self.logit_bias.values())):
            raise UserError("logit_bias has a value that is no finite number: give others, such as -100 for never")
        if self.constraint is not None:
            self.constraint.check()


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability, and the likeliest alternatives, best first, the token itself perhaps among them."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """News of one continuation: what came since the last event, and whether that was all.

    The texts of all events of a continuation are its text: a delta ends between characters, and what might be the
    beginning of a stop string is held back. ``tokens`` have come already where their text is held back; they do not
    have the end token, and have those of a stop string. ``logprobs``, where asked for, are those of ``tokens``.
    ``finish_reason``: "stop" at an end token, a stop string or the end of what a constraint allows, "length" after
    ``max_new_tokens``, "cancelled", or "error", which ``message`` explains.
    """

    request_id: int
    index: int  # which of n
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    message: str = ""


@dataclass
class Stats:
    """What an engine does and has done. Tokens read count those of prompts, tokens hit those of them that pages of
    earlier ones had."""

    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    prefill_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    compiles: int = 0
