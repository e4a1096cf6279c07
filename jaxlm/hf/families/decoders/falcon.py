"""The table of Falcon."""

from __future__ import annotations

from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.hf.families.fields import (
    ACTIVATIONS,
    ConfigField,
    Family,
    HfFields,
    TensorSpec,
    choice,
    constant,
    fused_qkv,
    linear,
    norm,
    optional_size,
    renamed,
    require_value,
)
from jaxlm.hf.families.llama import INV_FREQ
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["FALCON"]

_LAYER = "transformer.h.{}"


def _architecture(fields: HfFields) -> dict[str, Any]:
    """Falcon 40B has grouped heads and two norms of parallel layers; in others attention and MLP share one."""
    heads, norms = fields["num_attention_heads"], fields["num_ln_in_parallel_attn"]
    if fields["new_decoder_architecture"]:
        if norms == 1 and not fields["parallel_attn"]:
            raise UserError("num_ln_in_parallel_attn = 1 needs parallel_attn = true")
        return {"kv_heads": fields["num_kv_heads"] or heads, "parallel": True, "shared_norm": norms == 1}
    parallel = bool(fields["parallel_attn"])
    if parallel and norms == 2:
        raise UserError("num_ln_in_parallel_attn = 2 needs new_decoder_architecture = true")
    return {"kv_heads": 1 if fields["multi_query"] else heads, "parallel": parallel, "shared_norm": parallel}


def _to_hf(config: DecoderConfig) -> dict[str, Any]:
    return {
        "num_attention_heads": config.heads, "num_kv_heads": config.n_kv_heads,
        "new_decoder_architecture": config.parallel and not (
            config.shared_norm and config.n_kv_heads in (1, config.heads)
        ),
        "multi_query": config.n_kv_heads == 1, "parallel_attn": config.parallel,
        "num_ln_in_parallel_attn": (1 if config.shared_norm else 2) if config.parallel else None,
    }


def _norm_name(first: str, alone: str):
    return lambda config: (
        f"{_LAYER}.{first if config.parallel and not config.shared_norm else alone}"
    )


FALCON = Family(
    config_class=DecoderConfig,
    architecture="FalconForCausalLM",
    fields=(
        renamed("vocab_size", "vocab_size", default=65024),
        renamed("hidden_size", "width", default=4544),
        renamed("num_hidden_layers", "layers", default=32),
        renamed("num_attention_heads", "heads", default=71),
        ConfigField(
            {
                "num_attention_heads": 71, "num_kv_heads": None, "new_decoder_architecture": False, "multi_query": True,
                "parallel_attn": True, "num_ln_in_parallel_attn": None,
            },
            _architecture, _to_hf,
        ),
        optional_size("ffn_hidden_size", "ffn", "d_ffn"),
        choice("activation", "activation", ACTIVATIONS, "gelu"),
        renamed("max_position_embeddings", "max_positions", default=2048),
        renamed("layer_norm_epsilon", "norm_eps", default=1e-5, cast=float),
        renamed("bias", "qkv_bias", "out_bias", "mlp_bias", default=False),
        renamed("hidden_dropout", "dropout", default=0.0, cast=float),
        renamed("attention_dropout", "attention_dropout", default=0.0, cast=float),
        renamed("tie_word_embeddings", "tie_embeddings", default=True),
        require_value("alibi", False, default=False),
        rope(),
        constant(norm="layernorm", positions="rotary"),
    ),
    tensors={
        "embed/table": TensorSpec("transformer.word_embeddings.weight"),
        **fused_qkv(f"{_LAYER}.self_attention.query_key_value", turns=lambda config: config.n_kv_heads),
        **linear("decoder/layers/attn/o", f"{_LAYER}.self_attention.dense"),
        **linear("decoder/layers/mlp/up", f"{_LAYER}.mlp.dense_h_to_4h"),
        **linear("decoder/layers/mlp/down", f"{_LAYER}.mlp.dense_4h_to_h"),
        **{
            f"decoder/layers/{norm_path}/{part}": TensorSpec(_norm_name(f"{first}.{stored}", f"{alone}.{stored}"))
            for norm_path, first, alone in (
                ("attn_norm", "ln_attn", "input_layernorm"), ("mlp_norm", "ln_mlp", "post_attention_layernorm"),
            )
            for part, stored in (("scale", "weight"), ("bias", "bias"))
        },
        **norm("decoder/final_norm", "transformer.ln_f"),
        **linear("head", "lm_head"),
    },
    prefix="transformer.",
    unused_tensors=(INV_FREQ,),
)
