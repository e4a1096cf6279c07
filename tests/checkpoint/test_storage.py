import copy
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.checkpoint import storage
from jaxlm.checkpoint.storage import PackedWeights, leaf_bytes, pack_params, tensor_bytes, unpack_params
from jaxlm.compression.prune.scores import magnitude, n_of_m
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, QArray, dequantize_tree
from jaxlm.core.tree import flatten, map_params


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.02, dtype)


@functools.cache
def every_representation():
    w = normal(2, 100, 24)
    return {
        "float32": w,
        "bfloat16": normal(60, 50, dtype=jnp.bfloat16),
        "float16": normal(60, 50, dtype=jnp.float16),
        "vector": jnp.ones(24),
        "scalar": jnp.float32(3),
        "integers": jnp.arange(20),
        "empty": jnp.zeros((0, 4)),
        "odd": jnp.array([0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, 1e-40]),
        "pruned": magnitude(w, sparsity=0.9),
        "pruned-bfloat16": magnitude(w.astype(jnp.bfloat16), sparsity=0.5),
        "w8a8": quantize(w, bits=8, act_bits=8),
        "table": quantize(w[0], bits=4, group=16, symmetric=False, axis=-1),
        "pruned-w8a8": quantize(n_of_m(w, n=2, m=4), bits=8, act_bits=8),
        "pruned-w4": quantize(magnitude(w, sparsity=0.8), bits=4, group=48, symmetric=False),
        **{f"w{bits}": quantize(w, bits=bits, group=32, symmetric=False) for bits in range(2, 9)},
        **{f"w{bits}-sym": quantize(w, bits=bits) for bits in range(2, 9)},
        "w4-stacks": quantize(normal(2, 3, 40, 24), bits=4, group=32, symmetric=False),
        "float8": float8(w, act_bits=8),
        "static-float8": dataclasses.replace(float8(w, act_bits=8), act_scale=jnp.full((2, 1, 1), 0.37)),
        "static-w8a8": dataclasses.replace(quantize(w, bits=8, act_bits=8), act_scale=jnp.full((2, 1, 1), 0.37)),
        "nf4": codebook(w, bits=4, group=64, kind="nf4"),
        "mxfp4": codebook(w, bits=4, group=32, kind="mxfp4"),
        "shared": codebook(w, bits=5, kind="shared"),
        "shared-1": codebook(w[0], bits=1, kind="shared", axis=-1),
        "low-rank": LowRank(normal(2, 100, 7), normal(2, 7, 24, seed=1)),
        "coded-low-rank": LowRank(
            quantize(normal(2, 100, 7), bits=8), codebook(normal(2, 7, 24), bits=4, group=4, kind="nf4")
        ),
    }


def float8(dense, **options):
    """Codes of float8 with a scale a channel."""
    w = np.asarray(dense).swapaxes(-1, -2)
    scale = jnp.asarray(np.abs(w).max(-1, keepdims=True) / 448)
    return QArray(jnp.asarray(w / scale, jnp.float8_e4m3fn), scale, None, 8, **options)


