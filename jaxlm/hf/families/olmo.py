"""The table of OLMo 2."""

from __future__ import annotations

from jaxlm.hf.families.fields import Family, constant, norm
from jaxlm.hf.families.layer_fields import full_attention
from jaxlm.hf.families.llama import (
    ATTENTION_BIAS,
    INV_FREQ,
    LAYER,
    LLAMA_TENSORS,
    QK_NORM_TENSORS,
    llama_fields,
)
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["OLMO2"]

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
