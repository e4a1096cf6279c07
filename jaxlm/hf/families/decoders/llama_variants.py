"""The tables of families that differ from Llama in options alone: Granite, SmolLM 3, Arcee, Seed-OSS, ERNIE 4.5."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import ACTIVATIONS, constant, reciprocal, renamed
from jaxlm.hf.families.layer_fields import full_attention, nope_layers
from jaxlm.hf.families.llama import ATTENTION_BIAS, LLAMA, llama_fields
from jaxlm.hf.families.rope_fields import rope

__all__ = ["ARCEE", "ERNIE4_5", "GRANITE", "MULTIPLIERS", "SEED_OSS", "SMOLLM3"]

_MLP_BIAS = renamed("mlp_bias", "mlp_bias", default=False)

MULTIPLIERS = (
    renamed("embedding_multiplier", "embedding_multiplier", default=1.0, cast=float),
    renamed("residual_multiplier", "residual_multiplier", default=1.0, cast=float),
    renamed("attention_multiplier", "attention_scale", default=1.0, cast=float),
    reciprocal("logits_scaling", "logits_multiplier"),
)

GRANITE = dataclasses.replace(
    LLAMA,
    architecture="GraniteForCausalLM",
    fields=(*LLAMA.fields, *MULTIPLIERS),
)

SMOLLM3 = dataclasses.replace(
    LLAMA,
    architecture="SmolLM3ForCausalLM",
    fields=(
        *llama_fields(kv_heads=4, context=32768, tied=True),
        rope(2e6, context=32768),
        nope_layers(4),
        ATTENTION_BIAS,
        _MLP_BIAS,
    ),
)

ARCEE = dataclasses.replace(
    LLAMA,
    architecture="ArceeForCausalLM",
    fields=(
        *llama_fields(default_act="relu2", activations=ACTIVATIONS, eps=1e-5, context=4096),
        rope(context=4096),
        full_attention(),
        ATTENTION_BIAS,
        _MLP_BIAS,
    ),
)

SEED_OSS = dataclasses.replace(
    LLAMA,
    architecture="SeedOssForCausalLM",
    fields=(
        *llama_fields(kv_heads=8, head_dim=128, context=524288, attention_dropout=0.1),
        rope(context=524288),
        full_attention(),
        renamed("residual_dropout", "dropout", default=0.1, cast=float),
        renamed("attention_bias", "qkv_bias", default=True),
        renamed("attention_out_bias", "out_bias", default=False),
        _MLP_BIAS,
    ),
)

ERNIE4_5 = dataclasses.replace(
    LLAMA,
    architecture="Ernie4_5ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, kv_heads=2, head_dim=128, context=131072, tied=True),
        rope(5e5, context=131072),
        full_attention(),
        renamed("use_bias", "qkv_bias", "out_bias", "mlp_bias", default=False),
        constant(rope_interleaved=True),
    ),
)
