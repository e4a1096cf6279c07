"""The tables of BART and of the translation models that descend from it: mBART, M2M-100 (and NLLB), Marian."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxlm.hf.families.fields import (
    ACTIVATIONS,
    ConfigField,
    Family,
    HfFields,
    TensorSpec,
    choice,
    constant,
    linear,
    norm,
    optional_size,
    renamed,
)
from jaxlm.nn.config import Seq2SeqConfig

__all__ = ["BART", "M2M_100", "MARIAN", "MBART"]


def _target_embedding(config: Seq2SeqConfig) -> str:
    return "model.decoder.embed_tokens.weight" if config.src_vocab_size else "model.shared.weight"


def _bart_tensors() -> dict[str, TensorSpec]:
    """The tensors of BART, which mBART, M2M-100 and Marian have under the same names."""
    tensors = {
        "embed/table": TensorSpec(
            _target_embedding, aliases=("model.decoder.embed_tokens.weight", "model.shared.weight", "lm_head.weight")
        ),
        "src_embed/table": TensorSpec("model.encoder.embed_tokens.weight", aliases=("model.shared.weight",)),
        "logits_bias": TensorSpec("final_logits_bias", as_row=True),
        **linear("head", "lm_head"),
    }
    for side in ("encoder", "decoder"):
        path, hf_layer = f"{side}/layers", f"model.{side}.layers.{{}}"
        attentions = {"attn": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
        for attention, hf_attention in attentions.items():
            for name, hf_name in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items():
                tensors |= linear(f"{path}/{attention}/{name}", f"{hf_layer}.{hf_attention}.{hf_name}")
            tensors |= norm(f"{path}/{attention}_norm", f"{hf_layer}.{hf_attention}_layer_norm")
        tensors |= linear(f"{path}/mlp/up", f"{hf_layer}.fc1") | linear(f"{path}/mlp/down", f"{hf_layer}.fc2")
        tensors |= norm(f"{path}/mlp_norm", f"{hf_layer}.final_layer_norm")
        tensors |= norm(f"{side}/embed_norm", f"model.{side}.layernorm_embedding")
        tensors |= norm(f"{side}/final_norm", f"model.{side}.layer_norm")
        tensors[f"{side}/pos/table"] = TensorSpec(f"model.{side}.embed_positions.weight")
    return tensors


def _vocabulary(fields: HfFields) -> dict[str, Any]:
    """Untied embeddings are not shared between source and target either: transformers then has three tables, of the
    source, of the target and of the output head."""
    tied, size = fields["tie_word_embeddings"], fields["vocab_size"]
    return {"vocab_size": size, "tie_embeddings": tied, "src_vocab_size": 0 if tied else size}


def _shared_vocabulary(default: int) -> ConfigField:
    return ConfigField(
        {"vocab_size": default, "tie_word_embeddings": True},
        _vocabulary,
        lambda config: {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings},
    )


def _decoder_size(hf_name: str, name: str, resolved: str, default: int) -> ConfigField:
    """A size of the decoder. Our field ``name`` may be 0 for "as in the encoder"; ``config.decoder`` has the size that
    is written, as ``resolved``."""
    return ConfigField(
        {hf_name: default},
        lambda fields: {name: fields[hf_name]},
        lambda config: {hf_name: getattr(config.decoder, resolved)},
    )


def _bart_fields(
    vocabulary: ConfigField, *, act: str = "gelu", scaled: bool = False, attention_dropout: float = 0.0
) -> tuple[ConfigField, ...]:
    return (
        vocabulary,
        renamed("d_model", "width", default=1024),
        renamed("encoder_layers", "encoder_layers", default=12),
        renamed("decoder_layers", "decoder_layers", default=12),
        renamed("encoder_attention_heads", "heads", default=16),
        _decoder_size("decoder_attention_heads", "decoder_heads", "heads", 16),
        optional_size("encoder_ffn_dim", "ffn", "d_ffn", 4096),
        _decoder_size("decoder_ffn_dim", "decoder_ffn", "d_ffn", 4096),
        choice("activation_function", "activation", ACTIVATIONS, act),
        renamed("max_position_embeddings", "max_positions", default=1024),
        renamed("dropout", "dropout", default=0.1, cast=float),
        renamed("attention_dropout", "attention_dropout", default=attention_dropout, cast=float),
        renamed("activation_dropout", "ffn_dropout", default=0.0, cast=float),
        renamed("scale_embedding", "embed_scale", default=scaled),
        constant(norm="layernorm", qkv_bias=True, out_bias=True, mlp_bias=True),
    )


_TIED_TENSORS = (r"model\.(shared|(encoder|decoder)\.embed_tokens)\.weight", r"lm_head\.weight")

BART = Family(
    config_class=Seq2SeqConfig,
    architecture="BartForConditionalGeneration",
    fields=(
        *_bart_fields(_shared_vocabulary(50265)),
        constant(norm_position="post", positions="learned", position_offset=2, embed_norm=True, logits_bias=True),
    ),
    tensors=_bart_tensors(),
    prefix="model.",
    unused_tensors=_TIED_TENSORS,
)

MBART = dataclasses.replace(
    BART,
    architecture="MBartForConditionalGeneration",
    fields=(*BART.fields, constant(norm_position="pre")),
)

_POSITION_OFFSET = ConfigField(
    {"pad_token_id": 1},
    lambda fields: {"position_offset": (fields["pad_token_id"] or 0) + 1},  # fairseq numbers positions from there on
    lambda config: {"pad_token_id": config.position_offset - 1},
)

M2M_100 = Family(
    config_class=Seq2SeqConfig,
    architecture="M2M100ForConditionalGeneration",
    fields=(
        *_bart_fields(_shared_vocabulary(128112), act="relu", scaled=True, attention_dropout=0.1),
        _POSITION_OFFSET,
        constant(norm_position="pre", positions="sinusoidal_t2t"),
    ),
    tensors=_bart_tensors(),
    prefix="model.",
    unused_tensors=(*_TIED_TENSORS, r"model\.(encoder|decoder)\.embed_positions\.weights?", "final_logits_bias"),
)


def _marian_vocabularies(fields: HfFields) -> dict[str, Any]:
    if fields["share_encoder_decoder_embeddings"]:
        return _vocabulary(fields)
    return {
        "vocab_size": fields["decoder_vocab_size"] or fields["vocab_size"], "src_vocab_size": fields["vocab_size"],
        "tie_embeddings": fields["tie_word_embeddings"],
    }


_MARIAN_VOCABULARIES = ConfigField(
    {
        "vocab_size": 58101, "decoder_vocab_size": None, "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
    },
    _marian_vocabularies,
    lambda config: {
        "vocab_size": config.src_vocab_size or config.vocab_size, "decoder_vocab_size": config.vocab_size,
        "share_encoder_decoder_embeddings": not config.src_vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
    },
)

MARIAN = Family(
    config_class=Seq2SeqConfig,
    architecture="MarianMTModel",
    fields=(
        *_bart_fields(_MARIAN_VOCABULARIES),
        constant(norm_position="post", positions="sinusoidal", logits_bias=True),
    ),
    tensors=_bart_tensors(),
    prefix="model.",
    unused_tensors=(*_TIED_TENSORS, r"model\.(encoder|decoder)\.embed_positions\.weight"),
)
