"""The tables of GPT-2, GPT-J, GPT-NeoX, gpt-oss and OPT."""

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
    write_only,
)
from jaxlm.hf.families.layer_fields import interleaved_sliding_window
from jaxlm.hf.families.llama import INV_FREQ, LAYER, LLAMA_TENSORS, fused_expert_tensors, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["GPT2", "GPTJ", "GPT_NEOX", "GPT_OSS", "OPT"]

_LAYER = "transformer.h.{}"


def _fields(vocab: int, context: int, width: int, layers: int, heads: int, dropout: float) -> tuple[ConfigField, ...]:
    """The fields of GPT-2 that GPT-J has too, with their defaults."""
    return (
        renamed("vocab_size", "vocab_size", default=vocab),
        renamed("n_positions", "max_positions", default=context),
        renamed("n_embd", "width", default=width),
        renamed("n_layer", "layers", default=layers),
        renamed("n_head", "heads", default=heads),
        optional_size("n_inner", "ffn", "d_ffn"),
        choice("activation_function", "activation", ACTIVATIONS, "gelu_new"),
        renamed("resid_pdrop", "dropout", default=dropout, cast=float),
        write_only("embd_pdrop", "dropout", dropout),
        renamed("attn_pdrop", "attention_dropout", default=dropout, cast=float),
        renamed("layer_norm_epsilon", "norm_eps", default=1e-5, cast=float),
        constant(norm="layernorm", norm_position="pre", mlp_bias=True),
    )


GPT2 = Family(
    config_class=DecoderConfig,
    architecture="GPT2LMHeadModel",
    fields=(
        *_fields(50257, 1024, 768, 12, 12, 0.1),
        renamed("tie_word_embeddings", "tie_embeddings", default=True),
        ConfigField(
            {"scale_attn_weights": True},
            lambda fields: {"attention_scale": 0.0 if fields["scale_attn_weights"] else 1.0},
            lambda config: {"scale_attn_weights": config.attention_scale != 1.0},
        ),
        renamed("scale_attn_by_inverse_layer_idx", "attention_scale_by_layer", default=False),
        require_value("add_cross_attention", False, default=False),
        constant(positions="learned", qkv_bias=True, out_bias=True),
    ),
    tensors={
        "embed/table": TensorSpec("transformer.wte.weight"),
        "decoder/pos/table": TensorSpec("transformer.wpe.weight"),
        **fused_qkv(f"{_LAYER}.attn.c_attn", transposed=False),
        **linear("decoder/layers/attn/o", f"{_LAYER}.attn.c_proj", transposed=False),
        **linear("decoder/layers/mlp/up", f"{_LAYER}.mlp.c_fc", transposed=False),
        **linear("decoder/layers/mlp/down", f"{_LAYER}.mlp.c_proj", transposed=False),
        **norm("decoder/layers/attn_norm", f"{_LAYER}.ln_1"),
        **norm("decoder/layers/mlp_norm", f"{_LAYER}.ln_2"),
        **norm("decoder/final_norm", "transformer.ln_f"),
        **linear("head", "lm_head"),
    },
    prefix="transformer.",
    unused_tensors=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
)


def _rotary_fraction(fields: HfFields) -> dict[str, Any]:
    if not fields["rotary_dim"]:
        raise UserError(f"rotary_dim = {fields['rotary_dim']!r} is not supported; only a positive number")
    return {"rotary_fraction": fields["rotary_dim"] * fields["n_head"] / fields["n_embd"]}


