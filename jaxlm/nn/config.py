"""The configuration of models: three frozen dataclasses (decoder, encoder-decoder, LSTM) and presets of them."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Literal

Activation = Literal[
    "gelu", "gelu_tanh", "relu", "relu2", "silu", "tanh", "xielu", "swiglu", "geglu", "geglu_tanh", "reglu",
    "clamped_swiglu",
]
Positions = Literal["rotary", "sinusoidal", "sinusoidal_t2t", "learned", "relative", "none"]
KVCache = Literal["full", "int8", "int4", "fp8"]
QKNorm = Literal["none", "head", "each_head", "width"]
NormPosition = Literal["pre", "post", "output", "sandwich"]
Remat = Literal["none", "full", "dots", "offload", "offload_dots"]
Side = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies change for contexts longer than that of pre-training; see ``nn.positions``."""

    method: Literal["none", "linear", "dynamic", "yarn", "llama3", "longrope"] = "none"
    factor: float = 1.0
    original_positions: int = 0  # the context of pre-training (yarn, llama3, longrope)
    attention_factor: float = 1.0  # multiplies queries and keys (yarn, longrope)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()  # longrope: a divisor for each frequency, up to the original context
    long_factor: tuple[float, ...] = ()  # longrope: the divisors beyond the original context


class _Model:
    """What code asks of the configuration of any model.

    The answers here are those of a model without attention; ``StackConfig`` has fields or properties of these names.
    """

    kind: str
    vocab_size: int
    layers: int
    experts: int
    remat: Remat
    positions: Positions

    @property
    def sides(self) -> tuple[Side, ...]:
        """The Transformer stacks of the model, in the order they run."""
        return ()

    @property
    def num_layers(self) -> int:
        """Layers of all stacks together."""
        return self.layers

    @property
    def context_length(self) -> int | None:
        """The longest sequence that the model is made for; None: no limit is known."""
        return None

    @property
    def position_limit(self) -> int | None:
        """The longest sequence that the model can read at all: the rows of a learned position table. None: no limit."""
        return None

    @property
    def rotates_by_length(self) -> bool:
        """Whether rotations depend on the length of the whole text, so that a longer text is another one from its first
        token on; see ``nn.positions.rotary_length``."""
        return False

    @property
    def source_vocab_size(self) -> int:
        """Rows of the embedding table of the source side."""
        return self.vocab_size

    @property
    def offloads_activations(self) -> bool:
        """Whether training keeps activations in the memory of the host."""
        return self.remat.startswith("offload")


