"""The tables of Qwen: 2, 3 and their mixtures of experts."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import ConfigField, Family, constant, linear, optional_size, renamed
from jaxlm.hf.families.layer_fields import (
    sliding_window_from_layer,
    sparse_moe_layers,
    switchable_sliding_window,
)
from jaxlm.hf.families.llama import (
    ATTENTION_BIAS,
    EXPERT_TENSORS,
    INV_FREQ,
    LAYER,
    LLAMA,
    LLAMA_TENSORS,
    QK_NORM_TENSORS,
    llama_fields,
    projections,
)
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["QWEN2", "QWEN2_MOE", "QWEN3", "QWEN3_MOE"]

QWEN2 = dataclasses.replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    fields=(
        *llama_fields(kv_heads=32, context=32768),
        rope(context=32768),
        sliding_window_from_layer(),
        constant(qkv_bias=True),
    ),
)

QWEN3 = dataclasses.replace(
    LLAMA,
    architecture="Qwen3ForCausalLM",
    fields=(
        *llama_fields(kv_heads=32, head_dim=128, context=32768),
        rope(context=32768),
        sliding_window_from_layer(),
        ATTENTION_BIAS,
        constant(qk_norm="head"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS,
)

QWEN2_MOE = dataclasses.replace(
    QWEN2,
    architecture="Qwen2MoeForCausalLM",
    fields=(
        *llama_fields(kv_heads=16, context=32768),
        rope(context=32768),
        sliding_window_from_layer(has_window=lambda layer, first: layer % 2 == 0 and layer < first),
        renamed("qkv_bias", "qkv_bias", default=True),
        renamed("num_experts", "experts", default=60),
        renamed("num_experts_per_tok", "experts_per_token", default=4),
        optional_size("moe_intermediate_size", "expert_ffn", "d_expert", 1408),
        renamed("shared_expert_intermediate_size", "shared_expert_ffn", default=5632),
        renamed("norm_topk_prob", "expert_renormalize", default=False),
        sparse_moe_layers(),
        constant(shared_expert_gate=True),
    ),
    tensors=LLAMA_TENSORS | EXPERT_TENSORS | projections("mlp/shared", "mlp.shared_expert", "gate up down")
    | linear("decoder/layers/mlp/shared_gate", f"{LAYER}.mlp.shared_expert_gate"),
)

QWEN3_MOE = Family(
    config_class=DecoderConfig,
    architecture="Qwen3MoeForCausalLM",
    fields=(
        *llama_fields(kv_heads=4, context=32768),
        rope(context=32768),
        switchable_sliding_window(),
        ATTENTION_BIAS,
        ConfigField(
            {"num_local_experts": None, "num_experts": 128},
            lambda fields: {"experts": fields["num_local_experts"] or fields["num_experts"]},
            lambda config: {"num_experts": config.experts},
        ),
        renamed("num_experts_per_tok", "experts_per_token", default=8),
        optional_size("moe_intermediate_size", "expert_ffn", "d_expert", 768),
        renamed("norm_topk_prob", "expert_renormalize", default=False),
        sparse_moe_layers(),
        constant(qk_norm="head"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS | EXPERT_TENSORS,
    unused_tensors=(INV_FREQ,),
)
