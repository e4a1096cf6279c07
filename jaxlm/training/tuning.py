"""How a model that exists is trained on: the parts of an experiment for fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxlm.compression.steps import BLOCKS

__all__ = ["DistillConfig", "DpoConfig", "LoraConfig", "PrivacyConfig"]


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
