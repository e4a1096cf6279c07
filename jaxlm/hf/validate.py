"""Checks of the sizes in a configuration, before anything is allocated for them: a config.json may claim anything."""

from __future__ import annotations

from jaxlm.core.config import to_dict
from jaxlm.core.errors import UserError
from jaxlm.nn.config import LSTMConfig, ModelConfig, Seq2SeqConfig, StackConfig

__all__ = ["MAX_LAYERS", "MAX_VALUE", "layer_count_fields", "validate_sizes"]

MAX_VALUE = 1e30  # larger numbers are mistakes: float32 cannot hold their squares
MAX_LAYERS = 10_000  # layers are listed one by one


def layer_count_fields(config: ModelConfig) -> tuple[str, ...]:
    """The names of the fields with numbers of layers."""
    return ("encoder_layers", "decoder_layers") if isinstance(config, Seq2SeqConfig) else ("layers",)


def validate_sizes(config: ModelConfig) -> None:
    """Checks that a model of these sizes can exist.

    Raises:
        UserError: it cannot; the message names the field.
    """
    _check_counts(config)
    for name, value in to_dict(config).items():
        for number in value if isinstance(value, list) else [value]:
            low, high = -1 if name.endswith("_id") else 0, MAX_VALUE if isinstance(number, float) else 2**31 - 1
            if isinstance(number, int | float) and not low <= number <= high:
                raise UserError(f"{name} is {number}, which is not between {low} and {high}; check config.json")
    if isinstance(config, LSTMConfig):
        return
    for counted in layer_count_fields(config):
        name, layers = counted.replace("layers", "layer_groups"), getattr(config, counted)
        groups = getattr(config, name)
        if groups and (min(groups) < 1 or sum(groups) != layers):
            raise UserError(f"{name} = {groups} are not {layers} layers")
    if config.experts and not 1 <= config.experts_per_token <= config.experts:
        raise UserError(
            f"experts_per_token is {config.experts_per_token}, which is not between 1 and experts = {config.experts}"
        )
    if config.experts and config.n_group != 1:
        _check_groups(config)
    if config.positions == "rotary" and (config.d_rotary % 2 or config.d_rotary > config.d_head):
        raise UserError(
            f"{config.d_rotary} of the {config.d_head} dimensions of a head are rotated, which is an odd number or "
            "too many; check the sizes"
        )
    scaling = config.rope_scaling
    for factors in (scaling.short_factor, scaling.long_factor):
        if scaling.method == "longrope" and len(factors) != config.d_rotary // 2:
            raise UserError(f"rope_scaling has {len(factors)} factors instead of {config.d_rotary // 2}")


def _check_groups(config: StackConfig) -> None:
    size, rest = divmod(config.experts, max(config.n_group, 1))
    if config.n_group < 1 or rest or size < 2:
        raise UserError(f"n_group is {config.n_group}; the {config.experts} experts make no such groups of 2 or more")
    if not 1 <= config.topk_group <= config.n_group or config.experts_per_token > config.topk_group * size:
        raise UserError(
            f"topk_group is {config.topk_group}: a token goes to {config.experts_per_token} experts of as many of the "
            f"{config.n_group} groups of {size} experts"
        )


def _check_counts(config: ModelConfig) -> None:
    layers = layer_count_fields(config)
    if isinstance(config, LSTMConfig):
        sides = [(config, ("vocab_size", "width", "d_hidden", *layers))]
    else:
        counts = ("vocab_size", "width", "heads", "n_kv_heads", "d_head", "d_ffn", "max_positions")
        sides = [(config, (*counts, *layers))]
        sides += [(config.decoder, counts)] if isinstance(config, Seq2SeqConfig) else []
    for side, names in sides:
        for name in names:
            if getattr(side, name) < 1:
                raise UserError(f"{name} is {getattr(side, name)}, which makes no model; check the sizes")
        if not isinstance(side, LSTMConfig) and side.heads % side.n_kv_heads:
            raise UserError(f"{side.heads} attention heads cannot share {side.n_kv_heads} key/value heads equally")
    for name in layers:
        if getattr(config, name) > MAX_LAYERS:
            raise UserError(f"{name} is {getattr(config, name)}, more than the {MAX_LAYERS} that are read")
