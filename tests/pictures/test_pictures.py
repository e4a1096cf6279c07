"""What pictures show is what is there: the numbers behind them, and how they go into a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm import nn
from jaxlm.compression.names import parse
from jaxlm.core.leaves import dequantize
from jaxlm.core.sharding import abstract_mesh, make_mesh, shardings
from jaxlm.core.tree import flatten
from jaxlm.evaluation.comparison import Comparison
from jaxlm.model import LM
from jaxlm.pictures import layers
from jaxlm.pictures.attention import attention_maps
from jaxlm.pictures.curves import size_quality, training_curves
from jaxlm.pictures.html_page import page
from jaxlm.pictures.mesh import _holders, _ranges, sharded
from jaxlm.pictures.model_pictures import album
from jaxlm.pictures.style import svg
from tests.models import build

CONFIG = nn.DecoderConfig(vocab_size=32, width=16, heads=2, kv_heads=1, ffn=48, layers=3)
VOID = {"meta", "link", "br", "img", "input", "hr"}


@pytest.fixture(scope="module")
def dense() -> LM:
    graphdef, params = build(CONFIG)
    return LM(CONFIG, graphdef, params)


@pytest.fixture(scope="module")
def small(dense) -> LM:
    done = parse("sparse50-magnitude+w4a16-rtn-g16").run(CONFIG, dense.params, None)
    return dense.replace(config=done.config, params=done.params)


def test_maps_of_layers_have_the_numbers_of_the_weights(dense, small):
    of_bits, of_zeros = layers.bits(small.params), layers.zeros(small.params)
    of_errors = layers.errors(small.params, dense.params)
    assert of_bits.kernels == of_zeros.kernels == of_errors.kernels
    assert of_bits.values_KxL.shape == (7, 3)
    now, before = flatten(small.params), flatten(dense.params)
    for k, kernel in enumerate(of_bits.kernels):
        path = f"decoder/layers/0/{kernel}/kernel"
        leaf, old = now[path], np.asarray(before[path], np.float64)
        new = np.asarray(dequantize(leaf, jnp.float32), np.float64)
        held = leaf.codes.size * 4 + 8 * leaf.scale.nbytes + (8 * leaf.zero.nbytes if leaf.zero is not None else 0)
        np.testing.assert_allclose(of_bits.values_KxL[k], held / old.size)
        for layer in range(3):
            np.testing.assert_allclose(of_zeros.values_KxL[k, layer], 100 * np.mean(new[layer] == 0), rtol=1e-6)
            error = 100 * np.linalg.norm(new[layer] - old[layer]) / np.linalg.norm(old[layer])
            np.testing.assert_allclose(of_errors.values_KxL[k, layer], error, rtol=1e-4)
    dense_bits = layers.bits(dense.params)
    np.testing.assert_array_equal(dense_bits.values_KxL, 32)


def test_costs_are_placed_by_side_and_layer():
    grid = layers.losses({"encoder/0/mlp/up": 0.001, "encoder/1/mlp/up": 0.002, "decoder/1/attn/q": 0.5})
    assert grid.kernels == ("encoder mlp/up", "decoder attn/q")
    np.testing.assert_allclose(grid.values_KxL, [[1, 2], [np.nan, 500]])
    layers.heatmap(grid)


def test_devices_that_hold_a_part_are_those_of_jax():
    mesh = make_mesh(data=1, fsdp=2, tensor=2, stage=2)
    numbers = {device: i for i, device in enumerate(mesh.devices.flat)}
    shape = (4, 8, 12)
    for spec in ((), ("stage", "fsdp", "tensor"), (None, ("fsdp", "tensor"), None), ("tensor",), (None, None, "stage")):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        expected = {}
        for device, index in sharding.devices_indices_map(shape).items():
            part = tuple(each.indices(size)[:2] for each, size in zip(index, shape, strict=True))
            expected.setdefault(part, []).append(numbers[device])
        assert _holders(shape, sharding) == {part: sorted(each) for part, each in expected.items()}


def test_the_sharding_of_a_mesh_that_is_not_there(dense):
    mesh = abstract_mesh("fsdp+tp", {}, 64)
    lies = flatten(shardings(dense.params, mesh))
    figure = sharded({path: (leaf.shape, lies[path]) for path, leaf in flatten(dense.params).items()})
    assert "64 devices" in figure.get_suptitle()


@pytest.mark.parametrize("numbers, text", [
    ([0], "0"), ([0, 1, 2, 3], "0-3"), ([0, 4], "0, 4"), ([0, 2, 4, 6], "0,2,…,6"), ([0, 1, 4, 5], "0-1, 4-5"),
    ([0, 2, 3, 7, 9, 12], "0, 2-3, …"),
])
def test_devices_are_written_shortly(numbers, text):
    assert _ranges(numbers) == text


def test_the_best_models_are_joined():
    def row(name, size, bleu):
        return Comparison(name, size, size, 8.0, 2.0, bleu, 1.0, None, ())

    figure = size_quality([row("dense", 800, 30.0), row("worse", 400, 10.0), row("small", 200, 29.0)])
    front = figure.axes[0].lines[0]
    np.testing.assert_allclose(front.get_ydata(), [29, 30])
    text = size_quality([row("dense", 800, None), row("small", 200, None)])
    assert text.axes[0].get_ylabel() == "perplexity"


class Reader(HTMLParser):
    """Checks that elements are closed in order, ids are unique and nothing is fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(dense, small, tmp_path):
    rows = [{"step": i, "loss": 3 / i, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": None} for i in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pictures = album(small, tmp_path, dense=dense)
    assert [each.heading for each in pictures] == ["Training", "Layers", "Sharding"]
    assert len(pictures[1].figures) == 3  # bits, zeros, errors
    text = page("a <b> model", {"bytes": 5}, pictures, {"x": "<script>"}, [{"tensor": "a&b", "bytes": 3}])
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert len(set(reader.ids)) == len(reader.ids)
    local = [link for link in reader.links if not link.startswith("data:")]
    assert local and all(link.startswith("#") and link[1:] in reader.ids for link in local)
    assert "<script" not in text and "a &lt;b&gt; model" in text
    assert re.search(r"url\(#(?!(layers|training|sharding)-)", text) is None


def test_pictures_take_the_ink_of_the_page():
    weights = np.full((2, 3, 3), 1 / 3)
    text = svg(attention_maps(weights, ["a", "$b", "\n"]), "attention")
    assert "#101112" not in text and "#000000" not in text and 'fill="currentColor"' in text
    assert svg(attention_maps(weights, ["a", "$b", "\n"]), "attention") == text  # the same bytes again
    training_curves([{"step": 1, "loss": 2.0}])
