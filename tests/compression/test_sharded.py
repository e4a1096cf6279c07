"""Compression with data of a model that lies on many devices: the same model comes out."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxlm.compression.names import parse
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.recipe import Recipe
from jaxlm.core.leaves import QArray
from jaxlm.core.sharding import make_mesh, shardings
from jaxlm.core.tree import flatten
from tests.compression.calibrated import logits, make, run

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
