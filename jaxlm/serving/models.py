"""The models of a server by name, each with its worker."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from jaxlm.core.errors import UserError
from jaxlm.core.tree import count_bytes, count_params
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.translation import target_language
from jaxlm.model import LM
from jaxlm.serving.protocol.errors import model_not_found, wrong_endpoint
from jaxlm.serving.protocol.responses import Model
from jaxlm.serving.translation_worker import TranslationWorker
from jaxlm.serving.worker import EngineWorker, Worker

__all__ = ["ModelSource", "ServedModel", "find_model", "serve_model"]

_MAX_DEFAULT_CONTEXT = 2048  # tokens, for a model with a longer context if the user gives none


@dataclass(frozen=True)
class ModelSource:
    """The name of a served model, its path, and the path of its LoRA adapter if it has one."""

    name: str
    path: str
    adapter: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """``[NAME=]MODEL[+ADAPTER]``. The default name is that of the adapter's directory, or else of the model's.

        Raises:
            UserError: when the name has other characters than letters, digits and ``.:-_``.
        """
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = "", text
        adapter = None
        if "+" in path and not Path(path).expanduser().exists():
            path, _, adapter = path.rpartition("+")
        name = name or Path((adapter or path).removeprefix("hf://")).expanduser().resolve().name
        if not re.fullmatch(r"[\w.:-]{1,96}", name):
            raise UserError(f"{name!r} cannot name a model: write NAME={path} with letters, digits and .:-_ only")
        return cls(name, path, adapter)


@dataclass(frozen=True)
class ServedModel:
    """A model, the worker that computes with it, and what its server has decided.

    Attributes:
        name: how clients call it.
        lm: the model.
        worker: an ``EngineWorker``, or a ``TranslationWorker`` for a translation model.
        context: tokens of prompt and continuation together, or of a source text.
        default_max_tokens: new tokens for requests that give no ``max_tokens``; None: what the model's
            generation_config.json says, or else 16 for a completion and the rest of the context for a chat.
        created: seconds since 1970.
    """

    name: str
    lm: LM
    worker: Worker
    context: int
    default_max_tokens: int | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def translates(self) -> bool:
        """Whether it is a translation model."""
        return self.lm.config.kind == "seq2seq"

    @cached_property
    def card(self) -> Model:
        """What /v1/models says of it."""
        lm, config = self.lm, self.lm.config
        return Model(
            id=self.name, created=self.created, kind=config.kind, chat=_has_chat_template(lm.tokenizer),
            context=self.context, parameters=count_params(lm.params), bytes_in_memory=count_bytes(lm.params),
            recipe=lm.recipe.name if lm.recipe else None,
            layers=config.decoder_layers if self.translates else config.layers, languages=list(lm.tokenizer.languages),
            target_language=target_language(lm) if self.translates and lm.tokenizer.languages else None,
        )


def _has_chat_template(tokenizer: Tokenizer) -> bool:
    try:
        return bool(tokenizer.chat_template.source)
    except UserError:
        return False


def serve_model(
    name: str, lm: LM, *, slots: int = 8, queue: int = 64, client_places: int = 0, context: int = 0,
    default_max_tokens: int | None = None, draft: LM | None = None, warm_up: bool = True,
) -> ServedModel:
    """Makes a model ready for requests.

    Args:
        name: how clients call it.
        lm: the model.
        slots: continuations that are generated at once.
        queue: continuations that may wait.
        client_places: continuations that one client, and so one request, may have at once; 0 for ``queue`` or, if that
            is more, ``slots``.
        context: tokens of prompt and continuation; 0 for the model's own, at most 2,048.
        default_max_tokens: new tokens for requests that give no ``max_tokens``; see ``ServedModel``.
        draft: a smaller model with the same tokenizer that proposes tokens.
        warm_up: compile the engine's programs now rather than at the first requests.

    Raises:
        UserError: when the model has no tokenizer, is an LSTM, or has fewer positions than ``context``.
    """
    if lm.tokenizer is None:
        raise UserError(f"{name} has no tokenizer: put a tokenizer.json beside its config.json")
    if lm.config.kind == "lstm":
        raise UserError(f"{name} is an LSTM, which the server does not support: use jaxlm generate")
    most = lm.config.max_positions
    if context > most and lm.config.positions == "learned":
        raise UserError(f"context is {context}, and {name} has only {most} positions")
    context = context or min(most, _MAX_DEFAULT_CONTEXT)
    capacity, client_capacity = slots + queue, client_places or max(slots, queue)
    if lm.config.kind == "seq2seq":
        return ServedModel(name, lm, TranslationWorker(name, lm, capacity, client_capacity), context)
    options = {} if draft is None else {"draft": draft}

    def make_engine() -> Engine:
        engine = lm.engine(slots=slots, context=context, **options)
        if warm_up:
            engine.warm_up()
        return engine

    worker = EngineWorker(name, make_engine, capacity, client_capacity)
    return ServedModel(name, lm, worker, context, default_max_tokens)


def find_model(models: Sequence[ServedModel], name: str, *, translates: bool | None = None) -> ServedModel:
    """The model of that name. ``translates`` says whether the endpoint needs a translation model; None accepts both.

    Raises:
        ApiError: when there is no such model, or it is of the other kind.
    """
    found = next((served for served in models if served.name == name), None)
    if found is None:
        raise model_not_found(name, [served.name for served in models])
    if translates is not None and found.translates != translates:
        raise wrong_endpoint(name, found.translates)
    return found
