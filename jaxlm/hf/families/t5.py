"""The table of T5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxlm.hf.families.fields import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    ConfigField,
    Family,
    HfFields,
    TensorSpec,
    choice,
    constant,
    linear,
    norm,
    optional_size,
    renamed,
)
from jaxlm.nn.config import Seq2SeqConfig

__all__ = ["T5"]


def _output_scale(fields: HfFields) -> float:
    """T5 multiplies the decoder's output by ``1 / sqrt(d_model)`` before a tied head. Here the scale of the decoder's
    final norm is multiplied by it instead."""
    scaled = fields["scale_decoder_outputs"]
    scaled = fields["tie_word_embeddings"] is not False if scaled is None else scaled
    return fields["d_model"] ** -0.5 if scaled else 1.0


def _tensors() -> dict[str, TensorSpec]:
    tensors = {
        "embed/table": TensorSpec(
            "shared.weight", aliases=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        ),
        **linear("head", "lm_head"),
    }
    for side in ("encoder", "decoder"):
        path, hf_layer = f"{side}/layers", f"{side}.block.{{}}.layer"
        attentions = {"attn": "0.SelfAttention"} | ({"cross": "1.EncDecAttention"} if side == "decoder" else {})
        for attention, hf_attention in attentions.items():
            for name in "qkvo":
                tensors |= linear(f"{path}/{attention}/{name}", f"{hf_layer}.{hf_attention}.{name}")
            tensors |= norm(f"{path}/{attention}_norm", f"{hf_layer}.{hf_attention[0]}.layer_norm")
        hf_mlp = f"{hf_layer}.{len(attentions)}"
        for name, hf_name in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items():
            tensors |= linear(f"{path}/mlp/{name}", f"{hf_mlp}.DenseReluDense.{hf_name}")
        tensors |= norm(f"{path}/mlp_norm", f"{hf_mlp}.layer_norm")
        scale = {"scale": _output_scale} if side == "decoder" else {}
        tensors |= norm(f"{side}/final_norm", f"{side}.final_layer_norm", **scale)
        hf_bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors[f"{side}/rel/table"] = TensorSpec(hf_bias)
    return tensors


def _up_projection(side: str) -> Callable[[Seq2SeqConfig], str]:
    """The name of the MLP's first kernel: ``wi_1`` beside a gate, else ``wi``."""
    hf_mlp = f"{side}.block.{{}}.layer.{1 if side == 'encoder' else 2}.DenseReluDense"
    return lambda config: f"{hf_mlp}.{'wi_1' if config.gated else 'wi'}.weight"


_PROJECTIONS = choice(
    "feed_forward_proj", "activation",
    ACTIVATIONS | {f"gated-{name}": gated for name, gated in GATED_ACTIVATIONS.items()} | {"gated-gelu": "geglu_tanh"},
    "relu",
)


def _activation(fields: HfFields) -> dict[str, Any]:
    """``feed_forward_proj`` says both what is applied and whether there is a gate; files may say each by itself."""
    name, gated = fields["dense_act_fn"], fields["is_gated_act"]
    found = _PROJECTIONS.from_hf(fields)
    if name is None and gated is None:
        return found
    first, _, last = fields["feed_forward_proj"].rpartition("-")
    last = "gelu_new" if (first, last) == ("gated", "gelu") else last
    names = GATED_ACTIVATIONS if (first == "gated" if gated is None else gated) else ACTIVATIONS
    return choice("dense_act_fn", "activation", names).from_hf({"dense_act_fn": last if name is None else name})


_ACTIVATION = ConfigField(_PROJECTIONS.hf_defaults | {"dense_act_fn": None, "is_gated_act": None}, _activation,
                          _PROJECTIONS.to_hf)

T5 = Family(
    config_class=Seq2SeqConfig,
    architecture="T5ForConditionalGeneration",
    fields=(
        renamed("vocab_size", "vocab_size", default=32128),
        renamed("d_model", "width", default=512),
        optional_size("d_ff", "ffn", "d_ffn", 2048),
        renamed("num_heads", "heads", default=8),
        optional_size("d_kv", "head_dim", "d_head", 64),
        ConfigField(
            {"num_layers": 6, "num_decoder_layers": None},
            lambda fields: {
                "encoder_layers": fields["num_layers"],
                "decoder_layers": fields["num_layers"] if fields["num_decoder_layers"] is None
                else fields["num_decoder_layers"],
            },
            lambda config: {"num_layers": config.encoder_layers, "num_decoder_layers": config.decoder_layers},
        ),
        renamed("relative_attention_num_buckets", "relative_buckets", default=32),
        renamed("relative_attention_max_distance", "relative_max_distance", default=128),
        renamed("dropout_rate", "dropout", default=0.1, cast=float),
        renamed("layer_norm_epsilon", "norm_eps", default=1e-6, cast=float),
        _ACTIVATION,
        ConfigField(
            {"tie_word_embeddings": True, "scale_decoder_outputs": None},  # see _output_scale
            lambda fields: {"tie_embeddings": True},  # the reader unties them where the file has another head
            lambda config: {"tie_word_embeddings": config.tie_embeddings},
        ),
        constant(norm="rmsnorm", norm_position="pre", positions="relative", attention_scale=1.0),
    ),
    tensors=_tensors() | {
        f"{side}/layers/mlp/up/kernel": TensorSpec(_up_projection(side), transposed=True)
        for side in ("encoder", "decoder")
    },
    unused_tensors=(
        r"(encoder|decoder)\.embed_tokens\.weight", r"lm_head\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
)
