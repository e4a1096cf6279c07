"""The registry of model families: the table of each ``model_type`` of config.json.

To add a family, write its table in the file of its lineage and give it a line in ``FAMILIES``; see jaxlm/hf/README.md.
Names and defaults in the tables are those of transformers 5. ``python -m jaxlm.hf.families.registry`` prints the table
of families in that README.
"""

from __future__ import annotations

from jaxlm.hf.families.bart import BART, M2M_100, MARIAN, MBART
from jaxlm.hf.families.decoders.apertus import APERTUS
from jaxlm.hf.families.decoders.cohere import COHERE, COHERE2
from jaxlm.hf.families.decoders.exaone import EXAONE4
from jaxlm.hf.families.decoders.falcon import FALCON
from jaxlm.hf.families.decoders.glm import GLM, GLM4
from jaxlm.hf.families.decoders.hunyuan import HUNYUAN_V1_DENSE
from jaxlm.hf.families.decoders.llama_variants import ARCEE, ERNIE4_5, GRANITE, SEED_OSS, SMOLLM3
from jaxlm.hf.families.decoders.mistral import MINISTRAL, MINISTRAL3
from jaxlm.hf.families.decoders.nemotron import NEMOTRON
from jaxlm.hf.families.decoders.stablelm import STABLELM
from jaxlm.hf.families.decoders.starcoder import STARCODER2
from jaxlm.hf.families.fields import Family
from jaxlm.hf.families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxlm.hf.families.gpt import GPT2, GPT_NEOX, GPT_OSS, GPTJ, OPT
from jaxlm.hf.families.llama import LLAMA, MISTRAL, MIXTRAL
from jaxlm.hf.families.mixtures import DOTS1, ERNIE4_5_MOE, GLM4_MOE, GRANITEMOE, MINIMAX_M2
from jaxlm.hf.families.olmo import OLMO, OLMO2, OLMO3, OLMOE
from jaxlm.hf.families.phi import PHI, PHI3
from jaxlm.hf.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from jaxlm.hf.families.t5 import T5

__all__ = ["FAMILIES", "markdown"]

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "gptj": GPTJ,
    "gpt_neox": GPT_NEOX,
    "opt": OPT,
    "falcon": FALCON,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral": MINISTRAL,
    "ministral3": MINISTRAL3,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi": PHI,
    "phi3": PHI3,
    "olmo": OLMO,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "granite": GRANITE,
    "granitemoe": GRANITEMOE,
    "smollm3": SMOLLM3,
    "arcee": ARCEE,
    "seed_oss": SEED_OSS,
    "ernie4_5": ERNIE4_5,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "glm": GLM,
    "glm4": GLM4,
    "stablelm": STABLELM,
    "starcoder2": STARCODER2,
    "nemotron": NEMOTRON,
    "hunyuan_v1_dense": HUNYUAN_V1_DENSE,
    "exaone4": EXAONE4,
    "apertus": APERTUS,
    "olmoe": OLMOE,
    "glm4_moe": GLM4_MOE,
    "dots1": DOTS1,
    "minimax_m2": MINIMAX_M2,
    "gpt_oss": GPT_OSS,
    "marian": MARIAN,
    "m2m_100": M2M_100,
    "t5": T5,
    "bart": BART,
    "mbart": MBART,
}


def markdown() -> str:
    """The table of README.md: for each family, the fields that all its models have and that are not our defaults."""
    lines = ["| `model_type` | class in transformers | what its models have, in our terms |", "|---|---|---|"]
    for model_type, family in FAMILIES.items():
        default, fixed = family.config_class(), {}
        for field in family.fields:
            if not field.hf_defaults:
                fixed |= field.from_hf({})
        shown = [f"`{name}={value}`" for name, value in sorted(fixed.items()) if value != getattr(default, name)]
        lines.append(f"| {model_type} | `{family.architecture}` | {', '.join(shown) or 'the defaults'} |")
    return "\n".join(lines)
