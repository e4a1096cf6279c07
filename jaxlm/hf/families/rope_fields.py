"""Fields of config.json about rotary positions: their base, the rotated part of a head, and scaling of the context."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.hf.families.fields import REQUIRED, ConfigField, HfFields
from jaxlm.hf.validate import MAX_VALUE
from jaxlm.nn.config import RopeScaling, StackConfig

__all__ = ["rope", "rope_with_alpha", "rope_with_local_base", "rope_with_temperature"]


def rope(
    theta: float = 10000.0, *, base: str = "rope_theta", fraction: str = "partial_rotary_factor",
    whole: float | None = None, context: int = 2048, original: int | None = None,
    scaling: Mapping[str, Any] | None = None,
) -> ConfigField:
    """Rotary positions: ``rope_theta`` and ``rope_scaling``, or the ``rope_parameters`` of transformers 5.

    Args:
        theta: the default of the base.
        base: the name of the base outside ``rope_parameters``.
        fraction: the name of the fraction of a head that is rotated, outside ``rope_parameters``.
        whole: the default of that fraction, if the family can rotate a part of a head.
        context: the default of the context length.
        original: the default of the context length of pretraining, if the family has one. Outside ``rope_scaling`` it
            counts before the one inside.
        scaling: the default of ``rope_parameters``.
    """
    default_scaling = scaling
    names = {base: None, fraction: whole, "rope_parameters": None, "rope_scaling": None}
    names |= {"max_position_embeddings": context, "original_max_position_embeddings": original}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        scaling = _object("rope_scaling", fields["rope_scaling"])
        scaling = scaling or _object("rope_parameters", fields["rope_parameters"]) or dict(default_scaling or {})
        given_theta = scaling.pop("rope_theta", fields[base])
        rotated = scaling.pop("partial_rotary_factor", fields[fraction])
        rotated = (whole or 1.0) if rotated is None else rotated
        if whole is None and rotated != 1.0:
            raise UserError(f"partial_rotary_factor = {rotated!r} is not supported in this model_type; only 1.0")
        pretrained = fields["original_max_position_embeddings"]
        return {
            "rope_scaling": _scaling_from_hf(scaling, fields["max_position_embeddings"], pretrained),
            "rope_theta": _positive(base, theta if given_theta is None else given_theta),
            "rotary_fraction": _positive(fraction, rotated),
        }

    def to_hf(config: StackConfig) -> dict[str, Any]:
        unscaled = {"rope_type": "default"} if default_scaling else None
        out = {base: config.rope_theta, "rope_scaling": _scaling_to_hf(config.rope_scaling) or unscaled}
        if original:
            out["original_max_position_embeddings"] = config.rope_scaling.original_positions or config.max_positions
        return out | ({} if whole is None else {fraction: config.rotary_fraction})

    return ConfigField(names, from_hf, to_hf)


def rope_with_temperature(theta: float, *, context: int, parameters: dict[str, Any]) -> ConfigField:
    """Rotary positions as ``rope`` reads them, and queries that grow with their position by ``llama_4_scaling_beta``
    (Ministral 3)."""
    plain = rope(theta, context=context, scaling=parameters)

    def from_hf(fields: HfFields) -> dict[str, Any]:
        given = fields["rope_scaling"] or fields["rope_parameters"] or parameters
        found = plain.from_hf(fields)
        beta = given.get("llama_4_scaling_beta") or 0.0
        interval = given.get("original_max_position_embeddings") or fields["max_position_embeddings"]
        return found | {"attention_temperature": float(beta), "temperature_interval": interval}

    def to_hf(config: StackConfig) -> dict[str, Any]:
        out, growth = plain.to_hf(config), {"llama_4_scaling_beta": config.attention_temperature}
        growth["original_max_position_embeddings"] = config.temperature_interval
        return out | {"rope_scaling": out["rope_scaling"] | growth}

    return ConfigField(plain.hf_defaults, from_hf, to_hf)


def rope_with_alpha(*, context: int = 2048) -> ConfigField:
    """Rotary positions as ``rope`` reads them; scaling by ``alpha`` is a larger base (Hunyuan)."""
    plain = rope(context=context)
    names = {**plain.hf_defaults, "head_dim": None, "hidden_size": REQUIRED, "num_attention_heads": REQUIRED}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        given = _object("rope_scaling", fields["rope_scaling"])
        given = given or _object("rope_parameters", fields["rope_parameters"])
        alpha = given.get("alpha")
        if not alpha or given.get("rope_type", given.get("type")) != "dynamic":
            return plain.from_hf(fields)
        size = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
        found = plain.from_hf({**fields, "rope_scaling": None, "rope_parameters": given | {"rope_type": "default"}})
        return found | {"rope_theta": found["rope_theta"] * _positive("alpha", alpha) ** (size / (size - 2))}

    return ConfigField(names, from_hf, plain.to_hf)


def rope_with_local_base(
    theta: float, local_theta: float, *, context: int, local_base: str | None = "rope_local_base_freq"
) -> ConfigField:
    """Rotary positions as ``rope`` reads them, with another base in layers that have a sliding window (Gemma 3).

    ``local_base`` is the name of that base outside ``rope_parameters``; None: the family has it only inside (OLMo 3).
    """
    plain = rope(theta, context=context)
    names = {**plain.hf_defaults, **({local_base: None} if local_base else {})}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        given = _object("rope_parameters", fields["rope_parameters"])
        if not {"full_attention", "sliding_attention"} & set(given):
            base = fields.get(local_base) or local_theta
            return plain.from_hf(fields) | {"rope_local_theta": _positive(str(local_base), base)}
        full, sliding = (_object(name, given.get(name)) for name in ("full_attention", "sliding_attention"))
        full |= _object("rope_scaling", fields["rope_scaling"])
        flat = {**fields, "rope_scaling": None}
        local = rope(local_theta).from_hf({**flat, "rope_theta": None, "rope_parameters": sliding})
        if local["rope_scaling"] != RopeScaling():
            raise UserError(f"rope_parameters: sliding_attention = {sliding} is scaled, which is not supported")
        return plain.from_hf({**flat, "rope_parameters": full}) | {"rope_local_theta": local["rope_theta"]}

    def to_hf(config: StackConfig) -> dict[str, Any]:
        if local_base:
            return plain.to_hf(config) | {local_base: config.rope_local_theta}
        full = {"rope_theta": config.rope_theta, **(_scaling_to_hf(config.rope_scaling) or {"rope_type": "default"})}
        local = {"rope_theta": config.rope_local_theta or config.rope_theta, "rope_type": "default"}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": local}}

    return ConfigField(names, from_hf, to_hf)


def _object(name: str, value: Any) -> dict[str, Any]:
    """A copy of a JSON object; an empty one for null."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} = {value!r} is not an object with named fields")
    return dict(value or {})


