"""The tables of Gemma: 1, 2, and the language model of Gemma 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxlm.hf.families.fields import (
    GATED_ACTIVATIONS,
    ConfigField,
    Family,
    TensorSpec,
    constant,
    norm,
    require_value,
    zero_if_null,
)
from jaxlm.hf.families.layer_fields import full_attention, interleaved_sliding_window
from jaxlm.hf.families.llama import (
    ATTENTION_BIAS,
    INV_FREQ,
    LAYER,
    LLAMA_TENSORS,
    QK_NORM_TENSORS,
    llama_fields,
)
from jaxlm.hf.families.rope_fields import rope, rope_with_local_base
from jaxlm.nn.config import DecoderConfig

__all__ = ["GEMMA", "GEMMA2", "GEMMA3"]


def _one_plus_norms(tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The tensors, with norms stored as Gemma stores them: a norm multiplies by 1 plus the stored scale."""
    return {
        path: dataclasses.replace(tensor, offset=1.0) if path.endswith("norm/scale") else tensor
        for path, tensor in tensors.items()
    }


_TENSORS = _one_plus_norms(
    LLAMA_TENSORS
    | norm("decoder/layers/attn_out_norm", f"{LAYER}.post_attention_layernorm")
    | norm("decoder/layers/mlp_norm", f"{LAYER}.pre_feedforward_layernorm")
    | norm("decoder/layers/mlp_out_norm", f"{LAYER}.post_feedforward_layernorm")
)
_QUERY_SCALE = ConfigField(
    {"query_pre_attn_scalar": 256},
    lambda fields: {"attention_scale": float(fields["query_pre_attn_scalar"]) ** -0.5},
    lambda config: {"query_pre_attn_scalar": _rounded((config.attention_scale or config.d_head**-0.5) ** -2)},
)


def _rounded(value: float) -> int | float:
    """The whole number within the rounding error of a square root taken and undone, else the value itself."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


def _gemma_fields(logit_softcap: float | None, context: int) -> tuple[ConfigField, ...]:
    return (
        *llama_fields(
            act="hidden_activation", default_act="gelu_pytorch_tanh", kv_heads=4, head_dim=256, context=context,
            tied=True,
        ),
        ATTENTION_BIAS,
        _QUERY_SCALE,
        zero_if_null("final_logit_softcapping", "logit_softcap", logit_softcap),
        require_value("use_bidirectional_attention", False),
        constant(norm_position="sandwich", embed_scale=True),
    )


GEMMA = Family(
    config_class=DecoderConfig,
    architecture="GemmaForCausalLM",
    fields=(
        *llama_fields(
            default_act="gelu_pytorch_tanh", kv_heads=16, head_dim=256, context=8192, tied=True,
            activations={"gelu_pytorch_tanh": "geglu_tanh", **GATED_ACTIVATIONS, "gelu": "geglu_tanh"},
        ),
        ATTENTION_BIAS,
        rope(context=8192),
        full_attention(),
        require_value("use_bidirectional_attention", False),
        constant(norm_position="pre", embed_scale=True),
    ),
    tensors=_one_plus_norms(LLAMA_TENSORS),
    unused_tensors=(INV_FREQ,),
)

GEMMA2 = Family(
    config_class=DecoderConfig,
    architecture="Gemma2ForCausalLM",
    fields=(
        *_gemma_fields(30.0, 8192),
        zero_if_null("attn_logit_softcapping", "attention_softcap", 50.0),
        rope(context=8192),
        interleaved_sliding_window(4096, 2),
    ),
    tensors=_TENSORS,
    unused_tensors=(INV_FREQ,),
)

GEMMA3 = Family(
    config_class=DecoderConfig,
    architecture="Gemma3ForCausalLM",
    fields=(
        *_gemma_fields(None, 131072),
        require_value("attn_logit_softcapping"),  # the class has the field, but transformers' model does not apply it
        rope_with_local_base(1e6, 1e4, context=131072),
        interleaved_sliding_window(4096, 6, "sliding_window_pattern"),
        constant(qk_norm="head"),
    ),
    tensors=_TENSORS | _one_plus_norms(QK_NORM_TENSORS),
    unused_tensors=(INV_FREQ,),
)
