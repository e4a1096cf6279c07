"""The table of Nemotron (Minitron)."""

from __future__ import annotations

import dataclasses

from jaxlm.hf.families.fields import ACTIVATIONS, Family, renamed
from jaxlm.hf.families.layer_fields import full_attention
from jaxlm.hf.families.llama import ATTENTION_BIAS, INV_FREQ, LLAMA_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["NEMOTRON"]

NEMOTRON = Family(
    config_class=DecoderConfig,
    architecture="NemotronForCausalLM",
    fields=(
        *llama_fields(
            default_act="relu2", activations=ACTIVATIONS, norm="layernorm", eps_field="norm_eps", eps=1e-5, context=4096
        ),
        rope(whole=0.5, context=4096),
        full_attention(),
        ATTENTION_BIAS,
        renamed("mlp_bias", "mlp_bias", default=False),
    ),
    tensors={  # a norm multiplies by 1 plus the stored scale
        path: dataclasses.replace(tensor, offset=1.0) if path.endswith("norm/scale") else tensor
        for path, tensor in LLAMA_TENSORS.items()
    },
    unused_tensors=(INV_FREQ,),
)
