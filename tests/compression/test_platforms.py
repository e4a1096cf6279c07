import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.compression import platforms
from jaxlm.compression.platforms import describe_leaf, lower_for_platform, to_native_4bit
from jaxlm.compression.quantize.codebook import TableQuantize
from jaxlm.compression.quantize.float8 import quantize_float8
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.compression.report import report, summary
from jaxlm.core import ops
from jaxlm.core.leaves import LowRank, codebook_values, dequantize, is_leaf
from jaxlm.core.tree import count_bytes, flatten


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def tree(**leaves):
    return nnx.State({name: nnx.Param(leaf) for name, leaf in leaves.items()})


DENSE = dict(
    big=normal(2, 128, 256), small=normal(2, 128, 128), narrow=normal(2, 4096, 64), lone=normal(128, 256),
    norm=jnp.ones(8),
)


def compressed(**options):
    return tree(**{name: w if name == "norm" else quantize(w, **options) for name, w in DENSE.items()})


def test_cpu_keeps_only_integer_dots_that_are_large_enough():
    params = compressed(bits=8, act_bits=8)
    placed, notes = lower_for_platform(params, "cpu")
    assert [name for name, leaf in flatten(placed).items() if is_leaf(leaf)] == ["big"]
    for name, leaf in flatten(placed).items():
        np.testing.assert_array_equal(dequantize(leaf), dequantize(flatten(params)[name]))
    assert len(notes) == 1 and "3 tensors expanded" in notes[0] and "int8 activations" in notes[0]


def test_cpu_expands_weight_only_integers():
    placed, notes = lower_for_platform(compressed(bits=4, group=32, symmetric=False), "cpu")
    assert not any(is_leaf(leaf) for leaf in flatten(placed).values())
    assert notes == ["int4 g32: 4 tensors expanded, they would be slower than dense on this platform"]
    assert lower_for_platform(tree(**DENSE), "cpu")[1] == []


@pytest.mark.parametrize("vnni", [True, False])
def test_cpu_keeps_weight_only_integers_where_their_dots_are_fast(vnni, monkeypatch):
    monkeypatch.setattr(platforms, "_VNNI", vnni)
    w = normal(1, 512, 512)
    params = tree(
        channel=quantize(w, bits=4, symmetric=False), group=quantize(w, bits=4, group=128),
        lone=quantize(w[0], bits=8), fp8=quantize_float8(w, act_bits=8),
    )  # fmt: skip
    placed = flatten(lower_for_platform(params, "cpu")[0])
    assert [name for name, leaf in placed.items() if is_leaf(leaf)] == (["channel"] if vnni else [])


def test_cpu_keeps_factors_that_save_a_quarter():
    w = normal(2, 128, 128)
    few, many = LowRank(w[..., :48], w[..., :48, :]), LowRank(w[..., :49], w[..., :49, :])
    coded = LowRank(quantize(few.a, bits=8), quantize(few.b, bits=8))
    placed = flatten(lower_for_platform(tree(few=few, many=many, coded=coded), "cpu")[0])
    assert isinstance(placed["few"], LowRank) and not is_leaf(placed["many"])
    assert isinstance(placed["coded"], LowRank) and not is_leaf(placed["coded"].a)
    np.testing.assert_array_equal(placed["coded"].b, dequantize(coded.b))
    on_gpu = flatten(lower_for_platform(tree(w=LowRank(quantize(few.a, bits=4), few.b)), "gpu")[0])["w"]
    assert on_gpu.a.codes.dtype == jnp.int4


def test_4_bits_in_memory_are_half_a_byte_and_their_grid():
    """What is claimed of w4 in groups of 128: 4 bits and, a group, a float32 scale and an int8 zero."""
    w = normal(2, 256, 64)
    placed, _ = lower_for_platform(tree(w=quantize(w, bits=4, group=128, symmetric=False)), "gpu")
    assert count_bytes(placed) == w.size // 2 + w.size // 128 * (4 + 1)


def test_accelerators_keep_everything_and_hold_4_bits_in_4():
    params = compressed(bits=4, group=32, symmetric=False)
    placed, notes = lower_for_platform(params, "gpu")
    assert notes == []
    assert all(is_leaf(leaf) for name, leaf in flatten(placed).items() if name != "norm")
    codes = sum(w.size for name, w in DENSE.items() if name != "norm")
    assert count_bytes(params) - count_bytes(placed) == codes // 2
    x = normal(3, 128)
    one, same = (jax.tree.map(lambda part: part[0], flatten(p)["big"]) for p in (params, placed))
    np.testing.assert_array_equal(ops.dot(x, one), ops.dot(x, same))
    eight = compressed(bits=8, act_bits=8)
    jax.tree.map(np.testing.assert_array_equal, lower_for_platform(eight, "tpu")[0], eight)


def test_codebooks_in_4_bits_multiply_as_in_8():
    """Stacked, and one matrix; the values are those of the table, taken one by one."""
    dense = normal(2, 48, 32)
    leaf = TableQuantize("nf4", 16).weight(dense, -2)
    small = to_native_4bit(leaf)
    assert small.codes.dtype == jnp.uint4 and count_bytes(tree(w=small)) < 0.7 * count_bytes(tree(w=leaf))
    np.testing.assert_array_equal(codebook_values(small), np.take_along_axis(
        np.asarray(leaf.table), np.asarray(leaf.codes).reshape(2, -1).astype(int), -1).reshape(leaf.codes.shape))
    np.testing.assert_array_equal(dequantize(small), dequantize(leaf))
    x, first = normal(5, 48), (jax.tree.map(lambda part: part[0], each) for each in (leaf, small))
    np.testing.assert_array_equal(*(ops.dot(x, each) for each in first))


def test_descriptions():
    w = normal(128, 8)
    assert describe_leaf(w) == "float32"
    assert describe_leaf(quantize(w, bits=8, act_bits=8)) == "int8 channel symmetric, int8 activations"
    assert describe_leaf(quantize(w, bits=3, group=64, symmetric=False)) == "int3 g64"


def test_report_counts_what_it_says():
    before, after = tree(**DENSE), compressed(bits=4, group=32, symmetric=False)
    rows = {row.path: row for row in report(before, after, {name: (1000, "raw") for name in DENSE})}
    assert list(rows) == list(flatten(after))
    for name, w in DENSE.items():
        now = np.asarray(dequantize(flatten(after)[name]), np.float64)
        error = np.linalg.norm(w - now) / np.linalg.norm(w)
        np.testing.assert_allclose(rows[name].relative_error, error, rtol=1e-4, atol=1e-7)
        assert rows[name].shape == w.shape and rows[name].bits == 8000 / w.size and rows[name].bytes == 1000
        np.testing.assert_allclose(rows[name].sparsity, (now == 0).mean(), rtol=1e-5)
    total = summary(list(rows.values()))
    assert total.bytes == 5000 and total.shape == (sum(w.size for w in DENSE.values()),)
    assert total.representation == "int4 g32 / float32"
