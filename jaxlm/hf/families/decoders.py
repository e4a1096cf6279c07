"""The tables of the decoder families of Hugging Face; see ``hf_fields`` for what the entries mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxlm.hf.families.fields import (
    GATED,
    PLAIN,
    REQUIRED,
    Family,
    Field,
    Tensor,
    choice,
    constant,
    echo,
    fused,
    linear,
    must,
    norm,
    optional,
    same,
    size,
)
from jaxlm.hf.families.layer_fields import (
    alternating_windows,
    late_windows,
    layered_rope,
    rope,
    sparse_layers,
    switched_window,
    window,
)
from jaxlm.nn.config import DecoderConfig

_QKV = ("q", "k", "v")
_LAYER = "model.layers.{}"
_INV_FREQ = r".*rotary_emb\.inv_freq"
DERIVED = object()
_ATTENTION_BIAS = same("attention_bias", "qkv_bias", "out_bias", default=False)

LLAMA_TENSORS = {
    "embed/table": Tensor("model.embed_tokens.weight"),
    **{
        path: tensor
        for name in (*_QKV, "o")
        for path, tensor in linear(f"decoder/layers/attn/{name}", f"{_LAYER}.self_attn.{name}_proj").items()
    },
    **{
        path: tensor
        for name in ("gate", "up", "down")
        for path, tensor in linear(f"decoder/layers/mlp/{name}", f"{_LAYER}.mlp.{name}_proj").items()
    },
    **norm("decoder/layers/attn_norm", f"{_LAYER}.input_layernorm"),
    **norm("decoder/layers/mlp_norm", f"{_LAYER}.post_attention_layernorm"),
    **norm("decoder/final_norm", "model.norm"),
    **linear("head", "lm_head"),
}
QK_NORM_TENSORS = {
    **norm("decoder/layers/attn/q_norm", f"{_LAYER}.self_attn.q_norm"),
    **norm("decoder/layers/attn/k_norm", f"{_LAYER}.self_attn.k_norm"),
}


def expert_tensors(router: str, experts: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = linear("decoder/layers/mlp/router", f"{_LAYER}.{router}")
    for ours, theirs in names.items():
        tensors |= linear(f"decoder/layers/mlp/experts/{ours}", f"{_LAYER}.{experts}.{{}}.{theirs}")
    return tensors


def llama_fields(
    *, act: str = "hidden_act", default_act: str = "silu", eps: float = 1e-6, kv_heads: int | None = None,
    head_dim: int | object | None = None, context: int = 2048, tied: bool = False,
) -> tuple[Field, ...]:
    """What all descendants of Llama call alike. ``head_dim`` is DERIVED in families without such a field."""
    return (
        same("vocab_size", "vocab_size"),
        same("hidden_size", "width"),
        size("intermediate_size", "ffn", "d_ffn", REQUIRED),
        same("num_hidden_layers", "layers"),
        same("num_attention_heads", "heads"),
        size("num_key_value_heads", "kv_heads", "n_kv_heads", kv_heads),
        *(() if head_dim is DERIVED else (size("head_dim", "head_dim", "d_head", head_dim),)),
        choice(act, "activation", GATED, default_act),
        same("max_position_embeddings", "max_positions", default=context),
        same("rms_norm_eps", "norm_eps", default=eps, cast=float),
        same("attention_dropout", "attention_dropout", default=0.0, cast=float),
        same("tie_word_embeddings", "tie_embeddings", default=tied),
        constant(norm="rmsnorm", positions="rotary"),
    )


LLAMA = Family(
    config=DecoderConfig,
    architecture="LlamaForCausalLM",
    fields=(
        *llama_fields(),
        rope(),
        _ATTENTION_BIAS,
        same("mlp_bias", "mlp_bias", default=False),
        constant(norm_position="pre"),
    ),
    tensors=LLAMA_TENSORS,
    unused=(_INV_FREQ,),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MistralForCausalLM",
    fields=(*llama_fields(kv_heads=8, context=131072), rope(), window(4096)),
)

MIXTRAL = Family(
    config=DecoderConfig,
    architecture="MixtralForCausalLM",
    fields=(
        *llama_fields(kv_heads=8, context=131072, eps=1e-5),
        rope(1e6),
        window(None),
        same("num_local_experts", "experts", default=8),
        same("num_experts_per_tok", "experts_per_token", default=2),
        constant(expert_renormalize=True),
    ),
    tensors=LLAMA_TENSORS | expert_tensors(
        "block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}
    ),
    unused=(_INV_FREQ,),
)

QWEN2 = dataclasses.replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    fields=(*llama_fields(kv_heads=32, context=32768), rope(), late_windows(), constant(qkv_bias=True)),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    architecture="Qwen3ForCausalLM",
    fields=(
        *llama_fields(kv_heads=32, head_dim=128, context=32768),
        rope(),
        late_windows(),
        _ATTENTION_BIAS,
        constant(qk_norm="head"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS,
)

QWEN3_MOE = Family(
    config=DecoderConfig,
    architecture="Qwen3MoeForCausalLM",
    fields=(
        *llama_fields(kv_heads=4, context=32768),
        rope(),
        switched_window(),
        _ATTENTION_BIAS,
        Field(
            {"num_local_experts": None, "num_experts": 128},
            lambda values: {"experts": values["num_local_experts"] or values["num_experts"]},
            lambda config: {"num_experts": config.experts},
        ),
        same("num_experts_per_tok", "experts_per_token", default=8),
        size("moe_intermediate_size", "expert_ffn", "d_expert", 768),
        same("norm_topk_prob", "expert_renormalize", default=False),
        sparse_layers(),
        constant(qk_norm="head"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS | expert_tensors(
        "mlp.gate", "mlp.experts", {name: f"{name}_proj" for name in ("gate", "up", "down")}
    ),
    ignored=("max_window_layers",),
    unused=(_INV_FREQ,),
)


def _gemma_norms(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gemma stores what a norm's scale exceeds 1 by."""
    return {
        path: dataclasses.replace(tensor, offset=1.0) if path.endswith("norm/scale") else tensor
        for path, tensor in tensors.items()
    }


