"""Smaller models: recipes of quantization, pruning and low rank; fitting to a budget; the same in training.

    from jaxlm.compression import Gptq, Recipe

    small = jaxlm.compress(lm, Recipe((Gptq(bits=4, group=128),)), calibrate="builtin:phrasebook")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerwiseModel, solve_layers
    from jaxlm.compression.low_rank import Factorize
    from jaxlm.compression.names import NAMES, load_recipe, parse
    from jaxlm.compression.platforms import lower_for_platform
    from jaxlm.compression.prune.depth import DropLayers
    from jaxlm.compression.prune.scores import Magnitude, NofM, Wanda, magnitude, n_of_m
    from jaxlm.compression.prune.sparsegpt import SparseGpt
    from jaxlm.compression.prune.structured import StructuredPrune
    from jaxlm.compression.quantize.activations import SmoothQuant, StaticActivations
    from jaxlm.compression.quantize.autoround import AutoRound
    from jaxlm.compression.quantize.awq import Awq
    from jaxlm.compression.quantize.codebook import ShareWeights, TableQuantize
    from jaxlm.compression.quantize.float8 import Float8, quantize_float8
    from jaxlm.compression.quantize.gptq import Gptq
    from jaxlm.compression.quantize.half_precision import HalfPrecision
    from jaxlm.compression.quantize.kv_cache import QuantizeCache
    from jaxlm.compression.quantize.rotate import Rotate
    from jaxlm.compression.quantize.rtn import Quantize
    from jaxlm.compression.recipe import Compressed, Recipe
    from jaxlm.compression.report import TensorReport
    from jaxlm.compression.schedule import fake_compress
    from jaxlm.compression.steps import LAYER_KERNELS, LayerStep, ModelStep, Step, WeightStep
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        calibration="CalibratedLayer Calibration LayerwiseModel solve_layers", low_rank="Factorize",
        names="NAMES load_recipe parse", platforms="lower_for_platform", prune__depth="DropLayers",
        prune__scores="Magnitude NofM Wanda magnitude n_of_m", prune__sparsegpt="SparseGpt",
        prune__structured="StructuredPrune", quantize__activations="SmoothQuant StaticActivations",
        quantize__autoround="AutoRound", quantize__awq="Awq", quantize__codebook="ShareWeights TableQuantize",
        quantize__float8="Float8 quantize_float8", quantize__gptq="Gptq", quantize__half_precision="HalfPrecision",
        quantize__kv_cache="QuantizeCache", quantize__rotate="Rotate", quantize__rtn="Quantize",
        recipe="Compressed Recipe", report="TensorReport", schedule="fake_compress",
        steps="LAYER_KERNELS LayerStep ModelStep Step WeightStep",
    )  # fmt: skip
