"""Reading config.json: the family of a model, and its configuration by the table of that family."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxlm.core.config import current_names, from_dict, to_dict
from jaxlm.core.errors import UserError
from jaxlm.hf.families.fields import REQUIRED, Family
from jaxlm.hf.families.known_fields import check_architecture, check_unknown, without_aliases
from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.validate import validate_sizes
from jaxlm.nn.config import DecoderConfig, ModelConfig

__all__ = ["RUNTIME_FIELDS", "family_of", "from_hf_config", "jaxlm_section", "read_config", "with_defaults"]

# Fields of our configuration that belong to training or to a process, not to the model. config.json has them in our own
# section, beside the fields of the family.
RUNTIME_FIELDS = (
    "dtype", "kv_cache", "scan_layers", "remat", "ring_min_keys", "microbatches", "expert_routing", "capacity_factor",
    "dropout", "attention_dropout", "ffn_dropout", "layer_groups", "encoder_layer_groups", "decoder_layer_groups",
)

def read_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a model whose config.json holds ``fields``.

    Raises:
        UserError: the family is not supported, it is no language model (``hf.families.known_fields``), or a field that
            changes results is not understood.
    """
    check_architecture(fields, family_of(fields).architecture)
    return _with_runtime(from_hf_config(fields), jaxlm_section(fields).get("runtime", {}))


def jaxlm_section(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The section of config.json that jaxlm wrote beside the fields of the family; empty where there is none."""
    section = fields.get("jaxlm")
    return section if isinstance(section, dict) else {}


def _with_runtime(config: ModelConfig, runtime: Mapping[str, Any]) -> ModelConfig:
    """The configuration with the saved values of ``RUNTIME_FIELDS``."""
    runtime = current_names(runtime, RUNTIME_FIELDS) if isinstance(runtime, dict) else runtime
    if not isinstance(runtime, dict) or not set(runtime) <= set(RUNTIME_FIELDS):
        raise UserError(f"jaxlm: runtime = {runtime!r} is not understood; remove it")
    config = from_dict(type(config), to_dict(config) | runtime)
    validate_sizes(config)
    return config


def family_of(fields: Mapping[str, Any]) -> Family:
    """The family that config.json names.

    Raises:
        UserError: ``model_type`` names none of ``FAMILIES``.
    """
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(f"model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def with_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that the family's table reads, with the defaults of absent ones."""
    family, fields = family_of(fields), without_aliases(fields)
    defaults = {name: default for field in family.fields for name, default in field.hf_defaults.items()}
    return {name: fields.get(name, None if default is REQUIRED else default) for name, default in defaults.items()}


def from_hf_config(fields: Mapping[str, Any]) -> ModelConfig:
    """Our configuration from the fields of a config.json. ``hf.writer.to_hf_config`` is the inverse.

    Raises:
        UserError: a field that changes results is not understood, or values do not fit each other.
    """
    family, fields = family_of(fields), without_aliases(fields)
    check_unknown(fields, with_defaults(fields))
    converted: dict[str, Any] = {}
    for field in family.fields:
        try:
            converted |= field.from_hf({name: fields.get(name, default) for name, default in field.hf_defaults.items()})
        except UserError:
            raise
        except (TypeError, ValueError, OverflowError, ZeroDivisionError):
            given = ", ".join(f"{name} = {fields[name]!r}" for name in field.hf_defaults if name in fields)
            raise UserError(f"{given} makes no sense in a configuration of this model_type") from None
    config = _checked(family.config_class, converted | _special_token_ids(family, fields))
    validate_sizes(config)
    return config


def _checked(config_class: type[ModelConfig], values: Mapping[str, Any]) -> ModelConfig:
    """The configuration with these fields, whose types are checked."""
    plain = {name: to_dict(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
    try:
        return from_dict(config_class, plain)
    except UserError as error:
        raise UserError(f"a field has a value of the wrong type: {error}") from None


def _special_token_ids(family: Family, fields: Mapping[str, Any]) -> dict[str, int]:
    """The ids of special tokens. Of several end tokens the first counts. A model without a padding token pads with its
    end token. The decoder of an encoder-decoder begins with ``decoder_start_token_id``, or else with padding (T5)."""
    ids = {}
    for role in ("bos", "eos"):
        value = fields.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, int):
            ids[f"{role}_id"] = value
    pad = fields.get("pad_token_id")
    pad = pad if isinstance(pad, int) and pad >= 0 else ids.get("eos_id", 0)
    if not issubclass(family.config_class, DecoderConfig):
        start = fields.get("decoder_start_token_id")
        ids["bos_id"] = start if isinstance(start, int) else pad
    return ids | {"pad_id": pad}
