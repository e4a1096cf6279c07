"""The configuration of a training: an ``Experiment`` and its sections, as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxlm.compression.steps import LAYER_KERNELS
from jaxlm.data.config import DataConfig
from jaxlm.nn.config import DecoderConfig, LSTMConfig, ModelConfig, Seq2SeqConfig

__all__ = ["DataConfig", "DecoderConfig", "DistillConfig", "DpoConfig", "EvalConfig", "Experiment", "LSTMConfig",
           "LoraConfig", "MeshConfig", "OptimConfig", "PrivacyConfig", "PruneConfig", "QatConfig", "Seq2SeqConfig",
           "TrainConfig"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion", "muon"] = "adamw"  # see ``training.optimizers.optimizer``
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["cosine", "inverse_sqrt", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # wsd: the last share of the steps, in which it decays
    min_lr_ratio: float = 0.0  # final learning rate / peak (cosine, linear, wsd)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decayed: str = r"(.*/)?(kernel|table)(/[ab])?"  # pattern of the paths that decay
    clip_norm: float = 1.0  # 0: off


@dataclass(frozen=True)
class TrainConfig:
    """The steps of a training, and what happens between them."""

    steps: int = 1000
    accumulate: int = 1  # micro-batches per step
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # weight of log(Z)^2 (arXiv:2204.02311, section 5)
    router_balance: float = 0.01  # weight of the loss that balances the load of experts (arXiv:2101.03961, equation 4)
    router_z: float = 0.001  # weight of log(Z)^2 of the routers of experts (arXiv:2202.08906, equation 5)
    log_every: int = 20
    eval_every: int = 200  # steps between validations; 0: never
    checkpoint_every: int = 200  # steps; 0: only at the end
    keep_latest: int = 1
    keep_best: int = 1
    patience: int = 0  # stop after this many validations without improvement; 0: never
    ema: float = 0.0  # decay of a moving average of the weights, which is validated and exported; 0: off
    average: int = 0  # export the mean of this many best checkpoints (arXiv:1706.03762, 6.1); 0 or 1: the best one
    on_nan: Literal["abort", "skip"] = "abort"
    spike_factor: float = 0.0  # a gradient norm this many times its running mean counts as a NaN; 0: off
    seed: int = 0


@dataclass(frozen=True)
class EvalConfig:
    """Validation during training."""

    metric: Literal["loss", "bleu"] = "loss"  # selects the best checkpoint
    batches: int = 0  # validation batches; 0: all
    beam: int = 5  # this field and those below: the translations for "bleu"
    length_penalty: float = 1.0
    max_length: int = 128  # generated tokens
    bleu_sentences: int = 0  # validation pairs translated; 0: all


@dataclass(frozen=True)
class QatConfig:
    """Quantization-aware training: with weights as a recipe compresses them, and straight-through gradients."""

    recipe: str = ""  # such as w4a16-rtn-g64, w8a8-dynamic or 2:4-magnitude+w4a16-rtn-g64; "": off
    begin: int = 0  # the first step that uses the compressed weights
    decay: float = 2e-4  # extra weight decay of the weights that the recipe prunes (SR-STE, arXiv:2102.04010)


@dataclass(frozen=True)
class PruneConfig:
    """Training with a growing or changing set of weights fixed at zero. Steps are updates, counted from 0."""

    method: Literal["gradual", "rigl"] = "gradual"  # arXiv:1710.01878; arXiv:1911.11134
    sparsity: float = 0.0  # the share of zeros at the end (rigl: throughout); 0: off
    begin: int = 0  # the first update after which weights are pruned
    end: int = 0  # the last update after which the set of zeros changes; 0: three quarters of train.steps
    every: int = 100  # updates between changes
    drop: float = 0.3  # rigl: the share of weights exchanged at the first change; falls to 0 along a cosine
    distribution: Literal["uniform", "erdos_renyi"] = "uniform"  # of the zeros over the matrices
    target: str = LAYER_KERNELS  # regular expression of the paths that are pruned


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen model (arXiv:2106.09685) that may be compressed (QLoRA, arXiv:2305.14314)."""

    rank: int = 0  # 0: off
    alpha: float = 16.0  # the adapter is multiplied by alpha / rank
    rslora: bool = False  # ... or alpha / sqrt(rank) (arXiv:2312.03732)
    dropout: float = 0.0  # of the inputs of adapters
    target: str = LAYER_KERNELS  # regular expression of the parameters that get an adapter
    dora: bool = False  # also train magnitudes of columns (arXiv:2402.09353)
    base: str = "float32"  # the frozen weights: float32, bfloat16, or a recipe such as nf4 or w4a16-rtn-g64
    merge: bool = False  # also write RUN/model, with the adapter merged into the frozen weights


@dataclass(frozen=True)
class DistillConfig:
    """Distillation: learning from another model (arXiv:1503.02531)."""

    teacher: str = ""  # a MODEL with the same vocabulary; "": off
    weight: float = 0.5  # weight of the teacher's distribution; the rest is the weight of the data
    temperature: float = 2.0  # of both models' logits
    hidden: float = 0.0  # weight of the mean squared difference of the layers' outputs (arXiv:1909.10351)
    hidden_layers: tuple[int, ...] = ()  # the teacher's layer for each of the student's, from 1; (): evenly spaced


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimization (arXiv:2305.18290) on pairs of answers."""

    beta: float = 0.0  # 0: off; 0.1 is usual
    label_smoothing: float = 0.0  # the share of pairs with a wrong preference (conservative DPO)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # arXiv:2305.18290, equation 7; arXiv:2310.12036, equation 17


@dataclass(frozen=True)
class PrivacyConfig:
    """DP-SGD (arXiv:1607.00133): the gradient of each row is clipped, and noise is added to their sum."""

    noise_multiplier: float = 0.0  # standard deviation of the noise / clip_norm; 0: off
    clip_norm: float = 1.0  # of the gradient of a row
    delta: float = 1e-5  # epsilon is reported for this delta


@dataclass(frozen=True)
class MeshConfig:
    """How devices share the work. A size of 0 is set by the preset (``core.sharding.mesh_sizes``); one size may be -1:
    all remaining devices."""

    data: int = 0  # splits rows; each device holds all weights
    fsdp: int = 0  # splits rows and weights (ZeRO-3)
    tensor: int = 0  # splits heads, feed-forward and vocabulary (Megatron)
    sequence: int = 0  # splits the tokens of a row
    stage: int = 0  # splits layers, as a pipeline
    expert: int = 0  # splits rows and experts
    preset: Literal["ddp", "fsdp", "fsdp+tp", "3d", "moe"] = "ddp"
    rules: tuple[str, ...] = ()  # "embed/table=tensor+fsdp -": see ``core.sharding.override_sharding``
    shard_optimizer: bool = True  # split optimizer moments over the data axis too (ZeRO-1, arXiv:1910.02054)
    offload_optimizer: bool = False  # keep optimizer moments in host memory between updates
    compress_gradients: Literal["none", "bf16", "int8"] = "none"  # in the all-reduce over the data axis

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each axis; 0 where the preset sets it."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "sequence": self.sequence,
                "stage": self.stage, "expert": self.expert}


@dataclass(frozen=True)
class Experiment:
    """Everything that ``jaxlm train`` needs."""

    model: ModelConfig | None = None  # None: the model of init_from
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init_from: str = ""  # a MODEL; training starts from its parameters and uses its tokenizer
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
