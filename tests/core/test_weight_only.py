import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from jaxlm.compression.platforms import to_native_4bit
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core import ops, weight_only


def normal(*shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def product(leaf, x):
    """In float64."""
    codes, scale = np.asarray(leaf.codes, np.float64), np.asarray(leaf.scale, np.float64)
    group = np.arange(codes.shape[1]) // leaf.group if leaf.group else np.zeros(codes.shape[1], int)
    zero = 0 if leaf.zero is None else np.asarray(leaf.zero, np.float64)[:, group]
    return np.asarray(x, np.float64) @ ((codes - zero) * scale[:, group]).T


@pytest.mark.parametrize(("rows", "n_in", "n_out", "bits", "group", "symmetric", "dtype"), [
    (1, 256, 64, 8, 0, True, jnp.float32),
    (16, 320, 48, 8, 0, False, jnp.bfloat16),  # blocks of 64 columns, of 16 outputs
    (5, 320, 32, 4, 128, False, jnp.float32),  # the last group is shorter
    (3, 96, 128, 4, 32, True, jnp.bfloat16),
])
def test_the_kernel_is_the_product(rows, n_in, n_out, bits, group, symmetric, dtype):
    leaf = to_native_4bit(quantize(normal(n_in, n_out), bits=bits, group=group, symmetric=symmetric))
    assert leaf.codes.dtype == (jnp.int4 if bits == 4 else jnp.int8)
    x = normal(rows, n_in, dtype=dtype)
    assert weight_only.takes(x, leaf)
    y, reference = jax.jit(partial(weight_only.dot, interpret=True))(x, leaf), weight_only.reference(x, leaf)
    assert y.shape == reference.shape == (rows, n_out) and y.dtype == reference.dtype == dtype
    expected = product(leaf, x)
    rounding = float(jnp.finfo(dtype).eps)
    for mine in (y, reference):
        np.testing.assert_allclose(
            mine.astype(jnp.float32), expected, rtol=rounding, atol=1e-5 * np.abs(expected).max()
        )


def test_what_the_kernel_leaves_to_xla():
    leaf = quantize(normal(64, 64), bits=8)
    assert not weight_only.takes(normal(17, 64), leaf)
    assert not weight_only.takes(normal(1, 60), quantize(normal(60, 64), bits=8))
    assert not weight_only.takes(normal(1, 64), quantize(normal(64, 40), bits=8))
    assert not weight_only.takes(normal(1, 96), quantize(normal(96, 64), bits=4, group=24))
    assert not weight_only.takes(normal(1, 64), jax.tree.map(lambda part: part[None], leaf))


@pytest.mark.parametrize("asked", [False, True])
def test_gpus_get_the_kernel_where_it_is_asked_for(asked, monkeypatch):
    """Lowered for a GPU, which needs none."""
    monkeypatch.setenv("JAXLM_KERNELS", str(int(asked)))
    leaf = to_native_4bit(quantize(normal(256, 64), bits=4, group=128, symmetric=False))
    gpu = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu"))
    x = normal(3, 256, dtype=jnp.bfloat16)

    def lowered(platform):
        return jax.jit(lambda x, leaf: ops.dot(x, leaf)).trace(x, leaf).lower(lowering_platforms=(platform,)).as_text()

    with use_abstract_mesh(gpu):
        assert ("triton" in lowered("cuda")) == asked
    assert "triton" not in lowered("cpu")


def test_gradients_are_those_of_the_reference(monkeypatch):
    monkeypatch.setenv("JAXLM_KERNELS", "1")
    leaf = quantize(normal(128, 64), bits=8)
    x = normal(3, 128)

    def loss(x, scale, dot):
        return jnp.sum(jnp.sin(dot(x, dataclasses.replace(leaf, scale=scale))))

    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    mine, theirs = (gradient(x, leaf.scale, dot) for dot in (ops.dot, weight_only.reference))
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())
