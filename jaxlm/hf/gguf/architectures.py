"""The model architectures of llama.cpp that are written: how it names their tensors, and what it cannot do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.nn.config import DecoderConfig

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp, as a renaming of a Hugging Face family.

    - ``name`` is llama.cpp's name, ``model_type`` the Hugging Face family.
    - ``layer_prefix`` starts the names of tensors in layers; ``outer`` and ``inner`` map modules outside and inside
      layers to llama.cpp's names.
    - ``interleaved_rope``: neighbouring dimensions of a head are rotated together, not those of its two halves.
    """

    name: str
    model_type: str
    layer_prefix: str
    outer: Mapping[str, str]
    inner: Mapping[str, str]
    interleaved_rope: bool = False

    def tensor_name(self, hf_name: str) -> str:
        """llama.cpp's name of a tensor of the family."""
        module, part = hf_name.rsplit(".", 1)
        if module in self.outer:
            return f"{self.outer[module]}.{part}"
        layer, module = module.removeprefix(self.layer_prefix).split(".", 1)
        return f"blk.{layer}.{self.inner[module]}.{part}"

    def check(self, config: DecoderConfig) -> None:
        """Checks that llama.cpp can run a model of the Hugging Face family.

        Raises:
            UserError: it cannot; the message names the field.
        """
        activation = "gelu_tanh" if self.name == "gpt2" else "swiglu"
        if config.activation != activation:
            raise UserError(f"llama.cpp's {self.name} has the activation {activation!r}, not {config.activation!r}")
        if any(config.windows):
            raise UserError(f"windows is {config.windows}, which llama.cpp's {self.name} does not support")
        if config.attention_scale and not math.isclose(config.attention_scale, config.d_head**-0.5, rel_tol=1e-6):
            raise UserError(
                f"attention_scale is {config.attention_scale}, which llama.cpp's {self.name} does not support"
            )
        if config.attention_scale_by_layer:
            raise UserError(f"attention_scale_by_layer is true, which llama.cpp's {self.name} does not support")
        scaling = config.rope_scaling
        written = ("none", "linear", "llama3", "yarn") if self.interleaved_rope else ("none",)
        if config.positions == "rotary" and (scaling.method not in written or scaling.attention_factor != 1.0):
            raise UserError(f"rope_scaling of the type {scaling.method} is not written for llama.cpp's {self.name}")

    def metadata(self, config: DecoderConfig) -> dict[str, Any]:
        """The key-value pairs that describe a model of this architecture."""
        sizes: dict[str, Any] = {
            "context_length": config.max_positions, "embedding_length": config.width, "block_count": config.layers,
            "feed_forward_length": config.d_ffn, "attention.head_count": config.heads,
            "vocab_size": config.vocab_size,
        }
        if self.name == "gpt2":
            sizes |= {"attention.layer_norm_epsilon": float(config.norm_eps)}
        else:
            sizes |= {
                "attention.head_count_kv": config.n_kv_heads, "attention.key_length": config.d_head,
                "attention.value_length": config.d_head, "rope.dimension_count": config.d_head,
                "rope.freq_base": float(config.rope_theta),
                "attention.layer_norm_rms_epsilon": float(config.norm_eps),
            }
        return {f"{self.name}.{key}": value for key, value in sizes.items()}


_LLAMA_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LLAMA_INNER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"}, "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
# A model is written as the first of these that can hold it.
ARCHITECTURES = (
    Architecture("llama", "llama", "model.layers.", _LLAMA_OUTER, _LLAMA_INNER, interleaved_rope=True),
    Architecture(
        "qwen3", "qwen3", "model.layers.", _LLAMA_OUTER,
        _LLAMA_INNER | {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"},
    ),
    Architecture(
        "gpt2", "gpt2", "transformer.h.",
        {"transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
         "lm_head": "output"},
        {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
         "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    ),
)
