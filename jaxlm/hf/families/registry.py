"""The Hugging Face model families there are, by the ``model_type`` of their config.json.

A family is a table (``hf_decoders``, ``hf_translators``): which field of config.json is which of ours, and which tensor
is which. To add one, add its table; ``jaxlm.hf.reader`` reads and writes them all alike. Names and defaults are
those of transformers 5.
"""

from __future__ import annotations

from jaxlm.hf.families import decoders, translators
from jaxlm.hf.families.fields import Family

__all__ = ["FAMILIES", "NEUTRAL", "markdown"]

FAMILIES: dict[str, Family] = {
    "gpt2": decoders.GPT2,
    "gpt_neox": decoders.NEOX,
    "llama": decoders.LLAMA,
    "mistral": decoders.MISTRAL,
    "mixtral": decoders.MIXTRAL,
    "qwen2": decoders.QWEN2,
    "qwen3": decoders.QWEN3,
    "qwen3_moe": decoders.QWEN3_MOE,
    "gemma2": decoders.GEMMA2,
    "gemma3_text": decoders.GEMMA3,
    "phi3": decoders.PHI3,
    "olmo2": decoders.OLMO2,
    "marian": translators.MARIAN,
    "m2m_100": translators.M2M_100,
    "t5": translators.T5,
    "bart": translators.BART,
    "mbart": translators.MBART,
}

# Fields that have no part in what a model computes, in any family: names, ids and quantization_config (read apart),
# what training did, what classifiers on top of it need, and the settings of generation that older files keep here
# (``generation_config``).
NEUTRAL = frozenset(
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
    """The table of README: what each family is called, and what sets its models apart from the defaults of ours."""
    lines = ["| `model_type` | class in transformers | what its models have, in our terms |", "|---|---|---|"]
    for kind, family in FAMILIES.items():
        default, told = family.config(), {}
        for field in family.fields:
            if not field.theirs:
                told |= field.read({})
        shown = [f"`{name}={value}`" for name, value in sorted(told.items()) if value != getattr(default, name)]
        lines.append(f"| {kind} | `{family.architecture}` | {', '.join(shown) or 'the defaults'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
