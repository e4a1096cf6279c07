"""The tables of the encoder-decoder families of Hugging Face; see ``hf_fields`` for what the entries mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxlm.hf.families.fields import GATED, PLAIN, Family, Field, Tensor, choice, constant, linear, norm, same, size
from jaxlm.nn.config import Seq2SeqConfig


def _target_embedding(config: Seq2SeqConfig) -> str:
    return "model.decoder.embed_tokens.weight" if config.src_vocab_size else "model.shared.weight"


def _bart_tensors() -> dict[str, Tensor]:
    """The names that Marian, M2M-100 and mBART share with BART."""
    tensors = {
        "embed/table": Tensor(
            _target_embedding, aliases=("model.decoder.embed_tokens.weight", "model.shared.weight", "lm_head.weight")
        ),
        "src_embed/table": Tensor("model.encoder.embed_tokens.weight", aliases=("model.shared.weight",)),
        "logits_bias": Tensor("final_logits_bias", row=True),
        **linear("head", "lm_head"),
    }
    for side in ("encoder", "decoder"):
        layer = f"model.{side}.layers.{{}}"
        ours = f"{side}/layers"
        attentions = {"attn": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
        for mine, theirs in attentions.items():
            for name, part in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items():
                tensors |= linear(f"{ours}/{mine}/{name}", f"{layer}.{theirs}.{part}")
            tensors |= norm(f"{ours}/{mine}_norm", f"{layer}.{theirs}_layer_norm")
        tensors |= linear(f"{ours}/mlp/up", f"{layer}.fc1") | linear(f"{ours}/mlp/down", f"{layer}.fc2")
        tensors |= norm(f"{ours}/mlp_norm", f"{layer}.final_layer_norm")
        tensors |= norm(f"{side}/embed_norm", f"model.{side}.layernorm_embedding")
        tensors |= norm(f"{side}/final_norm", f"model.{side}.layer_norm")
        tensors[f"{side}/pos/table"] = Tensor(f"model.{side}.embed_positions.weight")
    return tensors


def _vocabulary(values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not tied is not shared either: transformers then has three tables, of source, target and head."""
    tied, size = values["tie_word_embeddings"], values["vocab_size"]
    return {"vocab_size": size, "tie_embeddings": tied, "src_vocab_size": 0 if tied else size}


_VOCABULARY = Field(
    {"vocab_size": 50265, "tie_word_embeddings": True},
    _vocabulary,
    lambda config: {"vocab_size": config.vocab_size, "tie_word_embeddings": config.tie_embeddings},
)


def _decoder_size(theirs: str, ours: str, derived: str, default: int) -> Field:
    """A size of the decoder, which is 0 in ours where it is the encoder's."""
    return Field(
        {theirs: default},
        lambda values: {ours: values[theirs]},
        lambda config: {theirs: getattr(config.decoder, derived)},
    )


def _bart_fields(
    *, vocabulary: Field = _VOCABULARY, act: str = "gelu", scaled: bool = False, attention_dropout: float = 0.0
) -> tuple[Field, ...]:
    return (
        vocabulary,
        same("d_model", "width", default=1024),
        same("encoder_layers", "encoder_layers", default=12),
        same("decoder_layers", "decoder_layers", default=12),
        same("encoder_attention_heads", "heads", default=16),
        _decoder_size("decoder_attention_heads", "decoder_heads", "heads", 16),
        size("encoder_ffn_dim", "ffn", "d_ffn", 4096),
        _decoder_size("decoder_ffn_dim", "decoder_ffn", "d_ffn", 4096),
        choice("activation_function", "activation", PLAIN, act),
        same("max_position_embeddings", "max_positions", default=1024),
        same("dropout", "dropout", default=0.1, cast=float),
        same("attention_dropout", "attention_dropout", default=attention_dropout, cast=float),
        same("activation_dropout", "ffn_dropout", default=0.0, cast=float),
        same("scale_embedding", "embed_scale", default=scaled),
        constant(norm="layernorm", qkv_bias=True, out_bias=True, mlp_bias=True),
    )


_BART_IGNORED = (
    "add_bias_logits", "add_final_layer_norm", "extra_pos_embeddings", "force_bos_token_to_be_generated",
    "normalize_before", "normalize_embedding", "num_hidden_layers", "static_position_embeddings",
)  # of fairseq and Marian: transformers does not read them
_TIED = (r"model\.(shared|(encoder|decoder)\.embed_tokens)\.weight", r"lm_head\.weight")

BART = Family(
    config=Seq2SeqConfig,
    architecture="BartForConditionalGeneration",
    fields=(
        *_bart_fields(),
        constant(norm_position="post", positions="learned", position_offset=2, embed_norm=True, logits_bias=True),
    ),
    tensors=_bart_tensors(),
    prefix="model.",
    ignored=_BART_IGNORED,
    unused=_TIED,
)

MBART = dataclasses.replace(
    BART,
    architecture="MBartForConditionalGeneration",
    fields=(*BART.fields, constant(norm_position="pre")),
)

_PAD_OFFSET = Field(
    {"pad_token_id": 1},
    lambda values: {"position_offset": (values["pad_token_id"] or 0) + 1},  # fairseq counts from after the padding
    lambda config: {"pad_token_id": config.position_offset - 1},
)

