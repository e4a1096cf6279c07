"""The table of Phi 3 (and Phi 4, which has the same model_type)."""

from __future__ import annotations

from jaxlm.hf.families.fields import Family, fused_linear, fused_qkv, renamed, write_only
from jaxlm.hf.families.layer_fields import sliding_window
from jaxlm.hf.families.llama import INV_FREQ, LAYER, LLAMA_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["PHI3"]

PHI3 = Family(
    config_class=DecoderConfig,
    architecture="Phi3ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, context=4096),
        rope(whole=1.0, context=4096, original=4096),
        sliding_window(None),
        renamed("resid_pdrop", "dropout", default=0.0, cast=float),
        write_only("embd_pdrop", "dropout", 0.0),
    ),
    tensors=LLAMA_TENSORS
    | fused_qkv(f"{LAYER}.self_attn.qkv_proj")
    | fused_linear(
        ("decoder/layers/mlp/gate", "decoder/layers/mlp/up"), f"{LAYER}.mlp.gate_up_proj",
        lambda config: (config.d_ffn, config.d_ffn),
    ),
    unused_tensors=(INV_FREQ,),
)
