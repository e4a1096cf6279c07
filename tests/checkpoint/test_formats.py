import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxlm.checkpoint.formats import pack_params, stored, unpack_params
from jaxlm.compression.prune import magnitude, n_of_m
from jaxlm.compression.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import dequantize_tree, is_leaf
from jaxlm.core.tree import flatten, map_params


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 0.02, dtype)


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
    }


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
        few = is_leaf(leaf) and leaf.bits <= 4
        return dataclasses.replace(leaf, codes=leaf.codes.astype(jnp.int4)) if few else leaf

    one, two = pack_params(params)[0], pack_params(map_params(narrow, params))[0]
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in two.items()}


def test_sizes_are_those_of_the_bits(params):
    tensors, meta = pack_params(tree({"w4": quantize(normal(256, 64), bits=4, group=128)}))
    assert stored(tensors, meta) == {"w4/kernel": (256 * 64 // 2 + 2 * 64 * 4, "codes full (raw), scale array")}
    tensors, meta = pack_params(params, "huffman")
    sizes = stored(tensors, meta)
    assert sum(size for size, _ in sizes.values()) == sum(array.nbytes for array in tensors.values())
    for storage in ("plain", "huffman"):
        sizes = stored(*pack_params(tree({"sparse": magnitude(normal(200, 300), sparsity=0.9)}), storage))
        assert sizes["sparse/kernel"][0] < (0.14 if storage == "plain" else 0.12) * 200 * 300 * 4


@pytest.mark.parametrize("storage", ["plain", "huffman"])
def test_every_flipped_or_missing_byte_is_found(storage):
    leaves = every_representation()
    params = tree({name: leaves[name] for name in ("bfloat16", "pruned", "pruned-w4", "w8a8")})
    tensors, meta = pack_params(params, storage)
    rng = np.random.default_rng(0)
    for name, array in tensors.items():
        path = "/".join(name.split("/")[:2])
        for _ in range(8):
            damaged = np.frombuffer(array.tobytes(), np.uint8).copy()
            damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
            damaged = damaged.view(array.dtype).reshape(array.shape)
            for broken in (damaged, array.reshape(-1)[: rng.integers(array.size)]):
                with pytest.raises(UserError, match=path):
                    unpack_params(params, tensors | {name: broken}, meta)
        with pytest.raises(UserError, match=path):
            unpack_params(params, {k: v for k, v in tensors.items() if k != name}, meta)


def _scalars(node, at=()):
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if items is None:
        yield at
    else:
        for key, child in items:
            yield from _scalars(child, (*at, key))


@pytest.mark.parametrize("storage", ["plain", "huffman"])
def test_no_change_to_the_metadata_gives_other_weights(storage):
    leaves = every_representation()
    params = tree({name: leaves[name] for name in ("pruned", "pruned-w4", "w8a8")})
    tensors, meta = pack_params(params, storage)
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


def test_a_model_of_other_shapes_or_names_is_refused():
    tensors, meta = pack_params(tree({"a": normal(8, 4)}))
    with pytest.raises(UserError, match=r"a/kernel is \(8, 4\) in the weights, \(8, 5\) in the model"):
        unpack_params(tree({"a": normal(8, 5)}), tensors, meta)
    with pytest.raises(UserError, match="lack b/kernel"):
        unpack_params(tree({"a": normal(8, 4), "b": normal(1)}), tensors, meta)
    with pytest.raises(UserError, match="hold a/kernel"):
        unpack_params(tree({}), tensors, meta)