GPTJ = Family(
    config_class=DecoderConfig,
    architecture="GPTJForCausalLM",
    fields=(
        *_fields(50400, 2048, 4096, 28, 16, 0.0),
        renamed("tie_word_embeddings", "tie_embeddings", default=False),
        ConfigField(
            {"rotary_dim": 64, "n_head": 16, "n_embd": 4096}, _rotary_fraction,
            lambda config: {"rotary_dim": config.d_rotary},
        ),
        constant(positions="rotary", rope_interleaved=True, parallel=True, shared_norm=True, logits_bias=True),
    ),
    tensors={
        "embed/table": TensorSpec("transformer.wte.weight"),
        **linear("decoder/layers/attn/q", f"{_LAYER}.attn.q_proj"),
        **linear("decoder/layers/attn/k", f"{_LAYER}.attn.k_proj"),
        **linear("decoder/layers/attn/v", f"{_LAYER}.attn.v_proj"),
        **linear("decoder/layers/attn/o", f"{_LAYER}.attn.out_proj"),
        **linear("decoder/layers/mlp/up", f"{_LAYER}.mlp.fc_in"),
        **linear("decoder/layers/mlp/down", f"{_LAYER}.mlp.fc_out"),
        **norm("decoder/layers/attn_norm", f"{_LAYER}.ln_1"),
        **norm("decoder/final_norm", "transformer.ln_f"),
        **linear("head", "lm_head"),
        "logits_bias": TensorSpec("lm_head.bias"),
    },
    prefix="transformer.",
    unused_tensors=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias", r".*\.embed_positions"),
)

_OPT_LAYER = "model.decoder.layers.{}"


def _embedding_width(fields: HfFields) -> dict[str, Any]:
    if fields["word_embed_proj_dim"] not in (None, fields["hidden_size"]):
        raise UserError(
            f"word_embed_proj_dim = {fields['word_embed_proj_dim']!r} is not supported; only hidden_size, "
            f"{fields['hidden_size']}"
        )
    return {"width": fields["hidden_size"]}


OPT = Family(
    config_class=DecoderConfig,
    architecture="OPTForCausalLM",
    fields=(
        renamed("vocab_size", "vocab_size", default=50272),
        ConfigField(
            {"hidden_size": 768, "word_embed_proj_dim": None}, _embedding_width,
            lambda config: {"hidden_size": config.width, "word_embed_proj_dim": config.width},
        ),
        renamed("num_hidden_layers", "layers", default=12),
        renamed("num_attention_heads", "heads", default=12),
        optional_size("ffn_dim", "ffn", "d_ffn", 3072),
        renamed("max_position_embeddings", "max_positions", default=2048),
        choice("activation_function", "activation", ACTIVATIONS, "relu"),
        choice("do_layer_norm_before", "norm_position", {True: "pre", False: "post"}, True),
        require_value("_remove_final_layer_norm", False, default=False),
        renamed("enable_bias", "qkv_bias", "out_bias", "mlp_bias", default=True),
        renamed("layer_norm_elementwise_affine", "norm_scale", default=True),
        renamed("dropout", "dropout", default=0.1, cast=float),
        renamed("attention_dropout", "attention_dropout", default=0.0, cast=float),
        renamed("tie_word_embeddings", "tie_embeddings", default=True),
        constant(norm="layernorm", norm_eps=1e-5, positions="learned", position_offset=2),
    ),
    tensors={
        "embed/table": TensorSpec("model.decoder.embed_tokens.weight", aliases=("lm_head.weight",)),
        "decoder/pos/table": TensorSpec("model.decoder.embed_positions.weight"),
        **linear("decoder/layers/attn/q", f"{_OPT_LAYER}.self_attn.q_proj"),
        **linear("decoder/layers/attn/k", f"{_OPT_LAYER}.self_attn.k_proj"),
        **linear("decoder/layers/attn/v", f"{_OPT_LAYER}.self_attn.v_proj"),
        **linear("decoder/layers/attn/o", f"{_OPT_LAYER}.self_attn.out_proj"),
        **linear("decoder/layers/mlp/up", f"{_OPT_LAYER}.fc1"),
        **linear("decoder/layers/mlp/down", f"{_OPT_LAYER}.fc2"),
        **norm("decoder/layers/attn_norm", f"{_OPT_LAYER}.self_attn_layer_norm"),
        **norm("decoder/layers/mlp_norm", f"{_OPT_LAYER}.final_layer_norm"),
        **norm("decoder/final_norm", "model.decoder.final_layer_norm"),
        **linear("head", "lm_head"),
    },
    prefix="model.",
)

