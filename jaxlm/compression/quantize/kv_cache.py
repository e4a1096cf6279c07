"""A quantized cache of keys and values while decoding."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxlm.compression.calibration import Calibration
from jaxlm.compression.steps import ModelStep
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params
from jaxlm.nn.config import ModelConfig

__all__ = ["QuantizeCache"]


@dataclass(frozen=True)
class QuantizeCache(ModelStep):
    """Keeps keys and values in ``format`` while decoding; see ``nn.attention.kv_cache``. Weights stay as they are."""

    kind: ClassVar[str] = "kv_cache"
    format: Literal["int8", "int4", "fp8"]

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration | None, notes: list[str]
    ) -> tuple[ModelConfig, Params]:
        if config.kind == "lstm":
            raise UserError("an LSTM has no cache of keys and values")
        return dataclasses.replace(config, kv_cache=self.format), params
