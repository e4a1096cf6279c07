"""The tables of Cohere's Command R (``cohere``) and Command R7B and Command A (``cohere2``)."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import ConfigField, Family, choice, constant, renamed, unread
from jaxlm.hf.families.layer_fields import full_attention, sliding_window_or_nope
from jaxlm.hf.families.llama import ATTENTION_BIAS, INV_FREQ, LLAMA_TENSORS, QK_NORM_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["COHERE", "COHERE2"]


def _cohere_fields(head_dim: bool) -> tuple[ConfigField, ...]:
    return (
        *llama_fields(
            norm="layernorm", eps_field="layer_norm_eps", eps=1e-5, context=8192, tied=True,
            head_dim=None if head_dim else False,
        ),
        rope(context=8192),
        ATTENTION_BIAS,
        renamed("logit_scale", "logits_multiplier", default=0.0625, cast=float),
        constant(norm_bias=False, parallel=True, shared_norm=True, rope_interleaved=True),
    )


COHERE = Family(
    config_class=DecoderConfig,
    architecture="CohereForCausalLM",
    fields=(
        *_cohere_fields(head_dim=True),
        full_attention(),
        choice("use_qk_norm", "qk_norm", {False: "none", True: "each_head"}, False),
    ),
    tensors=LLAMA_TENSORS | QK_NORM_TENSORS,
    unused_tensors=(INV_FREQ,),
)

COHERE2 = dataclasses.replace(
    COHERE,
    architecture="Cohere2ForCausalLM",
    fields=(*_cohere_fields(head_dim=False), unread("head_dim"), sliding_window_or_nope(4)),
    tensors=LLAMA_TENSORS,
)
