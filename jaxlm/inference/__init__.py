"""Text from trained models: generation, translation, beam search, and an engine that serves many requests at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.inference.beam import Hypothesis
    from jaxlm.inference.decoding import beam_tokens, generate_tokens
    from jaxlm.inference.detokenizer import Detokenizer
    from jaxlm.inference.engine.constraints import Constraint
    from jaxlm.inference.engine.engine import Engine
    from jaxlm.inference.engine.options import EngineOptions
    from jaxlm.inference.engine.requests import Event, Request, Stats, TokenLogprob
    from jaxlm.inference.generation import generate
    from jaxlm.inference.generation_config import GenerationConfig
    from jaxlm.inference.logits_processors import LogitsProcessors
    from jaxlm.inference.protocol import InferenceModel
    from jaxlm.inference.sampling import Sampling
    from jaxlm.inference.translation import (
        decoder_start_token,
        generation_for_language,
        search_translations,
        translate,
        translate_tokens,
    )
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, beam="Hypothesis", decoding="beam_tokens generate_tokens", detokenizer="Detokenizer",
        engine__constraints="Constraint", engine__engine="Engine", engine__options="EngineOptions",
        engine__requests="Event Request Stats TokenLogprob", generation="generate",
        generation_config="GenerationConfig", logits_processors="LogitsProcessors", protocol="InferenceModel",
        sampling="Sampling",
        translation="decoder_start_token generation_for_language search_translations translate translate_tokens",
    )
