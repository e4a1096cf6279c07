import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.compression import platforms
from jaxlm.compression.names import NAMES, RecipeName, load_recipe, parse
from jaxlm.compression.prune.scores import Magnitude, NofM, Wanda
from jaxlm.compression.prune.sparsegpt import SparseGpt
from jaxlm.compression.quantize.autoround import AutoRound
from jaxlm.compression.quantize.float8 import Float8
from jaxlm.compression.quantize.gptq import Gptq
from jaxlm.compression.quantize.half_precision import HalfPrecision
from jaxlm.compression.quantize.rtn import Quantize
from jaxlm.compression.recipe import STEPS, Recipe, step_class
from jaxlm.compression.steps import LayerStep, Step
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray, dequantize, is_leaf
from jaxlm.core.tree import flatten

KERNEL, CROSS, HEAD, TABLE = "decoder/layers/0/mlp/up/kernel", "layers/1/cross/q/kernel", "head/kernel", "embed/table"
BIAS = "decoder/layers/0/mlp/up/bias"


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    shapes = {KERNEL: (2, 64, 24), CROSS: (2, 24, 24), BIAS: (2, 24), HEAD: (24, 50), TABLE: (50, 24)}
    return nnx.from_flat_state(
        (tuple(path.split("/")), nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32)))
        for path, shape in shapes.items()
    )


@pytest.mark.parametrize(
    "name,steps,storage",
    [
        ("w8a8-dynamic", (Quantize(8, 0, True, 8),), "plain"),
        ("w4a8-dynamic-g128", (Quantize(4, 128, True, 8),), "plain"),
        ("w8a16-rtn", (Quantize(8, 128),), "plain"),
        ("w4a16-rtn", (Quantize(4, 128, False, 0),), "plain"),
        ("w3a16-rtn-g32-sym", (Quantize(3, 32, True),), "plain"),
        ("w2a16-rtn-channel", (Quantize(2, 0),), "plain"),
        ("sparse50-magnitude", (Magnitude(0.5),), "plain"),
        ("sparse62.5-magnitude+huffman", (Magnitude(0.625),), "huffman"),
        ("2:4-magnitude+w8a8-dynamic+huffman", (NofM(2, 4), Quantize(8, 0, True, 8)), "huffman"),
        ("huffman", (), "huffman"),
        ("fp8", (Float8(),), "plain"),
        ("w3a16-gptq-g64-sym", (Gptq(3, 64, True),), "plain"),
        ("w2a16-autoround-g64", (AutoRound(2, 64),), "plain"),
        ("w3a16-autoround-channel-sym", (AutoRound(3, 0, True),), "plain"),
        ("sparse70-wanda+w4a16-gptq-channel", (Wanda(0.7), Gptq(4, 0)), "plain"),
        ("2:4-sparsegpt", (SparseGpt(n=2, m=4),), "plain"),
        ("sparse50-sparsegpt-w4+huffman", (SparseGpt(0.5, bits=4),), "huffman"),
        ("w4a16-rtn+half+huffman", (Quantize(4, 128), HalfPrecision()), "huffman"),
        ("2:4-sparsegpt-w3-g128", (SparseGpt(n=2, m=4, bits=3, group=128),), "plain"),
    ],
)
def test_names(name, steps, storage):
    recipe = parse(name)
    assert recipe == Recipe(steps, storage, name)
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    "name,says",
    [
        ("w4a16-rtm", "unknown recipe 'w4a16-rtm'"),
        ("", "unknown recipe ''"),
        ("huffman+w8a8-dynamic", "(last)"),
        ("w9a16-rtn", "9 bits"),
        ("w1a8-dynamic", "1 bits"),
        ("sparse100-magnitude", "100%"),
        ("sparse0-magnitude", "0%"),
        ("4:4-magnitude", "4:4"),
        ("missing.py", "missing.py"),
    ],
)
def test_mistakes_in_names(name, says):
    with pytest.raises(UserError) as error:
        load_recipe(name)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_file_defines_a_recipe(tmp_path):
    file = tmp_path / "mine.py"
    imports = "from jaxlm.compression import Quantize, Recipe\n"
    file.write_text(imports + "recipe = Recipe((Quantize(5, target='head/kernel'),))\n")
    assert load_recipe(str(file)) == Recipe((Quantize(5, target="head/kernel"),))
    file.write_text("recipe = 3\n")
    with pytest.raises(UserError, match="does not define"):
        load_recipe(str(file))


