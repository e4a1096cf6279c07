"""The table of Hunyuan's dense models (Hunyuan-MT among them)."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import constant, norm
from jaxlm.hf.families.layer_fields import full_attention
from jaxlm.hf.families.llama import ATTENTION_BIAS, LAYER, LLAMA, LLAMA_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope_with_alpha

__all__ = ["HUNYUAN_V1_DENSE"]

HUNYUAN_V1_DENSE = dataclasses.replace(
    LLAMA,
    architecture="HunYuanDenseV1ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5),
        rope_with_alpha(),
        full_attention(),
        ATTENTION_BIAS,
        constant(qk_norm="head", qk_norm_after_rope=True),
    ),
    tensors=LLAMA_TENSORS
    | norm("decoder/layers/attn/q_norm", f"{LAYER}.self_attn.query_layernorm")
    | norm("decoder/layers/attn/k_norm", f"{LAYER}.self_attn.key_layernorm"),
)
