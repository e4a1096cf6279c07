"""Fields of config.json that say which layers differ from the others: sliding windows, mixtures of experts."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from typing import Any

from jaxlm.core.errors import UserError, shown
from jaxlm.hf.families.fields import REQUIRED, ConfigField, HfFields
from jaxlm.hf.validate import MAX_LAYERS
from jaxlm.nn.config import StackConfig

__all__ = [
    "first_dense_layers", "full_attention", "interleaved_sliding_window", "layer_range", "nope_layers",
    "sliding_window", "sliding_window_from_layer", "sliding_window_or_nope", "sliding_windows", "sparse_moe_layers",
    "switchable_sliding_window",
]


def full_attention() -> ConfigField:
    """No window in any layer: ``layer_types`` may only repeat that."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        _check_layer_types(fields["layer_types"], "full_attention")
        return {}

    return ConfigField({"layer_types": None}, from_hf, lambda config: {})


def sliding_window(default: int | None) -> ConfigField:
    """One sliding window for all layers, whatever ``layer_types`` says of them."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        window = fields["sliding_window"]
        _check_layer_types(fields["layer_types"], "full_attention", *(["sliding_attention"] if window else []))
        return {"windows": (window,) if window else ()}

    return ConfigField(
        {"sliding_window": default, "layer_types": None}, from_hf,
        lambda config: {"sliding_window": config.windows[0] if config.windows else None},
    )


def sliding_windows(default: int) -> ConfigField:
    """A window in all layers, or in those that ``layer_types`` names (Ministral)."""
    names = {"sliding_window": default, "layer_types": None, "num_hidden_layers": REQUIRED}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        kind = "full_attention" if fields["sliding_window"] is None else "sliding_attention"
        return {"windows": _windows(fields, [kind for _ in layer_range(fields)])}

    return ConfigField(names, from_hf, _layer_types)


def switchable_sliding_window() -> ConfigField:
    """One sliding window for all layers, or none, by ``use_sliding_window`` (mixtures of Qwen)."""
    return ConfigField(
        {"use_sliding_window": False, "sliding_window": 4096},
        lambda fields: {"windows": (fields["sliding_window"],) if _uses_window(fields) else ()},
        lambda config: {
            "use_sliding_window": bool(config.windows), "sliding_window": config.windows[0] if config.windows else None
        },
    )


def sliding_window_from_layer(
    *, first: int = 28, switch: bool = True, has_window: Callable[[int, int], bool] = operator.ge
) -> ConfigField:
    """A window in the layers from ``max_window_layers`` on, or in those that ``layer_types`` names (Qwen).

    Args:
        first: the default of ``max_window_layers``.
        switch: whether the family has ``use_sliding_window``, which is false where it is absent.
        has_window: another rule, of a layer and ``max_window_layers``, for files without ``layer_types``.
    """
    names = {"sliding_window": 4096, "max_window_layers": first, "layer_types": None, "num_hidden_layers": REQUIRED}
    names |= {"use_sliding_window": False} if switch else {}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        if not _uses_window({"use_sliding_window": True, **fields}):
            return {"windows": ()}
        start = fields["max_window_layers"]
        kinds = ["sliding_attention" if has_window(i, start) else "full_attention" for i in layer_range(fields)]
        return {"windows": _windows(fields, kinds)}

    def to_hf(config: StackConfig) -> dict[str, Any]:
        return ({"use_sliding_window": any(config.windows)} if switch else {}) | _layer_types(config)

    return ConfigField(names, from_hf, to_hf)


def interleaved_sliding_window(default: int, period: int, period_field: str = "") -> ConfigField:
    """A window in all layers except each ``period``-th, or in those that ``layer_types`` names (Gemma).

    ``period_field`` is the field of config.json with another period, if the family has one.
    """
    names = {"sliding_window": default, "layer_types": None, "num_hidden_layers": REQUIRED}
    names |= {period_field: period} if period_field else {}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        every = fields.get(period_field) or period
        kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layer_range(fields)]
        return {"windows": _windows(fields, kinds)}

    return ConfigField(names, from_hf, _layer_types)


def sliding_window_or_nope(period: int, *, rope_without_window: bool = False) -> ConfigField:
    """A window with rotary positions in the layers that ``layer_types`` names, by default all but each ``period``-th;
    no positions in the others (Cohere 2, arXiv:2501.18795).

    ``rope_without_window``: a model without a window has rotary positions in all layers (EXAONE 4).
    """
    names = {"sliding_window": 4096, "layer_types": None, "num_hidden_layers": REQUIRED}
    names |= {"sliding_window_pattern": period}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        window, kinds, layers = fields["sliding_window"], fields["layer_types"], layer_range(fields)
        if window is None and rope_without_window:
            _check_layer_types(kinds, "full_attention")
            return {"windows": (), "nope_layers": ()}
        if kinds is None:
            every = fields["sliding_window_pattern"] or period
            kinds = ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers]
        windows = _windows(fields, kinds)
        return {"windows": windows, "nope_layers": tuple(i for i in layers if not windows or not windows[i])}

    return ConfigField(names, from_hf, _layer_types)


def nope_layers(interval: int) -> ConfigField:
    """Layers without rotary positions: those with 0 in ``no_rope_layers``, or each ``no_rope_layer_interval``-th. Where
    there is a window, it is in these, or in those that ``layer_types`` names (SmolLM 3)."""
    names = {
        "no_rope_layers": None, "no_rope_layer_interval": interval, "use_sliding_window": False,
        "sliding_window": None, "layer_types": None, "num_hidden_layers": REQUIRED,
    }

    def from_hf(fields: HfFields) -> dict[str, Any]:
        layers, rotary = layer_range(fields), fields["no_rope_layers"]
        if rotary is None:
            rotary = [(i + 1) % fields["no_rope_layer_interval"] for i in layers]
        if len(rotary) < len(layers):
            raise UserError(f"no_rope_layers names {len(rotary)} layers and num_hidden_layers is {len(layers)}")
        nope = tuple(i for i in layers if not rotary[i])
        windowed = nope if _uses_window(fields) else ()
        kinds = ["sliding_attention" if i in windowed else "full_attention" for i in layers]
        return {"windows": _windows(fields, kinds), "nope_layers": nope}

    def to_hf(config: StackConfig) -> dict[str, Any]:
        rotary = [int(i not in config.nope_layers) for i in range(config.layers)]
        return {"no_rope_layers": rotary, "use_sliding_window": any(config.windows), **_layer_types(config)}

    return ConfigField(names, from_hf, to_hf)


def sparse_moe_layers() -> ConfigField:
    """The layers with experts: each ``decoder_sparse_step``-th, without those that ``mlp_only_layers`` names (Qwen)."""
    names = {"decoder_sparse_step": 1, "mlp_only_layers": None, "num_hidden_layers": REQUIRED}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        step, dense = fields["decoder_sparse_step"], set(fields["mlp_only_layers"] or ())
        if not isinstance(step, int) or step < 1:
            raise UserError(f"decoder_sparse_step = {step!r} is not a positive whole number")
        return {"dense_layers": tuple(i for i in layer_range(fields) if i in dense or (i + 1) % step)}

    def to_hf(config: StackConfig) -> dict[str, Any]:
        return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}

    return ConfigField(names, from_hf, to_hf)


def first_dense_layers(default: int) -> ConfigField:
    """The layers before ``first_k_dense_replace`` have a dense MLP, the others experts (DeepSeek)."""

    def from_hf(fields: HfFields) -> dict[str, Any]:
        count = fields["first_k_dense_replace"] or 0
        return {"dense_layers": tuple(i for i in layer_range(fields) if i < count)}

    return ConfigField(
        {"first_k_dense_replace": default, "num_hidden_layers": REQUIRED}, from_hf,
        lambda config: {"first_k_dense_replace": len(config.dense_layers)},
    )


def _uses_window(fields: HfFields) -> bool:
    return bool(fields["use_sliding_window"] and fields["sliding_window"])


def layer_range(fields: HfFields) -> range:
    """The indices of all layers. Their number is bounded, because a damaged config.json may claim any number."""
    count = fields["num_hidden_layers"]
    if not isinstance(count, int) or count > MAX_LAYERS:
        raise UserError(f"num_hidden_layers = {count!r} is not a whole number of at most {MAX_LAYERS}")
    return range(count)


def _windows(fields: HfFields, default: list[str]) -> tuple[int, ...]:
    """The window of each layer (0: none), by ``layer_types`` or else by the kinds of layers in ``default``."""
    kinds = fields["layer_types"] or default
    _check_layer_types(kinds, "sliding_attention", "full_attention")
    if len(kinds) != fields["num_hidden_layers"]:
        raise UserError(f"layer_types names {len(kinds)} layers and num_hidden_layers is {fields['num_hidden_layers']}")
    windows = tuple((fields["sliding_window"] or 0) if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _check_layer_types(kinds: Any, *allowed: str) -> None:
    if kinds is not None and (not isinstance(kinds, list) or any(kind not in allowed for kind in kinds)):
        raise UserError(f"layer_types = {shown(kinds)} is not supported; only {' and '.join(allowed)}, or null")


def _layer_types(config: StackConfig) -> dict[str, Any]:
    windows = list(itertools.islice(itertools.cycle(config.windows or (0,)), config.layers))
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"sliding_window": max(windows) or None, "layer_types": kinds}