@dataclass(frozen=True)
class StackConfig(_Model):
    """The settings that decoders, encoders and encoder-decoders have in common.

    Sizes are counts; 0 means "derive": ``kv_heads`` = ``heads``, ``head_dim`` = ``width // heads``,
    ``ffn`` = ``4 * width``. ``vocab_size`` 0 is filled from the tokenizer when training starts.
    """

    vocab_size: int = 0
    width: int = 512
    heads: int = 8
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_position: NormPosition = "pre"  # see ``nn.block.Block``
    parallel: bool = False  # attention and MLP read the same input (arXiv:2204.06745, section 2.1)
    shared_norm: bool = False  # they read it through one norm (parallel layers only)
    norm_scale: bool = True  # whether norms have a learned scale (OLMo, arXiv:2402.00838, section 2.1, has none)
    norm_bias: bool = True  # LayerNorm only
    norm_eps: float = 1e-5
    embed_norm: bool = False  # a norm right after the embedding
    activation: Activation = "swiglu"
    swiglu_alpha: float = 1.702  # clamped_swiglu: (up + 1) * gate * sigmoid(alpha * gate), up and gate at most limit
    swiglu_limit: float = 7.0
    positions: Positions = "rotary"
    max_positions: int = 2048  # rows of a learned table; the advertised context elsewhere
    position_offset: int = 0  # rows skipped at the start of a learned or sinusoidal table
    rope_theta: float = 10000.0
    rope_local_theta: float = 0.0  # in layers with a window, without scaling; 0: as in the others (arXiv:2503.19786)
    rope_scaling: RopeScaling = RopeScaling()
    rotary_fraction: float = 1.0  # the share of each head's dimensions that is rotated, from the first on
    rope_interleaved: bool = False  # rotates neighbouring dimensions instead of the halves of a head (``nn.positions``)
    nope_layers: tuple[int, ...] = ()  # layers without rotary positions (arXiv:2501.18795)
    relative_buckets: int = 32  # T5 (arXiv:1910.10683, section 2.1)
    relative_max_distance: int = 128
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    clip_qkv: float = 0.0  # queries, keys and values are clipped to [-c, c]; 0: off
    qk_norm: QKNorm = "none"  # of queries and keys (arXiv:2302.05442): see ``nn.attention.layer``
    qk_norm_after_rope: bool = False
    attention_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    attention_scale_by_layer: bool = False  # logits are also divided by the layer's number, counted from 1
    attention_temperature: float = 0.0  # 0: off; t: queries times 1 + t * log(1 + position // temperature_interval)
    temperature_interval: int = 8192
    attention_softcap: float = 0.0  # 0: off; c * tanh(logits / c) (arXiv:2408.00118)
    attention_sinks: bool = False  # a learned logit of each query head, whose value is 0 (gpt-oss)
    ring_min_keys: int = 8192  # the fewest keys for which split sequences use ring attention (``nn.attention.ring``)
    logit_softcap: float = 0.0
    embedding_multiplier: float = 1.0  # of embeddings, besides ``embed_scale``
    residual_multiplier: float = 1.0  # of what attention and MLP add to the residual stream
    logits_multiplier: float = 1.0
    windows: tuple[int, ...] = ()  # sliding windows, cycled over layers; 0 is full attention
    experts: int = 0  # of mixture-of-experts MLPs (``nn.moe.layer``); 0: dense MLPs
    experts_per_token: int = 2
    expert_ffn: int = 0  # 0: d_ffn
    expert_renormalize: bool = True  # the weights of a token's experts sum to 1: as softmax after the choice
    expert_bias: bool = False  # of the linear maps of experts
    scale_expert_inputs: bool = False  # the weights multiply what experts read, not what they write (Llama 4)
    router_scores: Literal["softmax", "sigmoid"] = "softmax"  # of all experts
    router_bias: bool = False
    correction_bias: bool = False  # added to the scores for the choice alone (arXiv:2408.15664)
    n_group: int = 1  # groups of experts; a token goes to experts of topk_group groups (arXiv:2405.04434, 2412.19437)
    topk_group: int = 1
    routed_scaling_factor: float = 1.0  # multiplies the weights
    shared_expert_ffn: int = 0  # channels of the experts that all tokens go to, together (arXiv:2401.06066); 0: none
    shared_expert_gate: bool = False  # their output is multiplied by a sigmoid of the input (Qwen 2)
    expert_routing: Literal["dropless", "capacity"] = "dropless"  # see ``nn.moe.routing``
    capacity_factor: float = 1.25  # slots of an expert, as a multiple of its even share of a group's tokens
    dense_layers: tuple[int, ...] = ()  # layers with a dense MLP in a model with experts
    embed_scale: bool = False  # multiply embeddings by sqrt(width)
    tie_embeddings: bool = True
    logits_bias: bool = False
    dropout: float = 0.0  # after embedding, attention and MLP
    attention_dropout: float = 0.0
    ffn_dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters stay float32
    kv_cache: KVCache = "full"  # the format of cached keys and values: see ``nn.attention.quantized_kv``
    scan_layers: bool = True
    remat: Remat = "none"  # what is kept for the backward pass: see ``nn.remat``
    microbatches: int = 0  # of a batch, on a mesh with pipeline stages; 0: as many as stages
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    @property
    def n_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def d_head(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def d_ffn(self) -> int:
        return self.ffn or 4 * self.width

    @property
    def d_expert(self) -> int:
        return self.expert_ffn or self.d_ffn

    @property
    def d_rotary(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.d_head * self.rotary_fraction)

    @property
    def rotates_by_length(self) -> bool:
        return self.positions == "rotary" and self.rope_scaling.method in ("dynamic", "longrope")

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu", "geglu_tanh", "reglu", "clamped_swiglu")

    @property
    def context_length(self) -> int:
        return self.max_positions

    @property
    def position_limit(self) -> int | None:
        return self.max_positions if self.positions == "learned" else None

    def has_experts(self, layer: int) -> bool:
        """Whether the MLP of this layer is a mixture of experts."""
        return self.experts > 0 and layer not in self.dense_layers


@dataclass(frozen=True)
class DecoderConfig(StackConfig):
    """A decoder-only language model."""

    kind: Literal["decoder"] = "decoder"
    layers: int = 6
    layer_groups: tuple[int, ...] = ()  # the lengths of its layer groups (``layer_groups_of``); (): as few as possible

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("decoder",)

    def side(self, side: Side) -> StackConfig:
        """The configuration of a stack."""
        return self

    def side_layers(self, side: Side) -> int:
        """Layers of a stack."""
        return self.layers

    def side_layer_groups(self, side: Side) -> tuple[int, ...]:
        """The field ``layer_groups`` of a stack."""
        return self.layer_groups


@dataclass(frozen=True)
class Seq2SeqConfig(StackConfig):
    """An encoder-decoder model. Sizes hold for both stacks, unless the decoder has its own."""

    kind: Literal["seq2seq"] = "seq2seq"
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_layer_groups: tuple[int, ...] = ()  # as ``DecoderConfig.layer_groups``
    decoder_layer_groups: tuple[int, ...] = ()
    decoder_heads: int = 0  # 0: as the encoder
    decoder_ffn: int = 0
    src_vocab_size: int = 0  # 0: one vocabulary and one embedding for both sides

    @property
    def encoder(self) -> StackConfig:
        return dataclasses.replace(self, kv_cache="full")  # an encoder has no cache

    @property
    def decoder(self) -> StackConfig:
        heads, ffn = self.decoder_heads or self.heads, self.decoder_ffn or self.ffn
        return dataclasses.replace(self, heads=heads, head_dim=self.head_dim, ffn=ffn)

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("encoder", "decoder")

    def side(self, side: Side) -> StackConfig:
        """The configuration of a stack."""
        return self.encoder if side == "encoder" else self.decoder

    def side_layers(self, side: Side) -> int:
        """Layers of a stack."""
        return self.encoder_layers if side == "encoder" else self.decoder_layers

    def side_layer_groups(self, side: Side) -> tuple[int, ...]:
        """The field ``encoder_layer_groups`` or ``decoder_layer_groups``."""
        return self.encoder_layer_groups if side == "encoder" else self.decoder_layer_groups

    @property
    def num_layers(self) -> int:
        return self.encoder_layers + self.decoder_layers

    @property
    def source_vocab_size(self) -> int:
        return self.src_vocab_size or self.vocab_size


@dataclass(frozen=True)
class LSTMConfig(_Model):
    """A recurrent language model: the baseline (Hochreiter & Schmidhuber 1997; Merity et al., arXiv:1708.02182)."""

    kind: Literal["lstm"] = "lstm"
    vocab_size: int = 0
    width: int = 512  # of the embedding
    hidden: int = 0  # 0: width
    layers: int = 2
    tie_embeddings: bool = True
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    @property
    def d_hidden(self) -> int:
        return self.hidden or self.width

    @property
    def experts(self) -> int:
        return 0

    @property
    def remat(self) -> Remat:
        return "none"

    @property
    def positions(self) -> Positions:
        return "none"


ModelConfig = DecoderConfig | Seq2SeqConfig | LSTMConfig
KINDS: dict[str, type] = {"decoder": DecoderConfig, "seq2seq": Seq2SeqConfig, "lstm": LSTMConfig}


def layer_groups_of(config: DecoderConfig | Seq2SeqConfig, side: Side) -> list[range]:
    """The layers of each layer group of a stack.

    A layer group is a run of consecutive layers whose parameters have the same shapes and representations. They are
    stacked in arrays with a leading layer dimension. Without ``layer_groups`` in the configuration there are as few
    groups as layers with and without experts allow.
    """
    counts = config.side_layer_groups(side)
    if not counts:
        kinds = [config.has_experts(layer) for layer in range(config.side_layers(side))]
        counts = tuple(len(list(run)) for _, run in itertools.groupby(kinds))
    ends = itertools.accumulate(counts)
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


_TRANSLATION = Seq2SeqConfig(
    norm="layernorm", activation="relu", positions="sinusoidal_t2t", position_offset=1, embed_scale=True,
    qkv_bias=True, out_bias=True, mlp_bias=True, dropout=0.1, max_positions=1024,
)  # Vaswani et al. 2017 (arXiv:1706.03762), pre-norm (arXiv:2002.04745), with the positions of M2M-100 to export as one
_LLAMA = DecoderConfig(tie_embeddings=False)

PRESETS: dict[str, ModelConfig] = {
    # translation Transformers
    "tiny": dataclasses.replace(
        _TRANSLATION, width=128, heads=4, ffn=256, encoder_layers=4, decoder_layers=4, dropout=0.3
    ),
    "base": dataclasses.replace(_TRANSLATION, width=512, heads=8, ffn=2048),
    "big": dataclasses.replace(_TRANSLATION, width=1024, heads=16, ffn=4096, dropout=0.3),
    # decoder-only language models
    "nano": DecoderConfig(
        width=128, heads=4, layers=4, norm="layernorm", norm_bias=False, activation="gelu", positions="learned",
        max_positions=64, scan_layers=False,
    ),
    "124m": DecoderConfig(
        width=768, heads=12, layers=12, norm="layernorm", activation="gelu_tanh", positions="learned",
        max_positions=1024, qkv_bias=True, out_bias=True, mlp_bias=True, vocab_size=50257,
    ),
    "1b": dataclasses.replace(
        _LLAMA, width=2048, heads=32, kv_heads=8, ffn=8192, layers=16, rope_theta=500000.0, tie_embeddings=True,
        vocab_size=128256, max_positions=131072, remat="full", dtype="bfloat16",
    ),
    "7b": dataclasses.replace(
        _LLAMA, width=4096, heads=32, ffn=11008, layers=32, vocab_size=32000, max_positions=4096, remat="full",
        dtype="bfloat16",
    ),
    "70b": dataclasses.replace(
        _LLAMA, width=8192, heads=64, kv_heads=8, ffn=28672, layers=80, vocab_size=32000, max_positions=4096,
        remat="full", dtype="bfloat16",
    ),  # Llama 2 (arXiv:2307.09288), as "7b"
    "8x7b": dataclasses.replace(
        _LLAMA, width=4096, heads=32, kv_heads=8, ffn=14336, layers=32, experts=8, rope_theta=1e6, vocab_size=32000,
        max_positions=32768, remat="full", dtype="bfloat16",
    ),  # Mixtral (arXiv:2401.04088)
}


def preset(name: str, **changes) -> ModelConfig:
    """The named preset with fields replaced: ``preset("tiny", vocab_size=8000)``.

    Raises:
        KeyError: when there is no preset of this name.
    """
    return dataclasses.replace(PRESETS[name], **changes)
