"""The options of an ``Engine``, and what is derived from them for given models."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from jaxlm.core.errors import UserError
from jaxlm.nn.config import DecoderConfig, KVCache, ModelConfig
from jaxlm.nn.positions import rotary_length

__all__ = ["EngineOptions"]

_CONTEXT = 2048  # at most, where the caller does not say


@dataclass(frozen=True)
class EngineOptions:
    """How much an ``Engine`` serves at once."""

    slots: int = 8  # sequences that run at once
    context: int | None = None  # tokens of a prompt and its continuation; None: what the model reads, up to 2,048
    page_size: int = 16  # tokens in a page of the key/value cache
    num_pages: int | None = None  # of the cache, for all sequences together; None: enough for all slots
    prefill_chunk: int = 256  # prompt tokens that are read in one step at most
    kv_cache: KVCache | None = None  # the type of keys and values (``nn.attention.kv_cache``); None: the model's own
    num_draft_tokens: int = 4  # tokens that a draft model proposes in one step

    def resolved(self, config: ModelConfig, draft: ModelConfig | None) -> ResolvedOptions:
        """The options with their defaults for a model, and for its draft if it has one.

        Raises:
            UserError: when an option is outside its range, or a model cannot be served.
        """
        configs = [config] if draft is None else [config, draft]
        if draft is not None and draft.vocab_size != config.vocab_size:
            raise UserError(
                f"the draft knows {draft.vocab_size} tokens and the model {config.vocab_size}: they must be the same"
            )
        context = _context(configs, self.context)
        for name in ("slots", "page_size", "prefill_chunk", "num_draft_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 1 or more")
        needed = -(-context // self.page_size)
        num_pages = self.slots * needed if self.num_pages is None else self.num_pages
        if num_pages < needed:
            raise UserError(
                f"{num_pages} pages of {self.page_size} tokens do not hold one text of {context}: set num_pages to "
                f"{needed} or more"
            )
        return ResolvedOptions(
            configs=tuple(
                dataclasses.replace(each, kv_cache=self.kv_cache or each.kv_cache) for each in configs
            ),
            slots=self.slots, context=context, page_size=self.page_size, num_pages=num_pages,
            prefill_chunk=self.prefill_chunk, num_draft_tokens=0 if draft is None else self.num_draft_tokens,
        )


@dataclass(frozen=True)
class ResolvedOptions:
    """``EngineOptions`` for given models, with every default filled in."""

    configs: tuple[DecoderConfig, ...]  # of the model, and of its draft if it has one
    slots: int
    context: int
    page_size: int
    num_pages: int
    prefill_chunk: int
    num_draft_tokens: int  # 0 without a draft

    @property
    def pages_per_sequence(self) -> int:
        """Pages that hold a text of ``context`` tokens."""
        return -(-self.context // self.page_size)

    def rotation(self, length: int) -> tuple[int, ...]:
        """What tells apart the rotations of texts of different lengths: cached keys and values are those of one such
        rotation (``nn.rereading``)."""
        return tuple(rotary_length(length, config) for config in self.configs)


def _context(configs: Sequence[ModelConfig], asked: int | None) -> int:
    """The tokens that a text may have: the ones asked for, if the models can read them."""
    limits = []
    for config in configs:
        if config.kind != "decoder":
            raise UserError(
                f"an engine serves decoders with attention, not a model of kind {config.kind!r}: use generate or "
                "translate"
            )
        if config.position_limit is not None:
            limits.append(config.position_limit)
    if asked is None:
        return min(_CONTEXT, configs[0].max_positions, *limits)
    if asked < 2 or asked > min(limits, default=asked):
        raise UserError(f"context is {asked}: give 2 " + (f"to {min(limits)}" if limits else "or more"))
    return asked
