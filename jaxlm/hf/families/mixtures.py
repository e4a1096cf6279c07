"""The tables of mixtures of experts: GLM 4.5, dots.llm1 and MiniMax M2, whose router follows DeepSeek-V3; ERNIE 4.5 and
Granite."""

from __future__ import annotations

from typing import Any

from jaxlm.hf.families.decoders.llama_variants import MULTIPLIERS
from jaxlm.hf.families.fields import (
    REQUIRED,
    ConfigField,
    Family,
    HfFields,
    TensorSpec,
    choice,
    constant,
    linear,
    optional_size,
    renamed,
    require_value,
)
from jaxlm.hf.families.layer_fields import first_dense_layers, full_attention, layer_range, sliding_window_from_layer
from jaxlm.hf.families.llama import (
    ATTENTION_BIAS,
    EXPERT_TENSORS,
    INV_FREQ,
    LAYER,
    LLAMA_TENSORS,
    QK_NORM_TENSORS,
    expert_tensors,
    fused_expert_tensors,
    llama_fields,
    projections,
)
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig, StackConfig

__all__ = ["DOTS1", "ERNIE4_5_MOE", "GLM4_MOE", "GRANITEMOE", "MINIMAX_M2"]


def _shared_experts(hf_name: str, count: int | None, ffn: int) -> ConfigField:
    """The number of shared experts, which together are one of as many times the size ``moe_intermediate_size``."""
    return ConfigField(
        {hf_name: count, "moe_intermediate_size": ffn},
        lambda fields: {"shared_expert_ffn": (fields[hf_name] or 0) * fields["moe_intermediate_size"]},
        lambda config: {hf_name: config.shared_expert_ffn // config.d_expert},
    )


def _deepseek_fields(
    *, experts: Any, chosen: Any, ffn: int, shared: int | None, dense: int, renormalize: bool, scale: float = 1.0
) -> tuple[ConfigField, ...]:
    """The fields of a mixture as DeepSeek-V3 has them (arXiv:2412.19437, section 2.1.2); the arguments are defaults."""

    return (
        renamed("n_routed_experts", "experts", default=experts),
        renamed("num_experts_per_tok", "experts_per_token", default=chosen),
        optional_size("moe_intermediate_size", "expert_ffn", "d_expert", ffn),
        _shared_experts("n_shared_experts", shared, ffn),
        first_dense_layers(dense),
        renamed("norm_topk_prob", "expert_renormalize", default=renormalize),
        renamed("n_group", "n_group", default=1),
        renamed("topk_group", "topk_group", default=1),
        renamed("routed_scaling_factor", "routed_scaling_factor", default=scale, cast=float),
        constant(router_scores="sigmoid", correction_bias=True),
    )


_CORRECTION_BIAS = "decoder/layers/mlp/router/correction_bias"
_TENSORS = LLAMA_TENSORS | QK_NORM_TENSORS | EXPERT_TENSORS | {
    _CORRECTION_BIAS: TensorSpec(f"{LAYER}.mlp.gate.e_score_correction_bias"),
    **projections("mlp/shared", "mlp.shared_experts", "gate up down"),
}

GLM4_MOE = Family(
    config_class=DecoderConfig,
    architecture="Glm4MoeForCausalLM",
    fields=(
        *llama_fields(kv_heads=8, eps=1e-5, context=131072),
        rope(whole=0.5, context=131072),
        full_attention(),
        renamed("attention_bias", "qkv_bias", default=False),
        choice("use_qk_norm", "qk_norm", {False: "none", True: "head"}, False),
        *_deepseek_fields(experts=128, chosen=8, ffn=1408, shared=1, dense=1, renormalize=True),
    ),
    tensors=_TENSORS,
    unused_tensors=(INV_FREQ, r"model\.layers\.(46|92)\..*"),  # the layer that predicts the token after the next
)

DOTS1 = Family(
    config_class=DecoderConfig,
    architecture="Dots1ForCausalLM",
    fields=(
        *llama_fields(kv_heads=32),
        rope(),
        sliding_window_from_layer(first=62, switch=False),
        ATTENTION_BIAS,
        *_deepseek_fields(experts=REQUIRED, chosen=REQUIRED, ffn=1408, shared=None, dense=0, renormalize=False),
        constant(qk_norm="head"),
    ),
    tensors=_TENSORS,
    unused_tensors=(INV_FREQ,),
)


def _rotated_dimensions() -> ConfigField:
    """The number of rotated dimensions of a head, by which old files give the fraction."""
    names = {"rotary_dim": None, "head_dim": 128, "partial_rotary_factor": None, "rope_parameters": None}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        given = fields["partial_rotary_factor"] or (fields["rope_parameters"] or {}).get("partial_rotary_factor")
        if given or fields["rotary_dim"] is None:
            return {}
        return {"rotary_fraction": fields["rotary_dim"] / fields["head_dim"]}

    return ConfigField(names, from_hf, lambda config: {})


MINIMAX_M2 = Family(
    config_class=DecoderConfig,
    architecture="MiniMaxM2ForCausalLM",
    fields=(
        *llama_fields(kv_heads=8, head_dim=128, context=196608),
        rope(5e6, whole=1.0, context=196608),
        _rotated_dimensions(),
        full_attention(),
        renamed("num_local_experts", "experts", default=256),
        renamed("num_experts_per_tok", "experts_per_token", default=8),
        constant(qk_norm="width", router_scores="sigmoid", correction_bias=True),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS
    | expert_tensors("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"})
    | {_CORRECTION_BIAS: TensorSpec(f"{LAYER}.block_sparse_moe.e_score_correction_bias")},
    unused_tensors=(INV_FREQ,),
)


def _ernie_layers() -> ConfigField:
    """Each ``moe_layer_interval``-th layer has experts, from a first to a last one (-1: the last of the model)."""
    names = {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}

    def from_hf(fields: HfFields) -> dict[str, Any]:
        start, end, interval = (fields[name] for name in names)
        count = len(layer_range(fields))
        end = count - 1 if end == -1 else end
        return {"dense_layers": tuple(i for i in range(count) if (i + 1) % interval or not start <= i <= end)}

    def to_hf(config: StackConfig) -> dict[str, Any]:
        sparse = [i for i in range(config.layers) if config.has_experts(i)] or [config.layers]
        return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": 1}

    return ConfigField(names | {"num_hidden_layers": REQUIRED}, from_hf, to_hf)


ERNIE4_5_MOE = Family(
    config_class=DecoderConfig,
    architecture="Ernie4_5_MoeForCausalLM",
    fields=(
        *llama_fields(kv_heads=4, eps=1e-5, context=131072, tied=True),
        rope(5e5, context=131072),
        full_attention(),
        renamed("use_bias", "qkv_bias", "out_bias", "mlp_bias", "logits_bias", default=False),
        renamed("moe_num_experts", "experts", default=64),
        renamed("moe_k", "experts_per_token", default=6),
        optional_size("moe_intermediate_size", "expert_ffn", "d_expert", 1536),
        _shared_experts("moe_num_shared_experts", 2, 1536),
        _ernie_layers(),
        require_value("moe_norm_min", 1e-12, default=1e-12),
        constant(rope_interleaved=True, correction_bias=True),
    ),
    tensors=_TENSORS | {
        "logits_bias": TensorSpec("lm_head.bias"),
        _CORRECTION_BIAS: TensorSpec(f"{LAYER}.mlp.moe_statics.e_score_correction_bias", as_row=True),
    },
    unused_tensors=(INV_FREQ, r"model\.mtp_.*"),  # layers that predict further tokens
)

GRANITEMOE = Family(
    config_class=DecoderConfig,
    architecture="GraniteMoeForCausalLM",
    fields=(
        *llama_fields(),
        rope(),
        full_attention(),
        ATTENTION_BIAS,
        *MULTIPLIERS,
        renamed("num_local_experts", "experts", default=8),
        renamed("num_experts_per_tok", "experts_per_token", default=2),
    ),
    tensors=LLAMA_TENSORS | linear("decoder/layers/mlp/router", f"{LAYER}.block_sparse_moe.router.layer")
    | fused_expert_tensors(
        "block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight", transposed=True
    ),
    unused_tensors=(INV_FREQ,),
)
