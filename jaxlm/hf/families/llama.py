"""The tables of Llama, Mistral and Mixtral, and what the families that descend from Llama share with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxlm.hf.families.fields import (
    GATED_ACTIVATIONS,
    REQUIRED,
    ConfigField,
    Family,
    FusedSlice,
    TensorSpec,
    choice,
    constant,
    linear,
    norm,
    optional_size,
    renamed,
)
from jaxlm.hf.families.layer_fields import full_attention, sliding_window
from jaxlm.hf.families.rope_fields import rope
from jaxlm.nn.config import DecoderConfig

__all__ = [
    "ATTENTION_BIAS", "EXPERT_TENSORS", "INV_FREQ", "LAYER", "LLAMA", "LLAMA_TENSORS", "MISTRAL", "MIXTRAL",
    "QK_NORM_TENSORS", "expert_tensors", "fused_expert_tensors", "llama_fields", "projections",
]

LAYER = "model.layers.{}"
INV_FREQ = r".*rotary_emb\.inv_freq"  # rotary frequencies, which old releases of transformers saved with the weights
ATTENTION_BIAS = renamed("attention_bias", "qkv_bias", "out_bias", default=False)


def projections(path: str, hf_module: str, names: str) -> dict[str, TensorSpec]:
    """Linear maps ``path/NAME``, stored as ``hf_module.NAME_proj``, for each of ``names``."""
    return {
        key: tensor
        for name in names.split()
        for key, tensor in linear(f"decoder/layers/{path}/{name}", f"{LAYER}.{hf_module}.{name}_proj").items()
    }


LLAMA_TENSORS = {
    "embed/table": TensorSpec("model.embed_tokens.weight"),
    **projections("attn", "self_attn", "q k v o"),
    **projections("mlp", "mlp", "gate up down"),
    **norm("decoder/layers/attn_norm", f"{LAYER}.input_layernorm"),
    **norm("decoder/layers/mlp_norm", f"{LAYER}.post_attention_layernorm"),
    **norm("decoder/final_norm", "model.norm"),
    **linear("head", "lm_head"),
}
QK_NORM_TENSORS = {
    **norm("decoder/layers/attn/q_norm", f"{LAYER}.self_attn.q_norm"),
    **norm("decoder/layers/attn/k_norm", f"{LAYER}.self_attn.k_norm"),
}


def expert_tensors(router: str, experts: str, hf_names: Mapping[str, str]) -> dict[str, TensorSpec]:
    """The router and the experts of a mixture. ``hf_names``: our name of an expert's linear map -> the stored one."""
    tensors = linear("decoder/layers/mlp/router", f"{LAYER}.{router}")
    for name, hf_name in hf_names.items():
        tensors |= linear(f"decoder/layers/mlp/experts/{name}", f"{LAYER}.{experts}.{{}}.{hf_name}")
    return tensors


def fused_expert_tensors(
    gate_up: str, down: str, *, transposed: bool, bias: str = "", turns: Callable[[Any], int] | None = None
) -> dict[str, TensorSpec]:
    """The experts of a layer in two tensors: ``gate_up`` holds gates and ups side by side, in as many ``turns``
    (``FusedSlice``). ``bias`` ends the names of biases."""
    tensors: dict[str, TensorSpec] = {}
    for name, index in (("gate", 0), ("up", 1), ("down", None)):
        stored = f"{LAYER}.{down if index is None else gate_up}"
        fused = None if index is None else FusedSlice(index, lambda config: (config.d_expert, config.d_expert), turns)
        path = f"decoder/layers/mlp/experts/{name}"
        tensors[f"{path}/kernel"] = TensorSpec(stored, transposed=transposed, fused=fused)
        if bias:
            tensors[f"{path}/bias"] = TensorSpec(stored + bias, fused=fused)
    return tensors


EXPERT_TENSORS = expert_tensors("mlp.gate", "mlp.experts", {name: f"{name}_proj" for name in ("gate", "up", "down")})


def llama_fields(
    *, act: str = "hidden_act", default_act: str = "silu", eps: float = 1e-6, kv_heads: int | None = None,
    head_dim: int | None | Literal[False] = None, context: int = 2048, tied: bool = False,
    activations: Mapping[str, str] = GATED_ACTIVATIONS, norm: Literal["rmsnorm", "layernorm"] = "rmsnorm",
    eps_field: str = "rms_norm_eps", attention_dropout: float = 0.0,
) -> tuple[ConfigField, ...]:
    """The fields that all descendants of Llama have under the same names.

    Args:
        act: the name of the field with the activation.
        default_act, eps, kv_heads, head_dim, context, tied, attention_dropout: defaults of the fields. ``head_dim`` is
            False where heads always share the width.
        activations: what the names of activations mean: gated ones, or those of MLPs without a gate.
        norm, eps_field: the kind of norms, and the name of the field with their epsilon.
    """
    return (
        renamed("vocab_size", "vocab_size"),
        renamed("hidden_size", "width"),
        optional_size("intermediate_size", "ffn", "d_ffn", REQUIRED),
        renamed("num_hidden_layers", "layers"),
        renamed("num_attention_heads", "heads"),
        optional_size("num_key_value_heads", "kv_heads", "n_kv_heads", kv_heads),
        *([] if head_dim is False else [optional_size("head_dim", "head_dim", "d_head", head_dim)]),
        choice(act, "activation", activations, default_act),
        renamed("max_position_embeddings", "max_positions", default=context),
        renamed(eps_field, "norm_eps", default=eps, cast=float),
        renamed("attention_dropout", "attention_dropout", default=attention_dropout, cast=float),
        renamed("tie_word_embeddings", "tie_embeddings", default=tied),
        constant(norm=norm, positions="rotary"),
    )


LLAMA = Family(
    config_class=DecoderConfig,
    architecture="LlamaForCausalLM",
    fields=(
        *llama_fields(),
        rope(),
        full_attention(),
        ATTENTION_BIAS,
        renamed("mlp_bias", "mlp_bias", default=False),
        constant(norm_position="pre"),
    ),
    tensors=LLAMA_TENSORS,
    unused_tensors=(INV_FREQ,),
)

MISTRAL = dataclasses.replace(
    LLAMA,
    architecture="MistralForCausalLM",
    fields=(*llama_fields(kv_heads=8, context=131072), rope(context=131072), sliding_window(4096)),
)

MIXTRAL = Family(
    config_class=DecoderConfig,
    architecture="MixtralForCausalLM",
    fields=(
        *llama_fields(kv_heads=8, context=131072, eps=1e-5),
        rope(1e6, context=131072),
        sliding_window(None),
        renamed("num_local_experts", "experts", default=8),
        renamed("num_experts_per_tok", "experts_per_token", default=2),
        constant(expert_renormalize=True),
    ),
    tensors=LLAMA_TENSORS | expert_tensors(
        "block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}
    ),
    unused_tensors=(INV_FREQ,),
)
