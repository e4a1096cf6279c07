"""Fields of config.json that say how layers differ: rotary positions and their scaling, sliding windows, experts."""

from __future__ import annotations

import itertools
import math
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.hf.families.fields import REQUIRED, Field, Values
from jaxlm.hf.validate import MOST, MOST_LAYERS
from jaxlm.nn.config import RopeScaling, StackConfig


def rope(
    theta: float = 10000.0, *, base: str = "rope_theta", fraction: str = "", whole: float = 1.0, original: str = ""
) -> Field:
    """Rotary positions: ``rope_theta`` and ``rope_scaling``, or the ``rope_parameters`` of transformers 5.

    Args:
        theta: the base where none is given.
        base: the older name of the base.
        fraction: the name of the rotated fraction of a head, if the family has it, ``whole`` being its default.
        original: the name of the context of pre-training, if it stands outside the scaling.
    """
    names = {base: None, "rope_parameters": None, "rope_scaling": None, "max_position_embeddings": 2048}
    names |= {name: None for name in ("partial_rotary_factor", fraction, original) if name}

    def read(values: Values) -> dict[str, Any]:
        given = _mapping("rope_scaling", values["rope_scaling"])
        given = given or _mapping("rope_parameters", values["rope_parameters"])
        found = given.pop("rope_theta", values[base])
        older = values[fraction] if fraction else None
        part = given.pop("partial_rotary_factor", values["partial_rotary_factor"])
        part = (whole if older is None else older) if part is None else part
        if not fraction and part != 1.0:
            raise UserError(f"partial_rotary_factor = {part!r} is not supported in this model_type")
        scaling = _scaling(given, values["max_position_embeddings"], values.get(original))
        return {
            "rope_theta": _number(base, theta if found is None else found),
            "rotary_fraction": _number("partial_rotary_factor", part),
            "rope_scaling": scaling,
        }

    def write(config: StackConfig) -> dict[str, Any]:
        out = {base: config.rope_theta, "rope_scaling": written_scaling(config.rope_scaling)}
        if original:
            out[original] = config.rope_scaling.original_positions or config.max_positions
        return out | ({fraction: config.rotary_fraction} if fraction else {})

    return Field(names, read, write)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{name} = {value!r} is not an object with named fields")
    return dict(value or {})


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
        raise UserError(f"{name} = {value!r} is not a positive number of at most {MOST:g}")
    return float(value)


def _factors(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list) or not value:
        raise UserError(f"rope_scaling: {name} = {value!r} is not a list of numbers")
    return tuple(_number(name, each) for each in value)


def _scaling(given: dict[str, Any], context: Any, original: Any) -> RopeScaling:
    """The scaling that the fields of ``rope_scaling`` tell; whatever is left of them is not understood."""
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.pop("rope_type", given.pop("type", "default"))
    given.pop("type", None)
    fields: dict[str, Any] = {}

    def take(name: str, default: float | None = None) -> float:
        if name not in given and default is None:
            raise UserError(f"rope_scaling of the type {kind} lacks {name}")
        return _number(f"rope_scaling: {name}", given.pop(name, default))

    pretrained = given.pop("original_max_position_embeddings", None) if original is None else original
    given.pop("original_max_position_embeddings", None)
    pretrained = int(_number("original_max_position_embeddings", context if pretrained is None else pretrained))
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
    if given:
        raise UserError(f"rope_scaling: {next(iter(given))} = {next(iter(given.values()))!r} is not known")
    if kind in ("llama3", "yarn", "longrope"):
        fields["original_positions"] = pretrained
    return RopeScaling(method=kind, **fields)


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def written_scaling(scaling: RopeScaling) -> dict[str, Any] | None:
    """A ``rope_scaling`` of theirs."""
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


def layered_rope(theta: float, local: float) -> Field:
    """Rotary positions with a base of their own in layers with a window (Gemma 3)."""
    plain = rope(theta)
    names = {**plain.theirs, "rope_local_base_freq": None}

    def read(values: Values) -> dict[str, Any]:
        given = _mapping("rope_parameters", values["rope_parameters"])
        if not {"full_attention", "sliding_attention"} & set(given):
            found = values["rope_local_base_freq"]
            return plain.read(values) | {"rope_local_theta": _number("rope_local_base_freq", found or local)}
        far, near = (_mapping(name, given.get(name)) for name in ("full_attention", "sliding_attention"))
        if values["rope_scaling"] is not None:
            raise UserError("rope_scaling and rope_parameters are both given; leave one of them out")
        near_config = rope(local).read({**values, "rope_theta": None, "rope_parameters": near})
        if near_config["rope_scaling"] != RopeScaling():
            raise UserError(f"rope_parameters: sliding_attention = {near} is not supported; only unscaled ones")
        return plain.read({**values, "rope_parameters": far}) | {"rope_local_theta": near_config["rope_theta"]}

    def write(config: StackConfig) -> dict[str, Any]:
        return plain.write(config) | {"rope_local_base_freq": config.rope_local_theta}

    return Field(names, read, write)


