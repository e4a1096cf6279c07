"""Hugging Face model families as tables: which field of config.json is which of ours, and which tensor is which.

A family is added by adding a ``Family``; ``jaxlm.checkpoint.hf`` reads them all alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError

__all__ = ["FAMILIES", "NEUTRAL", "REQUIRED", "Family", "Field", "Tensor"]

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A field of config.json: our fields that take its value, after ``convert``.

    ``default`` is what transformers takes where the field is absent; a field without one must be there.
    """

    ours: tuple[str, ...]
    default: Any = REQUIRED
    convert: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file, ``{}`` in its name being the layer. ``transposed``: stored ``[out, in]``, as torch does."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """How the decoders of one ``model_type`` are told.

    ``tensors`` maps our paths to theirs; in our paths, ``layers/`` stands for ``layers/SEGMENT/``, whose tensors are
    stacked over the layers. Paths that a configuration does not have are not asked for.
    """

    fields: Mapping[str, Field]
    tensors: Mapping[str, Tensor]
    fixed: Mapping[str, Any]  # our fields that no field of theirs decides
    unused: tuple[str, ...] = ()  # tensors that some files hold and the model does not need: regular expressions


# Fields that have no part in what a model computes, in any family.
NEUTRAL = frozenset(
    "_name_or_path architectures auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
    "initializer_range is_decoder is_encoder_decoder label2id model_type output_attentions output_hidden_states "
    "pad_token_id pretraining_tp problem_type return_dict torch_dtype transformers_version use_cache".split()
)


def _choice(field: str, **known: Any) -> Callable[[Any], Any]:
    def convert(value: Any) -> Any:
        if value not in known:
            raise UserError(f"{field} = {value!r} is not supported; only {', '.join(known)}")
        return known[value]

    return convert


def _rope(parameters: Any) -> float:
    """The base of plain rotary embeddings, from transformers 5's ``rope_parameters``."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default" or set(parameters) - {"rope_theta", "rope_type", "type"}:
        raise UserError(f"rotary embeddings of the kind {parameters} are not supported; only the default ones")
    return float(parameters.get("rope_theta", 10000.0))


def _no_scaling(value: Any) -> None:
    if value is not None:
        raise UserError(f"rope_scaling = {value} is not supported; only models without it")


def _linear(ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{ours}/kernel": Tensor(f"{theirs}.weight", transposed=True), f"{ours}/bias": Tensor(f"{theirs}.bias")}


LLAMA = Family(
    fields={
        "vocab_size": Field(("vocab_size",)),
        "hidden_size": Field(("width",)),
        "intermediate_size": Field(("ffn",)),
        "num_hidden_layers": Field(("layers",)),
        "num_attention_heads": Field(("heads",)),
        "num_key_value_heads": Field(("kv_heads",), 0),
        "head_dim": Field(("head_dim",), 0),
        "hidden_act": Field(("activation",), "silu", _choice("hidden_act", silu="swiglu")),
        "max_position_embeddings": Field(("max_positions",), 2048),
        "rms_norm_eps": Field(("norm_eps",), 1e-6),
        "rope_theta": Field(("rope_theta",), 10000.0, float),
        "rope_parameters": Field(("rope_theta",), {}, _rope),
        "rope_scaling": Field((), None, _no_scaling),
        "tie_word_embeddings": Field(("tie_embeddings",), False),
        "attention_bias": Field(("qkv_bias", "out_bias"), False),
        "attention_dropout": Field(("attention_dropout",), 0.0, float),
        "mlp_bias": Field(("mlp_bias",), False),
    },
    tensors={
        "embed/table": Tensor("model.embed_tokens.weight"),
        **_linear("decoder/layers/attn/q", "model.layers.{}.self_attn.q_proj"),
        **_linear("decoder/layers/attn/k", "model.layers.{}.self_attn.k_proj"),
        **_linear("decoder/layers/attn/v", "model.layers.{}.self_attn.v_proj"),
        **_linear("decoder/layers/attn/o", "model.layers.{}.self_attn.o_proj"),
        **_linear("decoder/layers/mlp/gate", "model.layers.{}.mlp.gate_proj"),
        **_linear("decoder/layers/mlp/up", "model.layers.{}.mlp.up_proj"),
        **_linear("decoder/layers/mlp/down", "model.layers.{}.mlp.down_proj"),
        "decoder/layers/attn_norm/scale": Tensor("model.layers.{}.input_layernorm.weight"),
        "decoder/layers/mlp_norm/scale": Tensor("model.layers.{}.post_attention_layernorm.weight"),
        "decoder/final_norm/scale": Tensor("model.norm.weight"),
        **_linear("head", "lm_head"),
    },
    fixed={"norm": "rmsnorm", "norm_position": "pre", "positions": "rotary"},
    unused=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight"),
)

FAMILIES: dict[str, Family] = {"llama": LLAMA}
