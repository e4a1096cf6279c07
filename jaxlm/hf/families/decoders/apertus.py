"""The table of Apertus."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import ACTIVATIONS, TensorSpec, constant, norm
from jaxlm.hf.families.layer_fields import full_attention
from jaxlm.hf.families.llama import ATTENTION_BIAS, LAYER, LLAMA, LLAMA_TENSORS, QK_NORM_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope

__all__ = ["APERTUS"]

_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0, "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}

APERTUS = dataclasses.replace(
    LLAMA,
    architecture="ApertusForCausalLM",
    fields=(
        *llama_fields(default_act="xielu", activations={"xielu": "xielu"} | ACTIVATIONS, eps=1e-5, context=65536),
        rope(12e6, context=65536, scaling=_LLAMA3),
        full_attention(),
        ATTENTION_BIAS,
        constant(qk_norm="head"),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS
    | norm("decoder/layers/attn_norm", f"{LAYER}.attention_layernorm")
    | norm("decoder/layers/mlp_norm", f"{LAYER}.feedforward_layernorm")
    | {
        "decoder/layers/mlp/act/positive": TensorSpec(f"{LAYER}.mlp.act_fn.alpha_p"),
        "decoder/layers/mlp/act/negative": TensorSpec(f"{LAYER}.mlp.act_fn.alpha_n"),
    },
    buffers={f"{LAYER}.mlp.act_fn.beta": 0.5, f"{LAYER}.mlp.act_fn.eps": -1e-6},  # of xIELU
)