# Windows and experts --------------------------------------------------------------------------------------------------


def window(default: int | None) -> Field:
    """One sliding window for all layers."""
    return Field(
        {"sliding_window": default},
        lambda values: {"windows": (values["sliding_window"],) if values["sliding_window"] else ()},
        lambda config: {"sliding_window": config.windows[0] if config.windows else None},
    )


def switched_window() -> Field:
    """One sliding window for all layers, or none, by ``use_sliding_window``."""
    return Field(
        {"use_sliding_window": False, "sliding_window": 4096},
        lambda values: {"windows": (values["sliding_window"],) if _switched(values) else ()},
        lambda config: {
            "use_sliding_window": bool(config.windows), "sliding_window": config.windows[0] if config.windows else None
        },
    )


def _switched(values: Values) -> bool:
    return bool(values["use_sliding_window"] and values["sliding_window"])


def late_windows() -> Field:
    """A window in the layers from ``max_window_layers`` on, or in those that ``layer_types`` names (Qwen)."""
    names = {
        "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
        "num_hidden_layers": REQUIRED,
    }

    def read(values: Values) -> dict[str, Any]:
        if not _switched(values):
            return {"windows": ()}
        kinds = ["sliding_attention" if i >= values["max_window_layers"] else "full_attention" for i in _layers(values)]
        return {"windows": _windows(values, kinds)}

    def write(config: StackConfig) -> dict[str, Any]:
        return {"use_sliding_window": any(config.windows), **_layer_types(config)}

    return Field(names, read, write)


def alternating_windows(default: int, period: int, pattern: str = "") -> Field:
    """A window in all layers but each ``period``-th, or in those that ``layer_types`` names (Gemma)."""
    names = {"sliding_window": default, "layer_types": None, "num_hidden_layers": REQUIRED}
    names |= {pattern: None} if pattern else {}

    def read(values: Values) -> dict[str, Any]:
        every = values.get(pattern) or period
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in _layers(values)]
        return {"windows": _windows(values, kinds)}

    return Field(names, read, _layer_types)


def _layers(values: Values) -> range:
    """All layers, to be listed one by one: not as many as a damaged file may ask for."""
    count = values["num_hidden_layers"]
    if not isinstance(count, int) or count > MOST_LAYERS:
        raise UserError(f"num_hidden_layers = {count!r} is not a whole number of at most {MOST_LAYERS}")
    return range(count)


def _windows(values: Values, default: list[str]) -> tuple[int, ...]:
    kinds = values["layer_types"] or default
    if not isinstance(kinds, list) or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise UserError(f"layer_types = {kinds!r} is not supported; only sliding_attention and full_attention")
    if len(kinds) != values["num_hidden_layers"]:
        raise UserError(f"layer_types names {len(kinds)} layers and num_hidden_layers is {values['num_hidden_layers']}")
    windows = tuple((values["sliding_window"] or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _layer_types(config: StackConfig) -> dict[str, Any]:
    windows = list(itertools.islice(itertools.cycle(config.windows or (0,)), config.layers))
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": max(windows) or None, "layer_types": kinds}


def sparse_layers() -> Field:
    """Which layers have experts: each ``decoder_sparse_step``-th that ``mlp_only_layers`` does not name (Qwen)."""
    names = {"decoder_sparse_step": 1, "mlp_only_layers": None, "num_hidden_layers": REQUIRED}

    def read(values: Values) -> dict[str, Any]:
        step, dense = values["decoder_sparse_step"], set(values["mlp_only_layers"] or ())
        if not isinstance(step, int) or step < 1:
            raise UserError(f"decoder_sparse_step = {step!r} is not a positive whole number")
        return {"dense_layers": tuple(i for i in _layers(values) if i in dense or (i + 1) % step)}

    return Field(names, read, lambda config: {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)})