_GEMMA_TENSORS = _gemma_norms(
    LLAMA_TENSORS
    | norm("decoder/layers/attn_out_norm", f"{_LAYER}.post_attention_layernorm")
    | norm("decoder/layers/mlp_norm", f"{_LAYER}.pre_feedforward_layernorm")
    | norm("decoder/layers/mlp_out_norm", f"{_LAYER}.post_feedforward_layernorm")
)
_QUERY_SCALE = Field(
    {"query_pre_attn_scalar": 256},
    lambda values: {"attention_scale": float(values["query_pre_attn_scalar"]) ** -0.5},
    lambda config: {"query_pre_attn_scalar": _whole((config.attention_scale or config.d_head**-0.5) ** -2)},
)


def _whole(value: float) -> int | float:
    """Without the rounding error of a square root taken and undone, where it was a whole number."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _gemma_fields(logit_softcap: float | None, context: int) -> tuple[Field, ...]:
    return (
        *llama_fields(
            act="hidden_activation", default_act="gelu_pytorch_tanh", kv_heads=4, head_dim=256, context=context,
            tied=True,
        ),
        _ATTENTION_BIAS,
        _QUERY_SCALE,
        optional("final_logit_softcapping", "logit_softcap", logit_softcap),
        must("use_bidirectional_attention", False, default=False),
        constant(norm_position="sandwich", embed_scale=True),
    )


GEMMA2 = Family(
    config=DecoderConfig,
    architecture="Gemma2ForCausalLM",
    fields=(
        *_gemma_fields(30.0, 8192),
        optional("attn_logit_softcapping", "attention_softcap", 50.0),
        rope(),
        alternating_windows(4096, 2),
    ),
    tensors=_GEMMA_TENSORS,
    ignored=("hidden_act",),  # in many files; transformers reads hidden_activation
    unused=(_INV_FREQ,),
)

GEMMA3 = Family(
    config=DecoderConfig,
    architecture="Gemma3ForCausalLM",
    fields=(
        *_gemma_fields(None, 131072),
        must("attn_logit_softcapping"),  # in its config, but transformers' model does not apply it
        layered_rope(1e6, 1e4),
        alternating_windows(4096, 6, "sliding_window_pattern"),
        constant(qk_norm="head"),
    ),
    tensors=_GEMMA_TENSORS | _gemma_norms(QK_NORM_TENSORS),
    ignored=("hidden_act", "_sliding_window_pattern"),  # in many files; transformers reads hidden_activation
    unused=(_INV_FREQ,),
)


def _heads(config: DecoderConfig) -> tuple[int, int, int]:
    kv = config.n_kv_heads * config.d_head
    return config.heads * config.d_head, kv, kv


PHI3 = Family(
    config=DecoderConfig,
    architecture="Phi3ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, context=4096, head_dim=DERIVED),
        rope(fraction="partial_rotary_factor", original="original_max_position_embeddings"),
        window(None),
        same("resid_pdrop", "dropout", default=0.0, cast=float),
        echo("embd_pdrop", "dropout", 0.0),
    ),
    tensors=LLAMA_TENSORS
    | fused(tuple(f"decoder/layers/attn/{name}" for name in _QKV), f"{_LAYER}.self_attn.qkv_proj", _heads)
    | fused(
        ("decoder/layers/mlp/gate", "decoder/layers/mlp/up"), f"{_LAYER}.mlp.gate_up_proj",
        lambda config: (config.d_ffn, config.d_ffn),
    ),
    unused=(_INV_FREQ,),
)

OLMO2 = Family(
    config=DecoderConfig,
    architecture="Olmo2ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, head_dim=DERIVED),
        rope(),
        _ATTENTION_BIAS,
        constant(qk_norm="width", norm_position="output"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS
    | norm("decoder/layers/attn_norm", f"{_LAYER}.post_attention_layernorm")
    | norm("decoder/layers/mlp_norm", f"{_LAYER}.post_feedforward_layernorm"),
    unused=(_INV_FREQ,),
)


_BLOCK = "transformer.h.{}"


GPT2 = Family(
    config=DecoderConfig,
    architecture="GPT2LMHeadModel",
    fields=(
        same("vocab_size", "vocab_size", default=50257),
        same("n_positions", "max_positions", default=1024),
        same("n_embd", "width", default=768),
        same("n_layer", "layers", default=12),
        same("n_head", "heads", default=12),
        size("n_inner", "ffn", "d_ffn"),
        choice("activation_function", "activation", PLAIN, "gelu_new"),
        same("resid_pdrop", "dropout", default=0.1, cast=float),
        echo("embd_pdrop", "dropout", 0.1),
        same("attn_pdrop", "attention_dropout", default=0.1, cast=float),
        same("layer_norm_epsilon", "norm_eps", default=1e-5, cast=float),
        same("tie_word_embeddings", "tie_embeddings", default=True),
        Field(
            {"scale_attn_weights": True},
            lambda values: {"attention_scale": 0.0 if values["scale_attn_weights"] else 1.0},
            lambda config: {"scale_attn_weights": config.attention_scale != 1.0},
        ),
        same("scale_attn_by_inverse_layer_idx", "attention_scale_by_layer", default=False),
        must("add_cross_attention", False, default=False),
        constant(
            norm="layernorm", norm_position="pre", positions="learned", qkv_bias=True, out_bias=True, mlp_bias=True
        ),
    ),
    tensors={
        "embed/table": Tensor("transformer.wte.weight"),
        "decoder/pos/table": Tensor("transformer.wpe.weight"),
        **fused(
            tuple(f"decoder/layers/attn/{name}" for name in _QKV), f"{_BLOCK}.attn.c_attn", _heads, transposed=False
        ),
        **linear("decoder/layers/attn/o", f"{_BLOCK}.attn.c_proj", transposed=False),
        **linear("decoder/layers/mlp/up", f"{_BLOCK}.mlp.c_fc", transposed=False),
        **linear("decoder/layers/mlp/down", f"{_BLOCK}.mlp.c_proj", transposed=False),
        **norm("decoder/layers/attn_norm", f"{_BLOCK}.ln_1"),
        **norm("decoder/layers/mlp_norm", f"{_BLOCK}.ln_2"),
        **norm("decoder/final_norm", "transformer.ln_f"),
        **linear("head", "lm_head"),
    },
    prefix="transformer.",
    ignored=(
        "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
        "summary_type", "summary_use_proj",
    ),
    unused=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
)

NEOX = Family(
    config=DecoderConfig,
    architecture="GPTNeoXForCausalLM",
    fields=(
        same("vocab_size", "vocab_size", default=50432),
        same("hidden_size", "width", default=6144),
        same("num_hidden_layers", "layers", default=44),
        same("num_attention_heads", "heads", default=64),
        size("intermediate_size", "ffn", "d_ffn", 24576),
        choice("hidden_act", "activation", PLAIN, "gelu"),
        same("max_position_embeddings", "max_positions", default=2048),
        same("layer_norm_eps", "norm_eps", default=1e-5, cast=float),
        same("hidden_dropout", "dropout", default=0.0, cast=float),
        same("attention_dropout", "attention_dropout", default=0.0, cast=float),
        same("use_parallel_residual", "parallel", default=True),
        same("attention_bias", "qkv_bias", "out_bias", default=True),
        same("tie_word_embeddings", "tie_embeddings", default=False),
        rope(base="rotary_emb_base", fraction="rotary_pct", whole=0.25),
        constant(norm="layernorm", norm_position="pre", positions="rotary", mlp_bias=True),
    ),
    tensors={
        "embed/table": Tensor("gpt_neox.embed_in.weight"),
        **fused(
            tuple(f"decoder/layers/attn/{name}" for name in _QKV), "gpt_neox.layers.{}.attention.query_key_value",
            _heads, by_head=True,
        ),
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
    unused=(r".*attention\.(masked_)?bias", _INV_FREQ),
)