def _positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_VALUE:
        raise UserError(f"{name} = {value!r} is not a positive number of at most {MAX_VALUE:g}")
    return float(value)


def _factors(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"rope_scaling: {name} = {value!r} is not a list of numbers")
    return tuple(_positive(name, each) for each in value)


def _scaling_from_hf(given: dict[str, Any], context: Any, original: Any) -> RopeScaling:
    """The scaling that ``rope_scaling`` describes.

    Args:
        given: the fields of ``rope_scaling``.
        context: the context length of the model.
        original: the context length of pretraining; None where ``given`` has it, or it is ``context``.

    Raises:
        UserError: a field has no meaning for the type of scaling.
    """
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    fields: dict[str, Any] = {}

    def take(name: str, default: float | None = None) -> float:
        if name not in given and default is None:
            raise UserError(f"rope_scaling of the type {kind} lacks {name}")
        return _positive(f"rope_scaling: {name}", given.pop(name, default))

    pretrained = given.pop("original_max_position_embeddings", None) if original is None else original
    given.pop("original_max_position_embeddings", None)
    pretrained = int(_positive("original_max_position_embeddings", context if pretrained is None else pretrained))
    if kind == "default":
        kind = "none"
    elif kind in ("linear", "dynamic"):
        fields = {"factor": take("factor")}
    elif kind == "llama3":
        fields = {name: take(name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    elif kind == "yarn":
        factor = take("factor", context / pretrained)
        full, all_dims = given.pop("mscale", None), given.pop("mscale_all_dim", None)
        inferred = _mscale(factor, full) / _mscale(factor, all_dims) if full and all_dims else _mscale(factor)
        fields = {"factor": factor, "attention_factor": take("attention_factor", inferred)}
        fields |= {"beta_fast": take("beta_fast", 32.0), "beta_slow": take("beta_slow", 1.0)}
        fields["truncate"] = bool(given.pop("truncate", True))
    elif kind in ("longrope", "su"):
        kind, factor = "longrope", take("factor", context / pretrained)
        inferred = math.sqrt(1 + math.log(factor) / math.log(pretrained)) if factor > 1 < pretrained else 1.0
        fields = {"factor": factor, "attention_factor": take("attention_factor", inferred)}
        fields |= {name: _factors(name, given.pop(name, None)) for name in ("short_factor", "long_factor")}
    else:
        raise UserError(f"rope_scaling of the type {kind!r} is not supported")
    if kind in ("llama3", "yarn", "longrope"):
        fields["original_positions"] = pretrained
    return RopeScaling(method=kind, **fields)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scaling_to_hf(scaling: RopeScaling) -> dict[str, Any] | None:
    """The value of ``rope_scaling``."""
    names = {
        "none": (), "linear": ("factor",), "dynamic": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate"),
        "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
    }[scaling.method]
    if not names:
        return None
    out = {"rope_type": scaling.method} | {name: getattr(scaling, name) for name in names}
    if scaling.original_positions:
        out["original_max_position_embeddings"] = scaling.original_positions
    return {name: list(value) if isinstance(value, tuple) else value for name, value in out.items()}
