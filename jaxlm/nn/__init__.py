"""Models: Flax NNX modules for the structure, and the parameters as a tree beside it.

``graphdef, params = nn.build(config, key)``, and ``nnx.merge(graphdef, params)`` is the model, inside ``jit`` or out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.nn.config import (
        PRESETS,
        DecoderConfig,
        LSTMConfig,
        ModelConfig,
        RopeScaling,
        Seq2SeqConfig,
        StackConfig,
        layer_groups_of,
        preset,
    )
    from jaxlm.nn.decoder import DecoderLM
    from jaxlm.nn.layerwise import LayerwiseModel
    from jaxlm.nn.models import abstract, build, initializer, single_layers, unstack_layers
    from jaxlm.nn.recurrent import LSTMLM
    from jaxlm.nn.seq2seq import Seq2Seq
else:  # imported at first use, so that the configuration of a model is read without Flax
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        config="PRESETS DecoderConfig LSTMConfig ModelConfig RopeScaling Seq2SeqConfig StackConfig layer_groups_of "
        "preset",
        decoder="DecoderLM", layerwise="LayerwiseModel", recurrent="LSTMLM", seq2seq="Seq2Seq",
        models="abstract build initializer single_layers unstack_layers",
    )