GPT_NEOX = Family(
    config_class=DecoderConfig,
    architecture="GPTNeoXForCausalLM",
    fields=(
        renamed("vocab_size", "vocab_size", default=50432),
        renamed("hidden_size", "width", default=6144),
        renamed("num_hidden_layers", "layers", default=44),
        renamed("num_attention_heads", "heads", default=64),
        optional_size("intermediate_size", "ffn", "d_ffn", 24576),
        choice("hidden_act", "activation", ACTIVATIONS, "gelu"),
        renamed("max_position_embeddings", "max_positions", default=2048),
        renamed("layer_norm_eps", "norm_eps", default=1e-5, cast=float),
        renamed("hidden_dropout", "dropout", default=0.0, cast=float),
        renamed("attention_dropout", "attention_dropout", default=0.0, cast=float),
        renamed("use_parallel_residual", "parallel", default=True),
        renamed("attention_bias", "qkv_bias", "out_bias", default=True),
        renamed("tie_word_embeddings", "tie_embeddings", default=False),
        rope(base="rotary_emb_base", fraction="rotary_pct", whole=0.25),
        constant(norm="layernorm", norm_position="pre", positions="rotary", mlp_bias=True),
    ),
    tensors={
        "embed/table": TensorSpec("gpt_neox.embed_in.weight"),
        **fused_qkv("gpt_neox.layers.{}.attention.query_key_value", turns=lambda config: config.n_kv_heads),
        **linear("decoder/layers/attn/o", "gpt_neox.layers.{}.attention.dense"),
        **linear("decoder/layers/mlp/up", "gpt_neox.layers.{}.mlp.dense_h_to_4h"),
        **linear("decoder/layers/mlp/down", "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
        **norm("decoder/layers/attn_norm", "gpt_neox.layers.{}.input_layernorm"),
        **norm("decoder/layers/mlp_norm", "gpt_neox.layers.{}.post_attention_layernorm"),
        **norm("decoder/final_norm", "gpt_neox.final_layer_norm"),
        **linear("head", "embed_out"),
    },
    prefix="gpt_neox.",
    head="embed_out.weight",
    unused_tensors=(r".*attention\.(masked_)?bias", INV_FREQ),
)

GPT_OSS = Family(
    config_class=DecoderConfig,
    architecture="GptOssForCausalLM",
    fields=(
        *llama_fields(kv_heads=8, head_dim=64, eps=1e-5, context=131072),
        rope(150000.0, context=131072, scaling={
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        }),
        interleaved_sliding_window(128, 2),
        renamed("attention_bias", "qkv_bias", "out_bias", default=True),
        renamed("num_local_experts", "experts", default=128),
        renamed("num_experts_per_tok", "experts_per_token", default=4),
        renamed("swiglu_alpha", "swiglu_alpha", default=1.702, cast=float),
        renamed("swiglu_limit", "swiglu_limit", default=7.0, cast=float),
        # transformers has one activation for the experts, whatever hidden_act says
        ConfigField({}, lambda fields: {"activation": "clamped_swiglu"}, lambda config: {"hidden_act": "silu"}),
        constant(attention_sinks=True, expert_bias=True, router_bias=True),
    ),
    tensors=LLAMA_TENSORS | {"decoder/layers/attn/sinks": TensorSpec(f"{LAYER}.self_attn.sinks")}
    | linear("decoder/layers/mlp/router", f"{LAYER}.mlp.router")
    | fused_expert_tensors(
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj", transposed=False, bias="_bias",
        turns=lambda config: config.d_expert,
    ),
    unused_tensors=(INV_FREQ,),
)
