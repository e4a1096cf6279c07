"""Text models inside multimodal ones: their fields are nested in config.json, and their tensors have a prefix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.hf.families.known_fields import check_architecture, default_fields

__all__ = ["WRAPPERS", "Wrapper", "text_fields"]


@dataclass(frozen=True)
class Wrapper:
    """A multimodal ``model_type``.

    - ``architecture`` is its class in transformers.
    - ``text`` is the ``model_type`` of the text model where ``text_config`` does not say it.
    """

    architecture: str
    text: str

    def names(self, name: str) -> list[str]:
        """The names that files may have for a tensor of the text model: older ones prefix the whole text model, newer
        ones all but its output head."""
        inner = [f"model.language_model.{name.removeprefix('model.')}"] if name.startswith("model.") else []
        return [f"language_model.{name}", *inner, name]

    def other_part(self, name: str) -> str | None:
        """The part of the model, not of its text model, that a tensor belongs to; None if there is none."""
        match = _OTHER_PARTS.match(name)
        return match and match[1]


_OTHER_PARTS = re.compile(r"(?:model\.)?(vision_tower|vision_model|multi_modal_projector)\.")
WRAPPERS = {
    "gemma3": Wrapper("Gemma3ForConditionalGeneration", "gemma3_text"),
    "mistral3": Wrapper("Mistral3ForConditionalGeneration", "mistral"),
}


def text_fields(fields: Mapping[str, Any]) -> tuple[Mapping[str, Any], Wrapper | None]:
    """The config.json of the text model, and what it is wrapped in (None, and all fields, where it is by itself).

    Fields that ``text_config`` leaves out have the defaults of transformers.

    Raises:
        UserError: the model is a classifier or draft head, or has no text model.
    """
    model_type = fields.get("model_type")
    wrapper = WRAPPERS.get(model_type) if isinstance(model_type, str) else None
    if wrapper is None:
        return fields, None
    check_architecture(fields, wrapper.architecture)
    inner = fields.get("text_config") or {}
    if not isinstance(inner, dict):
        raise UserError(f"text_config = {inner!r} is not an object with named fields")
    text_type = inner.get("model_type", wrapper.text)
    if not isinstance(text_type, str):
        raise UserError(f"text_config: model_type = {text_type!r} is not the name of a model")
    outer = ("bos_token_id", "dtype", "eos_token_id", "pad_token_id", "quantization_config", "torch_dtype")
    given = {name: fields[name] for name in outer if fields.get(name) is not None}
    tied = fields.get("tie_word_embeddings")
    found = {**default_fields(text_type), **inner, **given, "model_type": text_type}
    return found | {"tie_word_embeddings": True if tied is None else tied}, wrapper