def test_what_is_listed_is_what_there_is():
    for name in NAMES:
        recipe = parse(name.example)
        assert recipe.steps and Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
        assert (name.data == "needed") == any(isinstance(step, LayerStep) for step in recipe.steps) and name.meaning


def test_every_step_can_be_stored_and_loaded():
    def subclasses(kind):
        return {each for sub in kind.__subclasses__() for each in {sub, *subclasses(sub)}}

    loaded = {kind: step_class(kind) for kind in STEPS}
    assert all(step.kind == kind for kind, step in loaded.items())
    defined = {step for step in subclasses(Step) if step.__module__.startswith("jaxlm.") and hasattr(step, "kind")}
    assert {step for step in defined if not step.__name__.startswith("_")} == set(loaded.values())


@pytest.mark.parametrize("vnni", [True, False])
def test_what_is_listed_as_faster_is_kept_on_cpu(vnni, monkeypatch):
    monkeypatch.setattr(platforms, "_VNNI", vnni)
    dense = jax.ShapeDtypeStruct((1, 1024, 1024), jnp.float32)
    for name in ("w8a8-dynamic", "fp8", "w4a16-rtn", "w4a16-rtn-channel", "nf4", "mxfp4", "sparse50-magnitude"):
        (step,) = parse(name).steps
        kept = platforms.fast_on_cpu(jax.eval_shape(lambda w: step.weight(w, -2), dense))  # noqa: B023
        said = RecipeName(name, "", re.escape(name), lambda _: (step,)).on_cpu  # noqa: B023
        assert kept == (said == "faster" or (vnni and said == "faster with jax 0.12"))


def test_data_is_asked_for(params):
    with pytest.raises(UserError, match="gptq is calibrated with data; give some"):
        parse("w4a16-gptq").run(None, params)
    with pytest.raises(UserError, match="needs the whole model"):
        parse("w4a16-gptq").apply(params)


@pytest.mark.parametrize("damage", [{"kind": "fold"}, {"bitz": 3}, {"bits": "four"}])
def test_json_of_another_version(damage):
    data = parse("w4a16-rtn").to_json()
    data["steps"][0] |= damage
    with pytest.raises(UserError):
        Recipe.from_json(data)


def test_apply_compresses_the_blocks_and_leaves_the_rest(params):
    before = flatten(params)
    after = flatten(jax.jit(parse("2:4-magnitude+w4a16-rtn-g32").apply)(params))
    assert list(after) == list(before)
    for path in (KERNEL, CROSS):
        leaf = after[path]
        assert isinstance(leaf, QArray) and leaf.shape == before[path].shape and leaf.bits == 4
        zeros = np.asarray(dequantize(leaf) == 0).reshape(2, -1, 4, leaf.shape[-1])
        assert np.all(zeros.sum(2) >= 2)
    for path in (BIAS, HEAD, TABLE):
        np.testing.assert_array_equal(after[path], before[path])


def test_targets_may_name_head_and_table(params):
    steps = (Quantize(8, symmetric=True, act_bits=8, target="head/kernel"), Quantize(4, 16, target=".*table"))
    after = flatten(Recipe(steps).apply(params))
    assert [path for path, leaf in after.items() if is_leaf(leaf)] == [TABLE, HEAD] or is_leaf(after[HEAD])
    assert after[TABLE].axis == -1 and after[TABLE].scale.shape == (50, 2) and after[TABLE].shape == (50, 24)
    assert not is_leaf(after[KERNEL])


@pytest.mark.parametrize(
    "steps,says",
    [
        ((Quantize(4, target="nothing"),), "matches no parameter"),
        ((Quantize(4, target=".*bias"),), "only kernels and tables"),
        ((Quantize(4), Magnitude(0.5)), "already quantized"),
    ],
)
def test_mistakes_in_targets(params, steps, says):
    with pytest.raises(UserError, match=says):
        Recipe(steps).apply(params)
