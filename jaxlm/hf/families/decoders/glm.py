"""The tables of GLM-4: ``glm`` (9B, 2024) and ``glm4`` (9B and 32B, 2025)."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import Family, constant, fused_linear, norm, renamed
from jaxlm.hf.families.layer_fields import full_attention
from jaxlm.hf.families.llama import INV_FREQ, LAYER, LLAMA_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["GLM", "GLM4"]

GLM = Family(
    config_class=DecoderConfig,
    architecture="GlmForCausalLM",
    fields=(
        *llama_fields(eps=1.5625e-07, kv_heads=2, head_dim=128, context=131072),
        rope(whole=0.5, context=131072),
        full_attention(),
        renamed("attention_bias", "qkv_bias", default=True),
        constant(rope_interleaved=True),
    ),
    tensors=LLAMA_TENSORS | fused_linear(
        ("decoder/layers/mlp/gate", "decoder/layers/mlp/up"), f"{LAYER}.mlp.gate_up_proj",
        lambda config: (config.d_ffn, config.d_ffn),
    ),
    unused_tensors=(INV_FREQ,),
)

GLM4 = dataclasses.replace(
    GLM,
    architecture="Glm4ForCausalLM",
    fields=(*GLM.fields, constant(norm_position="sandwich")),
    tensors=GLM.tensors
    | norm("decoder/layers/attn_out_norm", f"{LAYER}.post_self_attn_layernorm")
    | norm("decoder/layers/mlp_out_norm", f"{LAYER}.post_mlp_layernorm"),
)
