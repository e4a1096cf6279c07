"""The registry of model families: the table of each ``model_type`` of config.json.

To add a family, write its table in the file of its lineage and give it a line in ``FAMILIES``; see jaxlm/hf/README.md.
Names and defaults in the tables are those of transformers 5. ``python -m jaxlm.hf.families.registry`` prints the table
of families in that README.
"""

from __future__ import annotations

from jaxlm.hf.families.bart import BART, M2M_100, MARIAN, MBART
from jaxlm.hf.families.fields import Family
from jaxlm.hf.families.gemma import GEMMA2, GEMMA3
from jaxlm.hf.families.gpt import GPT2, GPT_NEOX
from jaxlm.hf.families.llama import LLAMA, MISTRAL, MIXTRAL
from jaxlm.hf.families.olmo import OLMO2
from jaxlm.hf.families.phi import PHI3
from jaxlm.hf.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from jaxlm.hf.families.t5 import T5

__all__ = ["FAMILIES", "IGNORED_FIELDS", "markdown"]

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "mixtral": MIXTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "olmo2": OLMO2,
    "marian": MARIAN,
    "m2m_100": M2M_100,
    "t5": T5,
    "bart": BART,
    "mbart": MBART,
}

# Fields that do not change what a model of any family computes: names; token ids and quantization_config, which other
# code reads; settings of training and of classifiers; and settings of generation, which older files keep in config.json
# (``inference.generation_config`` reads those).
IGNORED_FIELDS = frozenset(
    "_attn_implementation _attn_implementation_autoset _name_or_path _num_labels architectures auto_map bos_token_id "
    "cache_implementation chunk_size_feed_forward classif_dropout classifier_dropout cross_attention_hidden_size "
    "decoder_layerdrop decoder_start_token_id dtype encoder_layerdrop eos_token_id finetuning_task "
    "gradient_checkpointing id2label init_std initializer_factor initializer_range is_decoder is_encoder_decoder jaxlm "
    "label2id layerdrop model_type n_ctx num_labels output_attentions "
    "output_hidden_states output_past output_router_logits pad_token_id prefix pretraining_tp problem_type "
    "pruned_heads quantization_config return_dict return_dict_in_generate router_aux_loss_coef router_jitter_noise "
    "sep_token_id task_specific_params tf_legacy_loss tokenizer_class torch_dtype torchscript transformers_version "
    "use_bfloat16 use_cache "
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length "
    "no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values "
    "repetition_penalty suppress_tokens temperature top_k top_p typical_p".split()
)


def markdown() -> str:
    """The table of README.md: for each family, the fields that all its models have and that are not our defaults."""
    lines = ["| `model_type` | class in transformers | what its models have, in our terms |", "|---|---|---|"]
    for model_type, family in FAMILIES.items():
        default, fixed = family.config_class(), {}
        for field in family.fields:
            if not field.hf_defaults:
                fixed |= field.from_hf({})
        shown = [f"`{name}={value}`" for name, value in sorted(fixed.items()) if value != getattr(default, name)]
        lines.append(f"| {model_type} | `{family.architecture}` | {', '.join(shown) or 'the defaults'} |")
    return "\n".join(lines)
