"""Which fields of config.json count: those that transformers reads for a model of the family.

A field that transformers does not read cannot change what it computes. ``read_fields.json`` lists those that it reads,
with their defaults; ``python -m tests.hf.families.read_fields`` makes it from the sources of transformers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError, shown

__all__ = [
    "FILE", "check_architecture", "check_unknown", "config_notes", "default_fields", "tokenizer_notes",
    "without_aliases",
]

FILE = Path(__file__).with_name("read_fields.json")

# Fields without effect on what a model computes, whose values need no word: names; token ids and quantization_config,
# which other code reads; settings of training, of classifiers and of what is returned; and settings of generation,
# which older files keep in config.json (``inference.generation_config`` reads those).
_HARMLESS = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path _num_labels _sliding_window_pattern "
    "architectures attn_implementation auto_map bos_token_id cache_implementation chunk_size_feed_forward "
    "classif_dropout classifier_dropout cross_attention_hidden_size decoder_layerdrop decoder_start_token_id "
    "distributed_config dtype encoder_layerdrop eos_token_id experts_implementation finetuning_task "
    "gradient_checkpointing id2label init_std initializer_factor initializer_range is_decoder is_encoder_decoder "
    "jaxlm label2id layerdrop model_type n_ctx num_labels num_nextn_predict_layers output_attentions "
    "output_hidden_states output_past output_router_logits pad_token_id prefix pretraining_tp problem_type "
    "pruned_heads quantization_config reorder_and_upcast_attn return_dict return_dict_in_generate "
    "router_aux_loss_coef router_jitter_noise sep_token_id summary_activation summary_first_dropout "
    "summary_proj_to_labels summary_type summary_use_proj task_specific_params tf_legacy_loss tokenizer_class "
    "torch_dtype torchscript transformers_version use_bfloat16 use_cache "
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values "
    "repetition_penalty suppress_tokens temperature top_k top_p typical_p".split()
)
# Models that share a model_type with the language model whose drafts or labels they make: they have parts of their own.
_DRAFT = re.compile("eagle|dflash|medusa|hydra|draft|speculator", re.IGNORECASE)
_CLASSIFIER = re.compile("For(Sequence|Token)Classification$|ForQuestionAnswering$")
_NAMES_SHOWN = 12
_DRAFT_FIELDS = ("dflash_config", "draft_vocab_size", "eagle_config", "speculators_config", "speculators_model_type")


@functools.cache
def _table() -> Mapping[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _read(model_type: str) -> Mapping[str, Any]:
    """The fields that transformers reads, each with its default."""
    return _table()["every"] | _table()[model_type]["fields"]


def default_fields(model_type: str) -> dict[str, Any]:
    """The values that transformers takes for fields that a config.json of this ``model_type`` leaves out; of a model
    that is not supported none."""
    fields = _table().get(model_type, {}).get("fields", {})
    return {name: value for name, value in fields.items() if value is not None}


def without_aliases(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields under the names that the family's table has. An alias counts where both names are given, as in
    transformers: ``num_hidden_layers`` of a BART is its ``encoder_layers``."""
    aliases = _table()[fields["model_type"]]["aliases"]
    renamed = {aliases[name]: value for name, value in fields.items() if name in aliases and value is not None}
    out = {name: value for name, value in fields.items() if name not in aliases} | renamed
    if "num_layers" in renamed and out.get("num_decoder_layers") is None:  # of a T5, which copies it before
        out["num_decoder_layers"] = fields.get("num_layers", _read(fields["model_type"])["num_layers"])
    return out


def check_architecture(fields: Mapping[str, Any], expected: str) -> None:
    """Refuses draft heads and classifiers, which have the ``model_type`` of a language model.

    Raises:
        UserError: ``architectures``, or a field that only draft heads have, says that it is one.
    """
    names = fields.get("architectures")
    names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if expected in names:
        names = []
    for name in names:
        if _DRAFT.search(name):
            raise UserError(
                f"architectures = {shown(name)}: this is a draft head, a part that guesses tokens for another "
                "model; load that model"
            )
        if _CLASSIFIER.search(name):
            raise UserError(f"architectures = {shown(name)}: this is a classifier; load a {expected}")
    found = next((name for name in _DRAFT_FIELDS if fields.get(name) is not None), None)
    if found:
        raise UserError(f"{found}: this is a draft head, a part that guesses tokens for another model; load that model")


def check_unknown(fields: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Checks fields that the family's table does not have (``known`` are those it has).

    Raises:
        UserError: transformers reads one of them, and its value is not the one that it takes where there is none.
    """
    read = _read(fields["model_type"])
    for name, value in sorted(fields.items()):
        if name in read and name not in known and name not in _HARMLESS and value not in (None, read[name]):
            allowed = "null" if read[name] is None else f"{json.dumps(read[name])} or null"
            raise UserError(
                f"{name} = {shown(value)} changes what this model computes and is not supported; only {allowed}"
            )


def config_notes(fields: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """What a user should know of a config.json: the fields that have no effect, here as in transformers, and that are
    not in most files. A field of ``rope_scaling`` is called ``rope_scaling.NAME``."""
    table = _table()[fields["model_type"]]
    quiet = {*known, *_HARMLESS, *_read(fields["model_type"]), *table["aliases"]}
    names = [name for name, value in fields.items() if value is not None and name not in quiet]
    for key in ("rope_scaling", "rope_parameters"):
        names += _unread_scaling(key, fields.get(key), table.get("rope", ()))
    return _notes("config.json", names)


def tokenizer_notes(fields: Mapping[str, Any]) -> list[str]:
    """The same for tokenizer_config.json. All tokenizers of transformers have one list; names of tokens are read."""
    read = {*_table()["tokenizer"], "is_local"}  # which transformers writes into every file
    names = [name for name in fields if name not in read and not name.endswith(("_token", "_token_id"))]
    return _notes("tokenizer_config.json", [name for name in names if fields[name] is not None])


def _notes(file: str, names: list[str]) -> list[str]:
    if not names:
        return []
    said = [name if len(name) < 80 and name.isprintable() else shown(name) for name in names[:_NAMES_SHOWN]]
    said += [f"{len(names) - _NAMES_SHOWN} more"] if len(names) > _NAMES_SHOWN else []
    return [f"{file}: {', '.join(said)}: without effect, as transformers does not read them either"]


def _unread_scaling(path: str, given: Any, own: Collection[str]) -> list[str]:
    """``own`` are the names that the code of the family itself reads."""
    if not isinstance(given, dict):
        return []
    nested = [name for name in given if name.endswith("_attention")]  # by the type of layer
    if nested:
        return [name for key in nested for name in _unread_scaling(f"{path}.{key}", given[key], own)]
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    read = _table()["rope"].get(kind, ()) if isinstance(kind, str) else ()
    read = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", *read, *own}
    return [f"{path}.{name}" for name, value in given.items() if value is not None and name not in read]