def codebook(dense, *, bits, kind, group=0, axis=-2):
    """Random codes, most of them 3, and tables as each kind has them."""
    rng = np.random.default_rng(0)
    *lead, n_in, n_out = dense.shape if axis == -2 else (*dense.shape[:-2], dense.shape[-1], dense.shape[-2])
    codes = np.where(rng.random((*lead, n_out, n_in)) < 0.7, min(3, 2**bits - 1), rng.integers(0, 2**bits, n_in))
    table = rng.normal(size=(*lead, 2**bits)).astype(np.float32)
    scale = None
    if group:
        shape = (*lead, n_out, -(-n_in // group))
        scale = 2.0 ** rng.integers(-127, 127, shape) if kind == "mxfp4" else rng.random(shape)
        scale = jnp.asarray(scale, jnp.float32)
    return Codebook(jnp.asarray(codes, jnp.uint8), jnp.asarray(table), scale, bits, group, kind, axis)


def tree(leaves):
    return nnx.State({name: {"kernel": nnx.Param(leaf)} for name, leaf in leaves.items()})


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture(scope="module")
def params():
    return tree(every_representation())


@pytest.mark.parametrize("storage", ["plain", "huffman"])
def test_every_representation_survives_a_file_bit_for_bit(params, storage, tmp_path):
    tensors, meta = pack_params(params, storage)
    save_file(tensors, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    like = jax.eval_shape(dequantize_tree, params)
    assert_same_bits(unpack_params(like, tensors, json.loads(json.dumps(meta))), params)


def test_what_compression_leaves_alone_is_stored_under_its_own_name():
    params = tree({"a": normal(30, 40), "b": normal(3, dtype=jnp.bfloat16)})
    tensors, _ = pack_params(params)
    assert list(tensors) == ["a/kernel", "b/kernel"]
    assert_same_bits(tensors["a/kernel"], flatten(params)["a/kernel"])


def test_int4_codes_on_a_device_are_the_same_file(params):
    def narrow(_, leaf):
        few = isinstance(leaf, QArray) and leaf.bits <= 4
        return dataclasses.replace(leaf, codes=leaf.codes.astype(jnp.int4)) if few else leaf

    one, two = pack_params(params)[0], pack_params(map_params(narrow, params))[0]
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}


def test_sizes_are_those_of_the_bits(params):
    packed = PackedWeights(tree({"w4": quantize(normal(256, 64), bits=4, group=128)}))
    assert packed.sizes == {"w4/kernel": (256 * 64 // 2 + 2 * 64 * 4, "codes full (raw), scale array")}
    scales = jnp.asarray(np.float16(np.random.default_rng(0).random((64, 2))), jnp.float32)
    half = dataclasses.replace(quantize(normal(256, 64), bits=4, group=128), scale=scales)
    even = jnp.asarray(np.arange(256 * 64).reshape(64, 256) % 16, jnp.uint8)
    powers = dataclasses.replace(codebook(normal(256, 64), bits=4, group=32, kind="mxfp4"), codes=even)
    factors = LowRank(normal(256, 8), quantize(normal(8, 64), bits=8))
    assert PackedWeights(tree({"half": half, "powers": powers, "factors": factors})).sizes == {
        "half/kernel": (256 * 64 // 2 + 2 * 64 * 2, "codes full (raw), scale array"),
        "powers/kernel": (256 * 64 // 2 + 16 * 4 + 8 * 64, "codes full (raw), table array, scale array"),
        "factors/kernel": (256 * 8 * 4 + 8 * 64 + 64 * 4, "a/dense array, b/codes full (raw), b/scale array"),
    }
    sparse = tree({"sparse": magnitude(normal(200, 300), sparsity=0.9)})
    for how, most in (("plain", 0.14), ("huffman", 0.12)):
        tensors, meta = pack_params(params, how)
        real = tensor_bytes(lambda name: tensors[name].nbytes, meta)  # noqa: B023
        assert {path: size.nbytes for path, size in PackedWeights(params, how).sizes.items()} == real
        assert {path: leaf_bytes(leaf, how) for path, leaf in flatten(params).items()} == real
        assert PackedWeights(sparse, how).sizes["sparse/kernel"].nbytes < most * 200 * 300 * 4


def test_weights_are_packed_once_and_never_stale(params, monkeypatch):
    calls = []
    pack_leaf = storage.pack_leaf
    monkeypatch.setattr(storage, "pack_leaf", lambda leaf, how: calls.append(how) or pack_leaf(leaf, how))
    packed = PackedWeights(params, "huffman")
    assert packed.sizes and packed.metadata and packed.tensors and packed.sizes
    assert len(calls) == len(flatten(params)), "sizes and bytes are of one packing"
    again = map_params(lambda path, leaf: leaf, params)
    other = map_params(lambda path, leaf: jax.tree.map(jnp.copy, leaf) if path == "w4/kernel" else leaf, params)
    assert packed.holds(params, "huffman") and packed.holds(again, "huffman")
    assert not packed.holds(params, "plain") and not packed.holds(other, "huffman")


@pytest.mark.parametrize("storage", ["plain", "huffman"])
def test_every_flipped_or_missing_byte_is_found(storage):
    rng = np.random.default_rng(0)
    for leaf in ("bfloat16", "pruned", "pruned-w4", "w8a8", "static-float8", "mxfp4", "coded-low-rank"):
        params = tree({leaf: every_representation()[leaf]})
        tensors, meta = pack_params(params, storage)
        for name, array in tensors.items():
            for _ in range(8):
                damaged = np.frombuffer(array.tobytes(), np.uint8).copy()
                damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
                damaged = damaged.view(array.dtype).reshape(array.shape)
                for broken in (damaged, array.reshape(-1)[: rng.integers(array.size)]):
                    with pytest.raises(UserError, match=f"{leaf}/kernel"):
                        unpack_params(params, tensors | {name: broken}, meta)
            with pytest.raises(UserError, match=f"{leaf}/kernel"):
                unpack_params(params, {k: v for k, v in tensors.items() if k != name}, meta)


def _scalars(node, at=()):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield at
    else:
        for key, child in items:
            yield from _scalars(child, (*at, key))


@pytest.mark.parametrize("storage", ["plain", pytest.param("huffman", marks=pytest.mark.slow)])
def test_no_change_to_the_metadata_gives_other_weights(storage):
    for name in ("pruned", "pruned-w4", "w8a8", "static-float8", "mxfp4", "coded-low-rank"):
        params = tree({name: every_representation()[name]})
        assert_metadata_guarded(params, *pack_params(params, storage))


def assert_metadata_guarded(params, tensors, meta):
    for at in list(_scalars(meta)):
        for value in (None, -1, 3, 10**15, "zstd", {}, []):
            damaged = copy.deepcopy(meta)
            node = damaged
            for key in at[:-1]:
                node = node[key]
            if node[at[-1]] == value:
                continue
            node[at[-1]] = value
            with pytest.raises(UserError) as error:
                unpack_params(params, tensors, damaged)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(("change", "message"), [
    (lambda entry: entry.update(bits=10**9), "1000000000 bits in groups of 32"),
    (lambda entry: entry.update(bits=True), "its bits is True"),
    (lambda entry: entry.update(group=-3), "4 bits in groups of -3"),
    (lambda entry: entry.update(kind="fp4"), "a table of the kind 'fp4'"),
    (lambda entry: entry["parts"]["scale"].update(dtype="float64"), "scale of the type 'float64'"),
    (lambda entry: entry.update(a=0, b=0), ""),
])
def test_entries_that_lie_with_a_right_checksum_are_named(change, message):
    params = tree({"mxfp4": every_representation()["mxfp4"]})
    tensors, meta = pack_params(params)
    entry = meta["tensors"]["mxfp4/kernel"]
    change(entry)
    arrays = {name.removeprefix("mxfp4/kernel/"): array for name, array in tensors.items()}
    try:
        entry["crc32"] = storage._checksum(entry, arrays)
    except TypeError:
        pass
    with pytest.raises(UserError, match="mxfp4/kernel is damaged") as error:
        unpack_params(jax.eval_shape(dequantize_tree, params), tensors, meta)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_other_shapes_or_names_is_refused():
    tensors, meta = pack_params(tree({"a": normal(8, 4)}))
    with pytest.raises(UserError, match=r"a/kernel is \(8, 4\) in the weights, \(8, 5\) in the model"):
        unpack_params(tree({"a": normal(8, 5)}), tensors, meta)
    with pytest.raises(UserError, match="lack b/kernel"):
        unpack_params(tree({"a": normal(8, 4), "b": normal(1)}), tensors, meta)
    with pytest.raises(UserError, match="hold a/kernel"):
        unpack_params(tree({}), tensors, meta)
