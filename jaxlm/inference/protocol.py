"""What generation needs of a model. ``jaxlm.model.LM`` has it, and so has anything else with these five attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from flax import nnx

from jaxlm.core.tree import Params
from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.nn.config import ModelConfig

if TYPE_CHECKING:
    from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["InferenceModel"]


class InferenceModel(Protocol):
    """A language or translation model: ``nnx.merge(graphdef, params)`` computes with it."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def graphdef(self) -> nnx.GraphDef: ...

    @property
    def params(self) -> Params: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def generation(self) -> GenerationConfig: ...
