"""An experiment as data: everything ``jaxlm train`` needs, in one frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxlm.compression.steps import BLOCKS
from jaxlm.data.config import DataConfig
from jaxlm.nn.config import DecoderConfig, LSTMConfig, ModelConfig, Seq2SeqConfig

__all__ = ["DataConfig", "DecoderConfig", "DistillConfig", "DpoConfig", "EvalConfig", "Experiment", "LSTMConfig",
           "LoraConfig", "MeshConfig", "OptimConfig", "PrivacyConfig", "PruneConfig", "QatConfig", "Seq2SeqConfig",
           "TrainConfig"]


@dataclass(frozen=True)
class OptimConfig:
    """An optimizer and the shape of its learning rate."""

    name: Literal["adamw", "adamw8bit", "adafactor", "lion", "muon"] = "adamw"  # see ``training.optimizers.optimizer``
    lr: float = 1e-3  # the peak
    schedule: Literal["cosine", "inverse_sqrt", "wsd", "linear", "constant"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # wsd: the last part of training, spent decaying
    min_lr_ratio: float = 0.0  # final over peak (cosine, linear, wsd)
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decayed: str = r"(.*/)?(kernel|table)(/[ab])?"  # a regular expression: which are; by default no norms and biases
    clip_norm: float = 1.0  # 0: off


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 1000
    accumulate: int = 1  # micro-batches a step
    label_smoothing: float = 0.0
    z_loss: float = 0.0  # weight of log(Z)^2 (arXiv:2204.02311, section 5)
    router_balance: float = 0.01  # of experts: weight of the loss that evens their load (arXiv:2101.03961, equation 4)
    router_z: float = 0.001  # ... and of log(Z)^2 of their routers (arXiv:2202.08906, equation 5)
    log_every: int = 20
    eval_every: int = 200  # validation, in steps; 0: never
    checkpoint_every: int = 200  # 0: only at the end
    keep_latest: int = 1
    keep_best: int = 1
    patience: int = 0  # evaluations without improvement before stopping; 0: never stop
    ema: float = 0.0  # decay of a moving average of the weights, which is then validated and exported; 0: off
    average: int = 0  # export the mean of this many best checkpoints (arXiv:1706.03762, 6.1); 0 or 1: the best one
    on_nan: Literal["abort", "skip"] = "abort"
    spike_factor: float = 0.0  # a gradient norm this many times its running mean counts as a NaN; 0: off
    seed: int = 0


@dataclass(frozen=True)
class EvalConfig:
    metric: Literal["loss", "bleu"] = "loss"  # decides which checkpoint is best
    batches: int = 0  # of validation data; 0: all
    beam: int = 5  # this and the rest: of the translations that "bleu" needs
    length_penalty: float = 1.0
    max_length: int = 128  # generated tokens
    bleu_sentences: int = 0  # validation pairs translated; 0: all


@dataclass(frozen=True)
class QatConfig:
    """Training with the weights as a recipe compresses them, through straight-through gradients."""

    recipe: str = ""  # such as w4a16-rtn-g64, w8a8-dynamic or 2:4-magnitude+w4a16-rtn-g64; "": off
    begin: int = 0  # the first step that uses the compressed weights
    decay: float = 2e-4  # pulls what the recipe prunes towards zero (SR-STE, arXiv:2102.04010)


@dataclass(frozen=True)
class PruneConfig:
    """Training with ever more weights, or ever other ones, fixed at zero. Steps are counted by updates, from 0."""

    method: Literal["gradual", "rigl"] = "gradual"  # arXiv:1710.01878; arXiv:1911.11134
    sparsity: float = 0.0  # the share of zeros at the end (rigl: always); 0: off
    begin: int = 0  # the first update after which weights are pruned
    end: int = 0  # the last one at which it changes which; 0: three quarters of train.steps
    every: int = 100  # updates from change to change
    drop: float = 0.3  # rigl: the share of the weights exchanged at first, falling to 0 along a cosine
    distribution: Literal["uniform", "erdos_renyi"] = "uniform"  # over the matrices
    target: str = BLOCKS  # a regular expression


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen model (arXiv:2106.09685), which may be compressed first (QLoRA,
    arXiv:2305.14314)."""

    rank: int = 0  # 0: off
    alpha: float = 16.0  # the adapter counts alpha / rank
    rslora: bool = False  # ... or alpha / sqrt(rank) (arXiv:2312.03732)
    dropout: float = 0.0  # of what adapters read
    target: str = BLOCKS  # a regular expression: which parameters have one
    dora: bool = False  # magnitudes of columns are trained too (arXiv:2402.09353)
    base: str = "float32"  # what is frozen: float32, bfloat16, or a recipe such as nf4 or w4a16-rtn-g64
    merge: bool = False  # RUN/model is written besides RUN/adapter, with the adapter merged into the frozen weights


