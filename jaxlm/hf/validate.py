"""Whether the sizes that a config.json tells make a model: looked at before anything is allocated or listed for it."""

from __future__ import annotations

from jaxlm.core.config import to_dict
from jaxlm.core.errors import UserError
from jaxlm.nn.config import LSTMConfig, ModelConfig, Seq2SeqConfig

__all__ = ["MOST", "MOST_LAYERS", "check_sizes", "layer_counts"]

MOST = 1e30  # larger numbers, whose squares float32 has not, are mistakes
MOST_LAYERS = 10_000  # they are listed one by one


def layer_counts(config: ModelConfig) -> tuple[str, ...]:
    """The fields that count layers."""
    return ("encoder_layers", "decoder_layers") if isinstance(config, Seq2SeqConfig) else ("layers",)


def check_sizes(config: ModelConfig) -> None:
    """UserError where sizes make no model. They are only claims: the tensors of the file have to be of these sizes."""
    _check_counts(config)
    for name, value in to_dict(config).items():
        for number in value if isinstance(value, list) else [value]:
            least, most = -1 if name.endswith("_id") else 0, MOST if isinstance(number, float) else 2**31 - 1
            if isinstance(number, int | float) and not least <= number <= most:
                raise UserError(f"{name} is {number}, which is not between {least} and {most}; check config.json")
    if isinstance(config, LSTMConfig):
        return
    for counted in layer_counts(config):
        layer_groups, layers = getattr(config, counted.replace("layers", "layer_groups")), getattr(config, counted)
        if layer_groups and (min(layer_groups) < 1 or sum(layer_groups) != layers):
            raise UserError(f"{counted.replace('layers', 'layer_groups')} = {layer_groups} are not {layers} layers")
    if config.experts and not 1 <= config.experts_per_token <= config.experts:
        raise UserError(f"{config.experts_per_token} experts a token are not from 1 to the {config.experts} there are")
    if config.positions == "rotary" and (config.d_rotary % 2 or config.d_rotary > config.d_head):
        raise UserError(
            f"{config.d_rotary} of the {config.d_head} dimensions of a head are rotated, which is odd or too many; "
            "check the sizes"
        )
    scaling = config.rope_scaling
    for factors in (scaling.short_factor, scaling.long_factor):
        if scaling.method == "longrope" and len(factors) != config.d_rotary // 2:
            raise UserError(f"rope_scaling has {len(factors)} factors where {config.d_rotary // 2} are due")


def _check_counts(config: ModelConfig) -> None:
    layers = layer_counts(config)
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
        if getattr(config, name) > MOST_LAYERS:
            raise UserError(f"{name} is {getattr(config, name)}, more than the {MOST_LAYERS} that are read")
