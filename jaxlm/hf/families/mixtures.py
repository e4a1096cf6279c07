"""The tables of mixtures of experts whose router follows DeepSeek-V3: GLM 4.5, dots.llm1 and MiniMax M2."""

from __future__ import annotations

from typing import Any

from jaxlm.hf.families.fields import (
    REQUIRED,
    ConfigField,
    Family,
    HfFields,
    TensorSpec,
    choice,
    constant,
    optional_size,
    renamed,
)
from jaxlm.hf.families.layer_fields import first_dense_layers, full_attention, sliding_window_from_layer
from jaxlm.hf.families.llama import (
    ATTENTION_BIAS,
    EXPERT_TENSORS,
    INV_FREQ,
    LAYER,
    LLAMA_TENSORS,
    QK_NORM_TENSORS,
    expert_tensors,
    llama_fields,
    projections,
)
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig, StackConfig

__all__ = ["DOTS1", "GLM4_MOE", "MINIMAX_M2"]


def _deepseek_fields(
    *, experts: Any, chosen: Any, ffn: int, shared: int | None, dense: int, renormalize: bool, scale: float = 1.0
) -> tuple[ConfigField, ...]:
    """The fields of a mixture as DeepSeek-V3 has them (arXiv:2412.19437, section 2.1.2); the arguments are defaults."""

    def shared_from_hf(fields: HfFields) -> dict[str, Any]:
        return {"shared_expert_ffn": (fields["n_shared_experts"] or 0) * fields["moe_intermediate_size"]}

    def shared_to_hf(config: StackConfig) -> dict[str, Any]:
        return {"n_shared_experts": config.shared_expert_ffn // config.d_expert}

    return (
        renamed("n_routed_experts", "experts", default=experts),
        renamed("num_experts_per_tok", "experts_per_token", default=chosen),
        optional_size("moe_intermediate_size", "expert_ffn", "d_expert", ffn),
        ConfigField({"n_shared_experts": shared, "moe_intermediate_size": ffn}, shared_from_hf, shared_to_hf),
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
