"""Compression with data of a model that lies on many devices: the same model comes out."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlm.compression.names import parse
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.compression.recipe import Recipe
from jaxlm.core.leaves import QArray
from jaxlm.core.sharding import make_mesh, num_parts, shardings
from jaxlm.core.tree import flatten
from jaxlm.nn.layers import Linear, ParamKeys
from tests.compression.calibrated import logits, make, run
from tests.training.hlo import collectives

SOME = r".*/(attn/o|mlp/(gate|up))/kernel"  # read from and write to dimensions that are sharded


@pytest.mark.parametrize("recipe", [
    Recipe((Gptq(3, 16, target=SOME),)), pytest.param("sparse50-sparsegpt", marks=pytest.mark.slow)
], ids=["gptq", "sparsegpt"])
def test_solvers_on_a_mesh(recipe):
    config, graphdef, params, calibration = make("decoder")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    want = run("decoder", recipe).params
    with jax.set_mesh(mesh):
        recipe = parse(recipe) if isinstance(recipe, str) else recipe
        got = recipe.run(config, jax.device_put(params, shardings(params, mesh)), calibration).params
        placed = jax.device_put(got, shardings(got, mesh))
    for path, leaf in flatten(want).items():
        other = flatten(got)[path]
        if isinstance(leaf, QArray):
            # Sums in another order turn a few ties the other way, and what follows in their rows.
            assert np.mean(np.asarray(leaf.codes) != np.asarray(other.codes)) < 0.01, path
        else:
            same = np.isclose(leaf, other, rtol=1e-3, atol=1e-4)
            assert np.mean(same) > 0.99, path
    batch = calibration.batches[0]
    want, got = (np.asarray(logits(graphdef, each, *batch)) for each in (want, placed))
    assert np.mean((want - got) ** 2) < 1e-3 * np.mean(want**2)
    part = jax.tree.leaves(flatten(placed)["decoder/layers/0/mlp/up/kernel"])[0]
    assert {shard.data.size for shard in part.addressable_shards} == {part.size // 4}


@pytest.mark.parametrize(("axes", "rows", "parts"), [
    (("mlp", "embed"), 8, 2), (("embed", "mlp"), 8, 1), (("embed", "mlp"), 3, 2), ((("tensor", "fsdp"), ()), 3, 4),
])
def test_integer_layers_never_sum_int32_over_devices(axes, rows, parts):
    """A kernel that "fsdp" splits is gathered, unless there are too few rows to split over "fsdp" too."""
    layer = Linear(64, 24, axes, bias=False, keys=ParamKeys(jax.random.key(0)))
    layer.kernel.set_value(quantize(layer.kernel.get_value(), bits=8, act_bits=8))
    graphdef, params = nnx.split(layer)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        assert num_parts(axes[0], rows) == parts
        by_row = jax.NamedSharding(mesh, jax.P("fsdp" if rows % 2 == 0 else None))
        x_MxI = jax.ShapeDtypeStruct((rows, 64), jax.numpy.bfloat16, sharding=by_row)
        program = jax.jit(lambda params, x_MxI: nnx.merge(graphdef, params)(x_MxI)).lower(
            jax.device_put(params, shardings(params, mesh)), x_MxI
        ).compile()
    assert "s32" not in {each.dtype for each in collectives(program.as_text()) if each.kind == "all-reduce"}
