"""The table of StableLM."""

from __future__ import annotations

from typing import Any

from jaxlm.hf.families.fields import ConfigField, Family, TensorSpec, choice, renamed
from jaxlm.hf.families.layer_fields import full_attention
from jaxlm.hf.families.llama import INV_FREQ, LAYER, LLAMA_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["STABLELM"]


def _parallel(fields: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(("parallel", "shared_norm"), bool(fields["use_parallel_residual"]))


STABLELM = Family(
    config_class=DecoderConfig,
    architecture="StableLmForCausalLM",
    fields=(
        *llama_fields(
            norm="layernorm", eps_field="layer_norm_eps", eps=1e-5, kv_heads=32, head_dim=False, context=4096
        ),
        rope(whole=0.25, context=4096),
        full_attention(),
        renamed("use_qkv_bias", "qkv_bias", default=False),
        choice("qk_layernorm", "qk_norm", {False: "none", True: "each_head"}, False),
        ConfigField(
            {"use_parallel_residual": False}, _parallel, lambda config: {"use_parallel_residual": config.parallel}
        ),
        renamed("hidden_dropout", "dropout", default=0.0, cast=float),
    ),
    tensors=LLAMA_TENSORS | {
        f"decoder/layers/attn/{name}_norm/scale": TensorSpec(f"{LAYER}.self_attn.{name}_layernorm.norms.{{}}.weight")
        for name in "qk"
    },
    unused_tensors=(INV_FREQ,),
)
