"""The table of StarCoder 2."""

from __future__ import annotations

from jaxlm.hf.families.fields import ACTIVATIONS, Family, linear, renamed, write_only
from jaxlm.hf.families.layer_fields import sliding_window
from jaxlm.hf.families.llama import INV_FREQ, LAYER, LLAMA_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["STARCODER2"]

STARCODER2 = Family(
    config_class=DecoderConfig,
    architecture="Starcoder2ForCausalLM",
    fields=(
        *llama_fields(
            default_act="gelu_pytorch_tanh", activations=ACTIVATIONS, norm="layernorm", eps_field="norm_epsilon",
            eps=1e-5, kv_heads=2, context=4096, tied=True,
        ),
        rope(context=4096),
        sliding_window(None),
        renamed("use_bias", "qkv_bias", "out_bias", "mlp_bias", default=True),
        renamed("residual_dropout", "dropout", default=0.0, cast=float),
        write_only("embedding_dropout", "dropout", 0.0),
    ),
    tensors=LLAMA_TENSORS
    | linear("decoder/layers/mlp/up", f"{LAYER}.mlp.c_fc") | linear("decoder/layers/mlp/down", f"{LAYER}.mlp.c_proj"),
    unused_tensors=(INV_FREQ,),
)
