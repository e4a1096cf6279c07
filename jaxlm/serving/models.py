"""The models that a server has, by name, each with its worker."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.core.tree import count_bytes, count_params
from jaxlm.inference.translate import target_language
from jaxlm.serving.protocol.errors import ApiError, no_such_model
from jaxlm.serving.protocol.responses import Model
from jaxlm.serving.routes.translation import TranslationWorker
from jaxlm.serving.worker import EngineWorker, Worker

__all__ = ["Served", "Source", "by_name", "serve_model"]

_CONTEXT = 2048  # tokens of models whose own context is longer, where nobody says how many


@dataclass(frozen=True)
class Source:
    """Where a served model comes from, and what it is called."""

    name: str
    path: str
    adapter: str | None = None

    @classmethod
    def parse(cls, word: str) -> Source:
        """``[NAME=]MODEL[+ADAPTER]``; without a name it is called as its directory, or as its adapter's. UserError for
        a name that is none."""
        name, equals, path = word.partition("=")
        if not equals or "/" in name:
            name, path = "", word
        adapter = None
        if "+" in path and not Path(path).expanduser().exists():
            path, _, adapter = path.rpartition("+")
        name = name or Path((adapter or path).removeprefix("hf://")).expanduser().resolve().name
        if not re.fullmatch(r"[\w.:-]{1,96}", name):
            raise UserError(f"{name!r} is no name for a model: say NAME={path}, of letters, digits and .:-_")
        return cls(name, path, adapter)


@dataclass(frozen=True)
class Served:
    """A model, and the worker that computes with it."""

    name: str
    lm: Any
    worker: Worker
    context: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def translates(self) -> bool:
        return self.lm.config.kind == "seq2seq"

    @cached_property
    def card(self) -> Model:
        """What clients may know of it."""
        lm, config = self.lm, self.lm.config
        return Model(
            id=self.name, created=self.created, kind=config.kind, chat=_has_chat(lm.tokenizer), context=self.context,
            parameters=count_params(lm.params), bytes_in_memory=count_bytes(lm.params),
            recipe=lm.recipe.name if lm.recipe else None,
            layers=config.decoder_layers if self.translates else config.layers, languages=list(lm.tokenizer.languages),
            target_language=target_language(lm) if self.translates and lm.tokenizer.languages else None,
        )


def _has_chat(tokenizer) -> bool:
    try:
        return bool(tokenizer.chat_template.source)
    except UserError:
        return False


def serve_model(
    name: str, lm, *, slots: int = 8, queue: int = 64, context: int = 0, draft: Any = None, warm: bool = True
) -> Served:
    """A model ready for requests: ``slots`` run at once and ``queue`` wait. UserError for one that cannot be served."""
    if lm.tokenizer is None:
        raise UserError(f"{name} has no tokenizer: put a tokenizer.json beside its config.json")
    if lm.config.kind == "lstm":
        raise UserError(f"{name} is an LSTM, which is not served; jaxlm generate runs it")
    most = lm.config.max_positions
    if context > most and lm.config.positions == "learned":
        raise UserError(f"{name} has {most} positions, and so no context of {context}")
    context = context or min(most, _CONTEXT)
    places = slots + queue
    if lm.config.kind == "seq2seq":
        return Served(name, lm, TranslationWorker(name, lm, places), context)
    options = {} if draft is None else {"draft": draft}

    def make():
        engine = lm.engine(slots=slots, context=context, **options)
        if warm:
            engine.warm_up()
        return engine

    return Served(name, lm, EngineWorker(name, make, places), context)


def by_name(models: Sequence[Served], name: str, *, translates: bool | None = None) -> Served:
    """The model of that name. ApiError where there is none, or it is of the other kind."""
    found = next((served for served in models if served.name == name), None)
    if found is None:
        raise no_such_model(name, [served.name for served in models])
    if translates is not None and found.translates != translates:
        kind, way = ("translates", "/v1/translate") if found.translates else ("does not translate", "/v1/completions")
        raise ApiError(400, f"{name} {kind}: ask at {way}", param="model")
    return found
