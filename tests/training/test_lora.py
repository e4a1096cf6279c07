"""Adapters: their training equals that of PEFT, on frozen weights that may be compressed; PEFT reads them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LoRA, QArray, dequantize
from jaxlm.core.tree import flatten, map_params, unflatten
from jaxlm.hf.peft.adapters import read_adapter, save_adapter
from jaxlm.training.config import LoraConfig
from jaxlm.training.lora import add_adapters, freeze_base, remove_adapters
from jaxlm.training.objectives.loss import lm_loss
from jaxlm.training.partition import Partition
from jaxlm.training.state import init_state
from jaxlm.training.step import make_step
from tests.training.llamas import batch, tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


def adapted(home, seed=1, **options):
    """A model with adapters in the middle of their training; the same one for the same arguments."""
    return _adapted(home, seed, tuple(options.items()))


@cache
def _adapted(home, seed, options):
    lm, options = jaxlm.load(home), dict(options)
    config = LoraConfig(**{"rank": 3, "alpha": 5.0} | options)
    params = add_adapters(config, freeze_base(config.base, lm.params, "cpu"), jax.random.key(seed))
    random = np.random.default_rng(seed)

    def of_leaf(path, leaf):
        if not isinstance(leaf, LoRA):
            return leaf
        b = jnp.asarray(0.3 * random.standard_normal(leaf.b.shape), jnp.float32)
        stretch = 1 + 0.1 * random.standard_normal(leaf.b[..., :1, :].shape)
        magnitude = None if leaf.magnitude is None else jnp.asarray(leaf.magnitude * stretch, jnp.float32)
        return dataclasses.replace(leaf, b=b, magnitude=magnitude)

    return lm.replace(params=map_params(of_leaf, params))


def assert_close(found, want):
    """To 1e-5 of the largest: sums run in another order."""
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5 * np.abs(np.asarray(want)).max())


def gradient_step(lm, data, **options):
    """The loss of a step and its gradients: the change of plain descent at rate 1."""
    step = make_step(lm.graphdef, lm.params, lm_loss, optax.sgd(1.0), **options)
    before = jax.tree.map(np.asarray, Partition(flatten(lm.params)).split(flatten(lm.params))[0])
    state, metrics = step(init_state(lm.params, optax.sgd(1.0), 0), data)
    return float(metrics["loss"]), {path: leaf - np.asarray(state.params[path]) for path, leaf in before.items()}


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=lambda options: "-".join(options))
def test_a_step_is_that_of_peft(base, tmp_path, options):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    lm, data = adapted(base, **options), batch()
    save_adapter(tmp_path / "adapter", lm.config, lm.params, base=str(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    inputs, targets, weights = (torch.tensor(data[name]) for name in ("inputs", "targets", "weights"))
    logits = model(inputs.long()).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets.long(), reduction="none")
    loss = (nll * weights).sum() / weights.sum()
    loss.backward()
    ours, gradients = gradient_step(lm, data)
    assert_close(lm(data["inputs"]), logits.detach())
    assert ours == pytest.approx(float(loss.detach()), rel=1e-5)
    theirs = {name: each.grad.numpy() for name, each in model.named_parameters() if each.grad is not None}
    names = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
             "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    assert len(theirs) == 2 * len(gradients) and len(gradients) == 7 * (3 if "dora" in options else 2)
    kinds = {"a": "lora_A.default.weight", "b": "lora_B.default.weight",
             "magnitude": "lora_magnitude_vector.default.weight"}
    for path, gradient in gradients.items():
        module, part = path.split("/")[-3], path.split("/")[-1]
        for layer in range(2):
            theirs_here = theirs[f"base_model.model.model.layers.{layer}.{names[module]}.{kinds[part]}"]
            ours_here = gradient[layer].T if part != "magnitude" else gradient[layer][0]
            assert_close(ours_here, theirs_here)


@pytest.mark.parametrize("dora", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_written_is_read_again(base, tmp_path, dora):
    lm = adapted(base, dora=dora)
    save_adapter(tmp_path / "adapter", lm.config, lm.params, base=str(base))
    want = lm(batch()["inputs"])
    for merge in (False, True):
        again = jaxlm.load(tmp_path / "adapter", merge=merge)
        assert_close(again(batch()["inputs"]), want)


def test_adapters_start_by_changing_nothing(base):
    lm = jaxlm.load(base)
    for options in ({}, {"dora": True}):
        params = add_adapters(LoraConfig(rank=2, **options), lm.params, jax.random.key(0))
        assert_close(lm.replace(params=params)(batch()["inputs"]), lm(batch()["inputs"]))
    assert jax.tree.all(jax.tree.map(np.array_equal, remove_adapters(params), lm.params))


def mixed(base, **options):
    """A model whose attention is compressed by one recipe, and its feed-forward by another."""
    of_mlp, of_attention = (adapted(base, base=recipe, **options) for recipe in ("w4a16-rtn-g16", "nf4-g16"))
    other = flatten(of_mlp.params)
    lm = of_attention.replace(params=map_params(
        lambda path, leaf: other[path] if "/mlp/" in path else leaf, of_attention.params))
    assert {type(leaf.base) for leaf in flatten(lm.params).values() if isinstance(leaf, LoRA)} == {QArray, Codebook}
    return lm


@pytest.mark.parametrize(("recipe", "dora"), [
    pytest.param("nf4-g16", False, marks=pytest.mark.slow), pytest.param("nf4-g16", True, marks=pytest.mark.slow),
    pytest.param("w4a16-rtn-g16", False, marks=pytest.mark.slow), ("mixed", True), ("w8a8-dynamic", False),
])
def test_a_compressed_base_trains_as_what_it_stands_for(base, recipe, dora):
    """The gradients equal those over the dequantized weights; with activations in int8 they are close."""
    lm = mixed(base, dora=dora) if recipe == "mixed" else adapted(base, base=recipe, dora=dora)
    assert any(isinstance(leaf.base, QArray | Codebook) for leaf in flatten(lm.params).values()
               if isinstance(leaf, LoRA))
    dense = lm.replace(params=map_params(
        lambda _, leaf: dataclasses.replace(leaf, base=dequantize(leaf.base)) if isinstance(leaf, LoRA) else leaf,
        lm.params))
    (loss, gradients), (other, others) = gradient_step(lm, batch()), gradient_step(dense, batch())
    rounded = recipe.startswith("w8a8")
    assert loss == pytest.approx(other, rel=0.05 if rounded else 1e-5)
    for path, gradient in gradients.items():
        largest = np.abs(others[path]).max()
        np.testing.assert_allclose(gradient, others[path], atol=(0.3 if rounded else 3e-5) * largest, err_msg=path)


def test_the_backward_pass_keeps_no_dense_copy_of_the_base(base):
    """Between the passes codes are kept: no float array has the size of a compressed weight; over dense weights some
    do."""
    def kept(lm):
        partition = Partition(flatten(lm.params))
        trained, frozen = partition.split(flatten(lm.params))

        def loss(trained):
            params = unflatten(lm.params, partition.join(trained, frozen))
            return lm_loss(nnx.merge(lm.graphdef, params), jax.tree.map(jnp.asarray, batch(3)))[0]

        wide = {leaf.shape for path, leaf in flatten(lm.params).items() if isinstance(leaf, LoRA)}
        wide |= {(*shape[:-2], shape[-1], shape[-2]) for shape in wide}
        backward = jax.eval_shape(lambda trained: jax.vjp(loss, trained)[1], trained)
        return [x.shape for x in jax.tree.leaves(backward) if jnp.issubdtype(x.dtype, jnp.floating) and x.shape in wide]

    assert kept(adapted(base)) and not kept(adapted(base, base="nf4-g16"))


def test_dropout_is_of_adapters_and_differs_from_layer_to_layer(base):
    lm = adapted(base, dropout=0.5)
    partition = Partition(flatten(lm.params))
    trained, frozen = partition.split(flatten(lm.params))
    joined = partition.join(trained, frozen, jax.random.key(0))
    keys = np.asarray(joined["decoder/layers/0/attn/q/kernel"].key)
    assert keys.shape == (2, 2) and not np.array_equal(keys[0], keys[1])
    assert jax.tree.all(jax.tree.map(
        np.array_equal, joined, partition.join(trained, frozen, jax.random.key(0))))  # by the key alone
    wet = lm.replace(params=unflatten(lm.params, joined))
    assert np.abs(np.asarray(wet(batch()["inputs"]) - lm(batch()["inputs"]))).max() > 1e-3
    still = lm.replace(params=remove_adapters(lm.params))
    none = map_params(lambda _, leaf: dataclasses.replace(leaf, b=0 * leaf.b) if isinstance(leaf, LoRA) else leaf,
                      wet.params)
    assert_close(wet.replace(params=none)(batch()["inputs"]), still(batch()["inputs"]))


@pytest.mark.parametrize(("options", "message"), [
    ({"target": "nothing"}, "lora.target 'nothing'"),
    ({"target": ".*norm.*"}, "lora.target .*norm"),
    ({"base": "w4a16-gptq"}, "lora.base .*gptq"),
    ({"base": "w4a17"}, "w4a17"),
])
def test_mistakes(base, options, message):
    with pytest.raises(UserError, match=message):
        adapted(base, **options)


def test_an_adapter_says_where_its_base_is(base, tmp_path):
    lm = adapted(base)
    save_adapter(tmp_path / "of the hub", lm.config, lm.params, base="hf://org/name@v1")
    settings = json.loads((tmp_path / "of the hub" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/name", "v1")
    assert read_adapter(tmp_path / "of the hub").base_model == "hf://org/name@v1"
    assert set(settings["target_modules"]) == {
        f"model.layers.{layer}.{name}" for layer in range(2)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
    }
