"""The tables of Ministral: ``ministral`` (8B, 2024) and ``ministral3`` (3B to 14B, 2025)."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.layer_fields import sliding_window, sliding_windows
from jaxlm.hf.families.llama import LLAMA, llama_fields
from jaxlm.hf.families.rope_fields import rope, rope_with_temperature

__all__ = ["MINISTRAL", "MINISTRAL3"]

MINISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MinistralForCausalLM",
    fields=(*llama_fields(kv_heads=8, context=131072), rope(context=131072), sliding_windows(4096)),
)

_YARN = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}
MINISTRAL3 = dataclasses.replace(
    LLAMA,
    architecture="Ministral3ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, kv_heads=8, head_dim=128, context=262144),
        rope_with_temperature(1e4, context=262144, parameters=_YARN),
        sliding_window(None),
    ),
)
