"""The tables of Phi: 1, 1.5 and 2 (``phi``), 3 and 4 (``phi3``)."""

from __future__ import annotations

from jaxlm.hf.families.fields import (
    ACTIVATIONS,
    Family,
    TensorSpec,
    choice,
    constant,
    fused_linear,
    fused_qkv,
    linear,
    norm,
    renamed,
    write_only,
)
from jaxlm.hf.families.layer_fields import full_attention, sliding_window
from jaxlm.hf.families.llama import INV_FREQ, LAYER, LLAMA_TENSORS, llama_fields
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = ["PHI", "PHI3"]

_DROPOUT = (renamed("resid_pdrop", "dropout", default=0.0, cast=float), write_only("embd_pdrop", "dropout", 0.0))

PHI = Family(
    config_class=DecoderConfig,
    architecture="PhiForCausalLM",
    fields=(
        *llama_fields(
            default_act="gelu_new", activations=ACTIVATIONS, norm="layernorm", eps_field="layer_norm_eps", eps=1e-5
        ),
        rope(whole=0.5),
        full_attention(),
        *_DROPOUT,
        choice("qk_layernorm", "qk_norm", {False: "none", True: "head"}, False),
        constant(parallel=True, shared_norm=True, qkv_bias=True, out_bias=True, mlp_bias=True, logits_bias=True),
    ),
    tensors=LLAMA_TENSORS
    | linear("decoder/layers/attn/o", f"{LAYER}.self_attn.dense")
    | norm("decoder/layers/attn/q_norm", f"{LAYER}.self_attn.q_layernorm")
    | norm("decoder/layers/attn/k_norm", f"{LAYER}.self_attn.k_layernorm")
    | linear("decoder/layers/mlp/up", f"{LAYER}.mlp.fc1") | linear("decoder/layers/mlp/down", f"{LAYER}.mlp.fc2")
    | norm("decoder/final_norm", "model.final_layernorm")
    | {"logits_bias": TensorSpec("lm_head.bias")},
    unused_tensors=(INV_FREQ,),
)

PHI3 = Family(
    config_class=DecoderConfig,
    architecture="Phi3ForCausalLM",
    fields=(
        *llama_fields(eps=1e-5, context=4096),
        rope(whole=1.0, context=4096, original=4096),
        sliding_window(None),
        *_DROPOUT,
    ),
    tensors=LLAMA_TENSORS
    | fused_qkv(f"{LAYER}.self_attn.qkv_proj")
    | fused_linear(
        ("decoder/layers/mlp/gate", "decoder/layers/mlp/up"), f"{LAYER}.mlp.gate_up_proj",
        lambda config: (config.d_ffn, config.d_ffn),
    ),
    unused_tensors=(INV_FREQ,),
)