@dataclass(frozen=True)
class DistillConfig:
    """Learning from another model (arXiv:1503.02531)."""

    teacher: str = ""  # a MODEL with the same vocabulary; "": off
    weight: float = 0.5  # of the teacher's distribution; the rest is that of the data
    temperature: float = 2.0  # of both models' logits
    hidden: float = 0.0  # weight of the mean squared difference of the layers' outputs (arXiv:1909.10351)
    hidden_layers: tuple[int, ...] = ()  # of the teacher's, one for each of the student's, from 1; (): evenly spread


@dataclass(frozen=True)
class DpoConfig:
    """Direct preference optimization (arXiv:2305.18290) on pairs of answers."""

    beta: float = 0.0  # 0: off; 0.1 is usual
    label_smoothing: float = 0.0  # the share of pairs that may be the wrong way round (conservative DPO)
    loss: Literal["sigmoid", "ipo"] = "sigmoid"  # arXiv:2305.18290, equation 7; arXiv:2310.12036, equation 17


@dataclass(frozen=True)
class PrivacyConfig:
    """DP-SGD (arXiv:1607.00133): the gradient of each row is clipped, and their sum gets noise."""

    noise_multiplier: float = 0.0  # the noise's standard deviation over clip_norm; 0: off
    clip_norm: float = 1.0  # of the gradient of a row
    delta: float = 1e-5  # epsilon is reported for it


@dataclass(frozen=True)
class MeshConfig:
    """How devices share the work. A size of 0 is what the preset makes it (``core.sharding.mesh_sizes``); one size may
    be -1: whatever is left."""

    data: int = 0  # rows; every device holds all of the model
    fsdp: int = 0  # rows, and the model's weights (ZeRO-3)
    tensor: int = 0  # heads, feed-forward and vocabulary (Megatron)
    sequence: int = 0  # tokens of a row
    stage: int = 0  # layers, in a pipeline
    expert: int = 0  # rows, and experts
    preset: Literal["ddp", "fsdp", "fsdp+tp", "3d", "moe"] = "ddp"
    rules: tuple[str, ...] = ()  # where parameters lie: "embed/table=tensor+fsdp -" (``core.sharding.override_sharding``)
    shard_optimizer: bool = True  # its moments over the data axis too (ZeRO-1, arXiv:1910.02054)
    offload_optimizer: bool = False  # its moments in the memory of the host, between updates
    compress_gradients: Literal["none", "bf16", "int8"] = "none"  # summed over the data axis (``training.multihost.reduce``)

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are not left to the preset, and 0 for the others."""
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor, "sequence": self.sequence,
                "stage": self.stage, "expert": self.expert}


@dataclass(frozen=True)
class Experiment:
    model: ModelConfig | None = None  # None: that of init_from
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    init_from: str = ""  # a MODEL whose parameters training starts from, and whose tokenizer it uses
    lora: LoraConfig = field(default_factory=LoraConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
