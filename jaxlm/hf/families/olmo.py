"""The tables of OLMo 2 and OLMoE."""

from __future__ import annotations

from jaxlm.hf.families.fields import Family, constant, norm, renamed, require_value
from jaxlm.hf.families.layer_fields import full_attention
from jaxlm.hf.families.llama import (
    ATTENTION_BIAS,
    EXPERT_TENSORS,
    INV_FREQ,
    LAYER,
    LLAMA_TENSORS,
    QK_NORM_TENSORS,
    llama_fields,
)
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["OLMO2", "OLMOE"]

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
        require_value("clip_qkv"),
        renamed("num_experts", "experts", default=64),
        renamed("num_experts_per_tok", "experts_per_token", default=8),
        renamed("norm_topk_prob", "expert_renormalize", default=False),
        constant(qk_norm="width"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS | EXPERT_TENSORS,
    unused_tensors=(INV_FREQ,),
)