M2M_100 = Family(
    config=Seq2SeqConfig,
    architecture="M2M100ForConditionalGeneration",
    fields=(
        *_bart_fields(act="relu", scaled=True, attention_dropout=0.1),
        _PAD_OFFSET,
        constant(norm_position="pre", positions="sinusoidal_t2t"),
    ),
    tensors=_bart_tensors(),
    prefix="model.",
    ignored=_BART_IGNORED,
    unused=(*_TIED, r"model\.(encoder|decoder)\.embed_positions\.weights?", "final_logits_bias"),
)


def _marian_vocabularies(values: Mapping[str, Any]) -> dict[str, Any]:
    if values["share_encoder_decoder_embeddings"]:
        return _VOCABULARY.read(values)
    return {
        "vocab_size": values["decoder_vocab_size"] or values["vocab_size"], "src_vocab_size": values["vocab_size"],
        "tie_embeddings": values["tie_word_embeddings"],
    }


_MARIAN_VOCABULARIES = Field(
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
    config=Seq2SeqConfig,
    architecture="MarianMTModel",
    fields=(
        *_bart_fields(vocabulary=_MARIAN_VOCABULARIES),
        constant(norm_position="post", positions="sinusoidal", logits_bias=True),
    ),
    tensors=_bart_tensors(),
    prefix="model.",
    ignored=_BART_IGNORED,
    unused=(*_TIED, r"model\.(encoder|decoder)\.embed_positions\.weight"),
)


def _t5_output(fields: Mapping[str, Any]) -> float:
    """T5 multiplies the decoder's output by ``1 / sqrt(d_model)`` before a tied head: the same as a smaller norm."""
    scaled = fields["scale_decoder_outputs"]
    scaled = fields["tie_word_embeddings"] is not False if scaled is None else scaled
    return fields["d_model"] ** -0.5 if scaled else 1.0


def _t5_tensors() -> dict[str, Tensor]:
    tensors = {
        "embed/table": Tensor(
            "shared.weight", aliases=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        ),
        **linear("head", "lm_head"),
    }
    for side in ("encoder", "decoder"):
        blocks, ours = f"{side}.block.{{}}.layer", f"{side}/layers"
        attentions = {"attn": "0.SelfAttention"} | ({"cross": "1.EncDecAttention"} if side == "decoder" else {})
        for mine, theirs in attentions.items():
            for name in ("q", "k", "v", "o"):
                tensors |= linear(f"{ours}/{mine}/{name}", f"{blocks}.{theirs}.{name}")
            tensors |= norm(f"{ours}/{mine}_norm", f"{blocks}.{theirs[0]}.layer_norm")
        mlp = f"{blocks}.{len(attentions)}"
        for name, part in {"gate": "wi_0", "up": "wi_1", "down": "wo"}.items():
            tensors |= linear(f"{ours}/mlp/{name}", f"{mlp}.DenseReluDense.{part}")
        tensors |= norm(f"{ours}/mlp_norm", f"{mlp}.layer_norm")
        scale = {"scale": _t5_output} if side == "decoder" else {}
        tensors |= norm(f"{side}/final_norm", f"{side}.final_layer_norm", **scale)
        tensors[f"{side}/rel/table"] = Tensor(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    return tensors


def _t5_up(side: str) -> Callable[[Seq2SeqConfig], str]:
    """The first map of the MLP has another name where there is no gate."""
    block = f"{side}.block.{{}}.layer.{1 if side == 'encoder' else 2}.DenseReluDense"
    return lambda config: f"{block}.{'wi_1' if config.gated else 'wi'}.weight"


T5 = Family(
    config=Seq2SeqConfig,
    architecture="T5ForConditionalGeneration",
    fields=(
        same("vocab_size", "vocab_size", default=32128),
        same("d_model", "width", default=512),
        size("d_ff", "ffn", "d_ffn", 2048),
        same("num_heads", "heads", default=8),
        size("d_kv", "head_dim", "d_head", 64),
        Field(
            {"num_layers": 6, "num_decoder_layers": None},
            lambda values: {
                "encoder_layers": values["num_layers"],
                "decoder_layers": values["num_layers"] if values["num_decoder_layers"] is None
                else values["num_decoder_layers"],
            },
            lambda config: {"num_layers": config.encoder_layers, "num_decoder_layers": config.decoder_layers},
        ),
        same("relative_attention_num_buckets", "relative_buckets", default=32),
        same("relative_attention_max_distance", "relative_max_distance", default=128),
        same("dropout_rate", "dropout", default=0.1, cast=float),
        same("layer_norm_epsilon", "norm_eps", default=1e-6, cast=float),
        choice(
            "feed_forward_proj", "activation",
            PLAIN | {f"gated-{name}": gate for name, gate in GATED.items()} | {"gated-gelu": "geglu_tanh"}, "relu",
        ),
        Field(
            {"tie_word_embeddings": True, "scale_decoder_outputs": None},  # see _t5_output
            lambda values: {"tie_embeddings": True},  # unless the file has a head of its own
            lambda config: {"tie_word_embeddings": config.tie_embeddings},
        ),
        constant(norm="rmsnorm", norm_position="pre", positions="relative", attention_scale=1.0),
    ),
    tensors=_t5_tensors() | {
        f"{side}/layers/mlp/up/kernel": Tensor(_t5_up(side), transposed=True) for side in ("encoder", "decoder")
    },
    ignored=("dense_act_fn", "is_gated_act", "n_positions", "use_task_specific_params"),
    unused=(
        r"(encoder|decoder)\.embed_tokens\.weight", r"lm_head\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
)
