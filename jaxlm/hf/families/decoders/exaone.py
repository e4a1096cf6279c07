"""The table of EXAONE 4."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import constant
from jaxlm.hf.families.layer_fields import sliding_window_or_nope
from jaxlm.hf.families.llama import llama_fields
from jaxlm.hf.families.olmo import OLMO2
from jaxlm.hf.families.rope_fields import rope

__all__ = ["EXAONE4"]

EXAONE4 = dataclasses.replace(
    OLMO2,
    architecture="Exaone4ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, kv_heads=32),
        rope(),
        sliding_window_or_nope(4, rope_without_window=True),
        constant(qk_norm="head", norm_position="output"),
    ),
)
