"""The tables of OLMo: 1, 2 and 3, and of OLMoE."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import Family, constant, norm, renamed, zero_if_null
from jaxlm.hf.families.layer_fields import full_attention, interleaved_sliding_window
from jaxlm.hf.families.llama import (
    ATTENTION_BIAS,
    EXPERT_TENSORS,
    INV_FREQ,
    LAYER,
    LLAMA,
    LLAMA_TENSORS,
    QK_NORM_TENSORS,
    llama_fields,
)
from jaxlm.hf.families.rope_fields import rope, rope_with_local_base
from jaxlm.nn.config import DecoderConfig

__all__ = ["OLMO", "OLMO2", "OLMO3", "OLMOE"]

OLMO = dataclasses.replace(
    LLAMA,
    architecture="OlmoForCausalLM",
    fields=(
        *(field for field in llama_fields() if "rms_norm_eps" not in field.hf_defaults),
        rope(),
        full_attention(),
        ATTENTION_BIAS,
        zero_if_null("clip_qkv", "clip_qkv", None),
        constant(norm="layernorm", norm_scale=False, norm_bias=False, norm_eps=1e-5),
    ),
)

OLMO2 = Family(
    config_class=DecoderConfig,
    architecture="Olmo2ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5),
        rope(),
        full_attention(),
        ATTENTION_BIAS,
        constant(qk_norm="width", norm_position="output"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS
    | norm("decoder/layers/attn_norm", f"{LAYER}.post_attention_layernorm")
    | norm("decoder/layers/mlp_norm", f"{LAYER}.post_feedforward_layernorm"),
    unused_tensors=(INV_FREQ,),
)

OLMOE = Family(
    config_class=DecoderConfig,
    architecture="OlmoeForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, context=4096),
        rope(context=4096),
        full_attention(),
        ATTENTION_BIAS,
        zero_if_null("clip_qkv", "clip_qkv", None),
        renamed("num_experts", "experts", default=64),
        renamed("num_experts_per_tok", "experts_per_token", default=8),
        renamed("norm_topk_prob", "expert_renormalize", default=False),
        constant(qk_norm="width"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS | EXPERT_TENSORS,
    unused_tensors=(INV_FREQ,),
)

OLMO3 = dataclasses.replace(
    OLMO2,
    architecture="Olmo3ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5),
        rope_with_local_base(5e5, 5e5, context=2048, local_base=None),
        interleaved_sliding_window(4096, 4),
        ATTENTION_BIAS,
        constant(qk_norm="width", norm_position="output"),
    ),
)
