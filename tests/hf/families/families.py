"""Small random models of every Hugging Face family. Each option of a family is used in at least one of its cases.

    python -m tests.hf.families.families [CASE ...]        writes golden/CASE.json; needs torch and transformers

A golden file holds what transformers computes for a case: its config.json, the names and shapes of its tensors, logits,
and the tokens of greedy or beam search. Weights follow from the names of the tensors, so that files stay small.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
VOCABULARY, STEPS, BEAMS = 61, 32, 5

_IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
_LLAMA = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, **_IDS,
)
_TWO = _LLAMA | {"num_hidden_layers": 2}
_GPT2 = dict(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, **_IDS)
_NEOX = {name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"}
_VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
)
_OPT = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, ffn_dim=48, max_position_embeddings=64,
    num_attention_heads=4, **_IDS,
)
_FALCON = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=48,
    max_position_embeddings=128, **_IDS,
)
_BART = dict(
    vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=40, max_position_embeddings=64,
)
_MARIAN = _BART | dict(pad_token_id=60, eos_token_id=0, decoder_start_token_id=60)
_T5 = dict(
    vocab_size=VOCABULARY, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0,
)


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 500.0, "rope_type": kind, **fields}}


_LONG = dict(original_max_position_embeddings=16, factor=4.0)
_YARN = _LONG | dict(beta_fast=8.0, beta_slow=2.0)
_FACTORS = dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 2.0, 3.0, 4.0])
_EXPERTS = dict(num_experts=4, moe_intermediate_size=24)
_ROUTED = dict(n_routed_experts=8, moe_intermediate_size=24, num_experts_per_tok=3)

CASES: dict[str, dict[str, Any]] = {
    "llama": dict(model_type="llama", **_LLAMA),
    "llama-biased": dict(
        model_type="llama", **_LLAMA, attention_bias=True, mlp_bias=True, head_dim=16, tie_word_embeddings=True,
        hidden_act="gelu", rms_norm_eps=1e-3,
    ),
    "llama-linear": dict(model_type="llama", **_LLAMA, **_rope("linear", factor=3.0)),
    "llama-dynamic": dict(
        model_type="llama", **(_LLAMA | {"max_position_embeddings": 16}), **_rope("dynamic", factor=2.5)
    ),
    "llama-llama3": dict(
        model_type="llama", **_LLAMA, **_rope("llama3", **_LONG, low_freq_factor=1.0, high_freq_factor=4.0)
    ),
    "llama-yarn": dict(model_type="llama", **_LLAMA, **_rope("yarn", **_YARN)),
    "llama-yarn-mscale": dict(
        model_type="llama", **_LLAMA, **_rope("yarn", **_YARN, mscale=0.7, mscale_all_dim=0.3, truncate=False)
    ),
    "llama-longrope": dict(model_type="llama", **_LLAMA, **_rope("longrope", **_LONG, **_FACTORS)),
    "gpt2": dict(model_type="gpt2", **_GPT2),
    "gpt2-switches": dict(
        model_type="gpt2", **_GPT2, n_inner=40, activation_function="relu", scale_attn_weights=False,
        tie_word_embeddings=False, layer_norm_epsilon=1e-3,
    ),
    "gpt2-by-layer": dict(
        model_type="gpt2", **_GPT2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True,
        activation_function="silu",
    ),
    "gpt_neox": dict(model_type="gpt_neox", **_NEOX),
    "gpt_neox-serial": dict(
        model_type="gpt_neox", **_NEOX, use_parallel_residual=False, attention_bias=False, tie_word_embeddings=True,
        hidden_act="gelu_new", **_rope("linear", factor=2.0, partial_rotary_factor=1.0),
    ),
    "mistral": dict(model_type="mistral", **_LLAMA, sliding_window=5, head_dim=12),
    "mistral-full": dict(model_type="mistral", **_LLAMA, sliding_window=None),
    "mixtral": dict(model_type="mixtral", **_LLAMA, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "qwen2": dict(
        model_type="qwen2", **_LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": dict(
        model_type="qwen3", **_LLAMA, head_dim=12, attention_bias=True, use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3_moe": dict(
        model_type="qwen3_moe", **_LLAMA, **_EXPERTS, num_experts_per_tok=2, norm_topk_prob=True, mlp_only_layers=[1],
        head_dim=8,
    ),
    "qwen3_moe-sparse": dict(
        model_type="qwen3_moe", **_LLAMA, **_EXPERTS, num_experts_per_tok=3, decoder_sparse_step=2, attention_bias=True,
        use_sliding_window=True, sliding_window=5, head_dim=12,
    ),
    "qwen2_moe": dict(
        model_type="qwen2_moe", **_LLAMA, **_EXPERTS, num_experts_per_tok=2, shared_expert_intermediate_size=20,
        mlp_only_layers=[1], use_sliding_window=True, sliding_window=5, max_window_layers=2,
    ),
    "qwen2_moe-plain": dict(
        model_type="qwen2_moe", **_LLAMA, **_EXPERTS, num_experts_per_tok=3, shared_expert_intermediate_size=20,
        norm_topk_prob=True, qkv_bias=False, decoder_sparse_step=2, tie_word_embeddings=True,
    ),
    "gemma2": dict(
        model_type="gemma2", **_LLAMA, head_dim=12, query_pre_attn_scalar=20, sliding_window=4, attention_bias=True,
        final_logit_softcapping=3.0, attn_logit_softcapping=2.0,
    ),
    "gemma2-plain": dict(
        model_type="gemma2", **_LLAMA, head_dim=12, final_logit_softcapping=None, attn_logit_softcapping=None,
        sliding_window=4, tie_word_embeddings=False, hidden_activation="gelu",
    ),
    "gemma3_text": dict(
        model_type="gemma3_text", **_LLAMA, head_dim=12, query_pre_attn_scalar=20, sliding_window=4,
        sliding_window_pattern=2, final_logit_softcapping=3.0,
    ),
    "gemma3_text-scaled": dict(
        model_type="gemma3_text", **_LLAMA, head_dim=12, attention_bias=True, sliding_window=4, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "phi3": dict(model_type="phi3", **_LLAMA, sliding_window=5),
    "phi3-longrope": dict(
        model_type="phi3", **_LLAMA, original_max_position_embeddings=4, partial_rotary_factor=0.5,
        tie_word_embeddings=True,
        **_rope("longrope", partial_rotary_factor=0.5, short_factor=[1.0, 1.3], long_factor=[1.5, 3.0]),
    ),
    "olmo2": dict(model_type="olmo2", **_LLAMA, attention_bias=True),
    "olmo2-tied": dict(model_type="olmo2", **(_LLAMA | {"num_key_value_heads": None}), tie_word_embeddings=True),
    "olmoe": dict(
        model_type="olmoe", **_LLAMA, num_experts=5, num_experts_per_tok=2, attention_bias=True, norm_topk_prob=True
    ),
    "glm4_moe": dict(
        model_type="glm4_moe", **_LLAMA, **_ROUTED, n_group=4, topk_group=2, n_shared_experts=2, attention_bias=True,
        use_qk_norm=True, routed_scaling_factor=2.5, head_dim=12,
    ),
    "glm4_moe-plain": dict(
        model_type="glm4_moe", **_LLAMA, **_ROUTED, norm_topk_prob=False, first_k_dense_replace=0,
        **_rope("default", partial_rotary_factor=1.0),
    ),
    "dots1": dict(
        model_type="dots1", **_LLAMA, **_ROUTED, n_group=2, n_shared_experts=1, attention_bias=True, sliding_window=5,
        max_window_layers=1, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=1.5,
    ),
    "minimax_m2": dict(
        model_type="minimax_m2", **_LLAMA, num_local_experts=5, num_experts_per_tok=2, head_dim=12,
        **_rope("default", partial_rotary_factor=0.5),
    ),
    "ernie4_5_moe": dict(
        model_type="ernie4_5_moe", **(_LLAMA | {"num_hidden_layers": 4}), moe_num_experts=5, moe_k=2,
        moe_intermediate_size=24, moe_num_shared_experts=2, moe_layer_start_index=1, moe_layer_end_index=2,
        use_bias=True, tie_word_embeddings=False,
    ),
    "granitemoe": dict(
        model_type="granitemoe", **_LLAMA, num_local_experts=5, attention_bias=True, embedding_multiplier=3.0,
        residual_multiplier=0.7, attention_multiplier=0.2, logits_scaling=2.5,
    ),
    "gpt_oss": dict(
        model_type="gpt_oss", **_LLAMA, num_local_experts=4, num_experts_per_tok=2, head_dim=12, sliding_window=5,
        swiglu_limit=0.5, swiglu_alpha=1.3, **_rope("yarn", **_YARN),
    ),
    "olmo": dict(model_type="olmo", **_TWO, clip_qkv=0.7, attention_bias=True),
    "olmo3": dict(
        model_type="olmo3", **_TWO, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, **_YARN},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "granite": dict(
        model_type="granite", **_TWO, embedding_multiplier=3.0, residual_multiplier=0.4, attention_multiplier=0.2,
        logits_scaling=2.5, attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    "smollm3": dict(
        model_type="smollm3", **_TWO, no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=4, mlp_bias=True,
    ),
    "arcee": dict(
        model_type="arcee", **_TWO, head_dim=12, mlp_bias=True, attention_bias=True, **_rope("yarn", **_YARN)
    ),
    "seed_oss": dict(model_type="seed_oss", **_TWO, head_dim=12, attention_out_bias=True, mlp_bias=True),
    "ernie4_5": dict(model_type="ernie4_5", **_TWO, head_dim=12, use_bias=True),
    "cohere": dict(
        model_type="cohere", **_TWO, use_qk_norm=True, attention_bias=True, logit_scale=0.4, tie_word_embeddings=False,
    ),
    "cohere2": dict(
        model_type="cohere2", **_TWO, sliding_window=4, layer_types=["sliding_attention", "full_attention"],
        logit_scale=0.4,
    ),
    "glm": dict(model_type="glm", **_TWO, head_dim=12, partial_rotary_factor=0.5),
    "glm4": dict(model_type="glm4", **_TWO, head_dim=8, attention_bias=False),
    "stablelm": dict(model_type="stablelm", **_TWO, use_qkv_bias=True, qk_layernorm=True, partial_rotary_factor=0.5),
    "stablelm-parallel": dict(
        model_type="stablelm", **_TWO, use_parallel_residual=True, partial_rotary_factor=0.25, tie_word_embeddings=True,
    ),
    "starcoder2": dict(model_type="starcoder2", **_TWO, sliding_window=5, norm_epsilon=1e-3),
    "nemotron": dict(model_type="nemotron", **_TWO, head_dim=12, attention_bias=True, mlp_bias=True),
    "hunyuan_v1_dense": dict(
        model_type="hunyuan_v1_dense", **_TWO, head_dim=12, attention_bias=True,
        **_rope("dynamic", alpha=8.0, factor=1.0),
    ),
    "exaone4": dict(
        model_type="exaone4", **_TWO, head_dim=12, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "exaone4-full": dict(
        model_type="exaone4", **_TWO, sliding_window=None, layer_types=["full_attention"] * 2, tie_word_embeddings=True,
    ),
    "ministral": dict(
        model_type="ministral", **_TWO, head_dim=12, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "ministral3": dict(
        model_type="ministral3", **_TWO, head_dim=12, **_rope(
            "yarn", **(_YARN | {"original_max_position_embeddings": 6}), llama_4_scaling_beta=0.5,
        ),
    ),
    "apertus": dict(
        model_type="apertus", **_TWO, attention_bias=True,
        **_rope("llama3", **_LONG, low_freq_factor=1.0, high_freq_factor=4.0),
    ),
    "gemma": dict(model_type="gemma", **_TWO, head_dim=12, attention_bias=True),
    "phi": dict(model_type="phi", **_TWO, qk_layernorm=True),
    "gptj": dict(
        model_type="gptj", vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, **_IDS
    ),
    "opt": dict(model_type="opt", **_OPT),
    "opt-post-norm": dict(
        model_type="opt", **_OPT, do_layer_norm_before=False, enable_bias=False, layer_norm_elementwise_affine=False,
        tie_word_embeddings=False, activation_function="gelu",
    ),
    "falcon": dict(model_type="falcon", **_FALCON),
    "falcon-serial": dict(
        model_type="falcon", **_FALCON, multi_query=False, parallel_attn=False, bias=True, tie_word_embeddings=False
    ),
    "falcon-grouped": dict(model_type="falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "gemma3": dict(
        model_type="gemma3", image_token_index=60, mm_tokens_per_image=4, **_IDS, vision_config=_VISION,
        text_config=dict(model_type="gemma3_text", **_TWO, head_dim=12, query_pre_attn_scalar=20, sliding_window=4),
    ),
    "mistral3": dict(
        model_type="mistral3", image_token_index=60, **_IDS, tie_word_embeddings=False,
        vision_config=_VISION | dict(head_dim=8), text_config=dict(
            model_type="ministral3", **_TWO, head_dim=12, **_rope("yarn", **_YARN, llama_4_scaling_beta=0.5)
        ),
    ),
    "marian": dict(model_type="marian", **_MARIAN, scale_embedding=True, activation_function="swish"),
    "marian-two-vocabularies": dict(
        model_type="marian", **(_MARIAN | dict(pad_token_id=50, decoder_start_token_id=50)), decoder_vocab_size=53,
        share_encoder_decoder_embeddings=False,
    ),
    "marian-untied": dict(model_type="marian", **_MARIAN, tie_word_embeddings=False),
    "m2m_100": dict(model_type="m2m_100", **_BART),
    "m2m_100-untied": dict(
        model_type="m2m_100", **_BART, scale_embedding=False, activation_function="gelu", tie_word_embeddings=False
    ),
    "bart": dict(model_type="bart", **_BART),
    "bart-untied": dict(
        model_type="bart", **_BART, scale_embedding=True, activation_function="relu", tie_word_embeddings=False
    ),
    "mbart": dict(model_type="mbart", **_BART, scale_embedding=True, decoder_start_token_id=2),
    "t5": dict(model_type="t5", **_T5),
    "t5-gated": dict(model_type="t5", **_T5, feed_forward_proj="gated-silu"),
    "t5-untied": dict(model_type="t5", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


# Numbers that transformers keeps as tensors though they are the same in all models.
_BUFFERS = {"act_fn.beta": 0.5, "act_fn.eps": -1e-6}


def weights(shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random float32 tensors, which depend only on their names."""

    def tensor(name: str, shape: list[int]) -> np.ndarray:
        if not shape:
            return np.array(next(value for end, value in _BUFFERS.items() if name.endswith(end)), np.float32)
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return (rng.normal(0, 0.25, shape) + ("norm" in name and name.endswith("weight"))).astype(np.float32)

    return {name: tensor(name, shape) for name, shape in sorted(shapes.items())}


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[2, 24]``, which end with the end token, and decoder inputs ``[2, 9]`` without special tokens."""
    rng = np.random.default_rng(0)
    source = rng.integers(3, 50, (2, 24))
    source[:, -1] = config.get("eos_token_id", 1)
    return source, rng.integers(3, 50, (2, 9))


def transformers_model(name: str, directory: Path):
    """The case as a model of transformers, which has saved it in ``directory``."""
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    fields = dict(CASES[name])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    kind = auto_class(config.is_encoder_decoder, "text_config" in fields)
    model = kind.from_config(config)
    if name == "t5-untied":  # transformers ties the head unless the file has both tensors
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    shapes = {key: tensor.shape for key, tensor in load_file(file).items()}
    if "marian" in name:  # it also saves its sinusoids, which are no parameters
        shapes = {key: shape for key, shape in shapes.items() if "embed_positions" not in key}
    save_file(weights(shapes), file, metadata={"format": "pt"})
    return kind.from_pretrained(directory).eval().float()


def auto_class(seq2seq: bool, multimodal: bool = False):
    """The class of transformers that opens models of a kind."""
    import transformers

    if multimodal:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM


def outputs(model) -> dict[str, Any]:
    """What transformers computes with a model: logits, and the tokens of greedy search or of beam search."""
    import torch
    import transformers

    config = model.config.to_dict()
    source, target = map(torch.from_numpy, inputs(config))
    ids = {f"{role}_token_id": config.get(f"{role}_token_id") for role in ("pad", "eos", "bos", "decoder_start")}
    seq2seq = model.config.is_encoder_decoder
    # No other settings: files of real models also force and forbid tokens. Greedy search has no end token.
    options = dict(num_beams=BEAMS, length_penalty=1.0) if seq2seq else {"eos_token_id": 10**6}
    plain = transformers.GenerationConfig(**(ids | options), max_new_tokens=STEPS, do_sample=False)
    model.generation_config = transformers.GenerationConfig(**ids)  # else its own settings are defaults
    with torch.no_grad():
        if seq2seq:
            logits = model(input_ids=source, decoder_input_ids=target).logits
            found = model.generate(source, generation_config=plain)[:, 1:]
        else:
            logits = model(source).logits
            prompts = source[:, :8]
            found = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=plain)[:, 8:]
    if not seq2seq:
        return {"logits": logits.numpy(), "greedy": found.tolist()}
    end = config["eos_token_id"]
    return {"logits": logits.numpy(), "search": [row[: [*row, end].index(end)] for row in found.tolist()]}


def main() -> None:
    from tempfile import TemporaryDirectory

    from safetensors.numpy import load_file

    GOLDEN.mkdir(exist_ok=True)
    for name in sys.argv[1:] or CASES:
        with TemporaryDirectory() as directory:
            model = transformers_model(name, Path(directory))
            shapes = {key: list(value.shape) for key, value in load_file(f"{directory}/model.safetensors").items()}
            config = json.loads(Path(directory, "config.json").read_text())
        out = outputs(model)
        digits = np.round(out.pop("logits")[:, ::4].astype(np.float64), 5).tolist()
        golden = {"config": config, "tensors": dict(sorted(shapes.items())), "logits": digits, **out}
        (GOLDEN / f"{name}.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")
        print(name, (GOLDEN / f"{name}.json").stat().st_size, "bytes", out)


if __name__ == "__main__":
    main()
