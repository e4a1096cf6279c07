"""The layers that every model is made of: linear maps, norms, embeddings, feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxlm.core import ops
from jaxlm.core.leaves import is_leaf
from jaxlm.core.sharding import constrain, num_parts, num_shards
from jaxlm.nn.config import StackConfig

__all__ = [
    "ACTIVATIONS", "Embedding", "Linear", "Mlp", "Norm", "ParamKeys", "gated_product", "gelu", "softcap", "split_key",
    "truncated_normal",
]


class ParamKeys:
    """Keys for initial parameters, in the order in which the layers ask for them.

    They are the keys that ``nnx.Rngs(params=key).params()`` gives. The count is a Python integer here, not a variable,
    and keys are made many at a time, which takes a fraction of the time to trace and to compile.
    """

    _AT_A_TIME = 32

    def __init__(self, key: jax.Array):
        self._key, self._made, self._count = key, None, 0

    def next(self) -> jax.Array:
        index = self._count % self._AT_A_TIME
        if index == 0:
            counts = jnp.arange(self._count, self._count + self._AT_A_TIME, dtype=jnp.uint32)
            self._made = jax.vmap(lambda count: jax.random.fold_in(self._key, count))(counts)
        self._count += 1
        return self._made[index]


def truncated_normal(keys: ParamKeys, shape: tuple[int, ...], std: float) -> jax.Array:
    """Normal float32 numbers, cut off at three standard deviations."""
    return std * jax.random.truncated_normal(keys.next(), -3.0, 3.0, shape, jnp.float32)


class Linear(nnx.Module):
    """``x_..xI @ kernel_IxO (+ bias_O)``. The kernel may be any leaf that ``ops.dot`` knows.

    ``scale`` multiplies the initial standard deviation ``1 / sqrt(I)``. The last projection before a residual stream
    uses it (GPT-2, section 2.3).
    """

    def __init__(
        self, n_in: int, n_out: int, axes: tuple[str, str], *, bias: bool, keys: ParamKeys, scale: float = 1.0
    ):
        self.kernel = nnx.Param(truncated_normal(keys, (n_in, n_out), scale * n_in**-0.5), axes=axes)
        self.bias = nnx.Param(jnp.zeros(n_out), axes=axes[1:]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        axis = self.kernel.get_metadata("axes")[-2]
        return self.add_bias(ops.dot(x, self.kernel.get_value(), num_parts(axis, x.shape[0])))

    def add_bias(self, y: jax.Array) -> jax.Array:
        return y if self.bias is None else y + self.bias.get_value().astype(y.dtype)


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last dimension, computed in float32."""

    def __init__(self, width: int, config: StackConfig, heads: int = 0):
        """``heads`` is the number of heads that have a scale of their own, ``[heads, width]``; they have no bias."""
        self.eps = config.norm_eps
        self.centered = config.norm == "layernorm"
        shape, axes = ((heads, width), ("norm", "norm")) if heads else ((width,), ("norm",))
        self.scale = nnx.Param(jnp.ones(shape), axes=axes) if config.norm_scale else None
        has_bias = self.centered and config.norm_bias and config.norm_scale and not heads
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        if self.centered:
            y = y - jnp.mean(y, -1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        if self.scale is not None:
            y = y * self.scale.get_value()
        if self.bias is not None:
            y = y + self.bias.get_value()
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """A table of one row a token; also the output head if embeddings are tied."""

    def __init__(self, rows: int, width: int, axes: tuple[str, str], *, keys: ParamKeys, std: float = 0.02):
        self.table = nnx.Param(truncated_normal(keys, (rows, width), std), axes=axes)

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """The rows of these tokens: ``[..., width]``."""
        table = self.table.get_value()
        if is_leaf(table):
            return ops.take(table, ids).astype(dtype)
        # Each device gets whole rows (and whole rows of the gradient): a lookup of parts of rows would move the
        # activations of all devices instead. Rows that are split over "tensor" stay split; a device looks up its own.
        axis = self.table.get_metadata("axes")[0]
        table = constrain(table, (axis, "features"))
        shards = num_shards("vocab")
        if axis == "vocab" and shards > 1 and len(table) % shards == 0:
            return _sharded_lookup(table, ids).astype(dtype)
        return ops.take(table, ids).astype(dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """``x`` times every row: ``[..., rows]``."""
        return ops.dot_t(x, self.table.get_value())


def _sharded_lookup(table_VxD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows, in float32, of a table whose rows are split over "tensor".

    GSPMD would do the same, but fails where other axes are manual. The rows are float32 because XLA on CPU aborts at a
    sum of bfloat16 in ``shard_map``.
    """
    def lookup(table_VxD, ids, first):
        own_ids = ids - first[0]
        is_own = (own_ids >= 0) & (own_ids < len(table_VxD))
        rows = jnp.take(table_VxD, jnp.where(is_own, own_ids, 0), axis=0).astype(jnp.float32)
        return jax.lax.psum(jnp.where(is_own[..., None], rows, 0), "tensor")

    firsts = jnp.arange(0, len(table_VxD), len(table_VxD) // num_shards("vocab"))
    return jax.shard_map(
        lookup, in_specs=(P("tensor"), P(), P("tensor")), out_specs=P(), axis_names={"tensor"}
    )(table_VxD, ids, firsts)


def gelu(x: jax.Array) -> jax.Array:
    """``x * Phi(x)`` (arXiv:1606.08415) by erf. ``jax.nn.gelu`` uses erfc, which is 2.4 times the work on CPU."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # arXiv:2109.08668
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "swiglu": jax.nn.silu,
    "geglu": gelu,
    "geglu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "reglu": jax.nn.relu,
}


def gated_product(config: StackConfig) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """From the outputs of ``gate`` and ``up`` to the input of ``down``: ``act(gate) * up`` (arXiv:2002.05202)."""
    if config.activation == "clamped_swiglu":  # gpt-oss
        limit, alpha = config.swiglu_limit, config.swiglu_alpha

        def clamped(gate: jax.Array, up: jax.Array) -> jax.Array:
            gate = jnp.minimum(gate, limit)
            return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(alpha * gate)

        return clamped
    act = ACTIVATIONS[config.activation]
    return lambda gate, up: act(gate) * up


class Xielu(nnx.Module):
    """xIELU (arXiv:2411.13010): ``a x^2 + x / 2`` for positive x, else ``b (exp(x) - 1 - x) + x / 2``.

    It is ``a = softplus(positive)`` and ``b = 1/2 + softplus(negative)``; both are learned, and 0.8 at first.
    """

    def __init__(self):
        self.positive = nnx.Param(jnp.full(1, np.log(np.expm1(0.8)), jnp.float32), axes=("norm",))
        self.negative = nnx.Param(jnp.full(1, np.log(np.expm1(0.3)), jnp.float32), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        a = jax.nn.softplus(self.positive.get_value()).astype(x.dtype)
        b = (0.5 + jax.nn.softplus(self.negative.get_value())).astype(x.dtype)
        # Both branches are computed everywhere: exp must not overflow where the other one counts, nor its gradient.
        return 0.5 * x + jnp.where(x > 0, a * jnp.square(x), b * (jnp.expm1(jnp.minimum(x, 0)) - x))


class Mlp(nnx.Module):
    """The feed-forward layer: ``down(act(up(x)))``, or gated ``down(gated_product(gate(x), up(x)))``."""

    def __init__(self, config: StackConfig, *, keys: ParamKeys, scale: float, ffn: int = 0):
        """``ffn`` is the number of channels; 0: that of the configuration."""
        width, ffn, bias = config.width, ffn or config.d_ffn, config.mlp_bias
        if config.activation == "xielu":
            self.act = Xielu()
        else:
            self.act = gated_product(config) if config.gated else ACTIVATIONS[config.activation]
        self.ffn_dropout = config.ffn_dropout
        self.gate = Linear(width, ffn, ("embed", "mlp"), bias=bias, keys=keys) if config.gated else None
        self.up = Linear(width, ffn, ("embed", "mlp"), bias=bias, keys=keys)
        self.down = Linear(ffn, width, ("mlp", "embed"), bias=bias, keys=keys, scale=scale)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        h = self.act(self.up(x)) if self.gate is None else self.act(self.gate(x), self.up(x))
        return self.down(ops.dropout(h, self.ffn_dropout, key))


def split_key(key: jax.Array | None, n: int) -> list[jax.Array | None]:
    """``n`` keys; without a key, ``n`` times None."""
    return [None] * n if key is None else list(jax.random.split(key, n))


def softcap(x: jax.Array, cap: float) -> jax.Array:
    """``cap * tanh(x / cap)``; 0 is off."""
    return cap * jnp.tanh(x / cap) if cap else x
