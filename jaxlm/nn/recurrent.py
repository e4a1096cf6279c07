"""The LSTM language model, the recurrent baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.ops import dropout
from jaxlm.nn.config import LSTMConfig
from jaxlm.nn.layers import Embedding, Linear, ParamKeys, split_key


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LSTMState:
    """The state of every layer. Padding at the left (slots before ``start``) leaves it at zero.

    In beam search each of the B sentences has several rows, its beams, one after the other.
    """

    hidden: tuple[jax.Array, ...]  # for each layer [B * beams, H]
    cell: tuple[jax.Array, ...]
    index: jax.Array  # int32 scalar: tokens read so far, padding included
    start: jax.Array  # int32 [B]

    def replace(self, **changes) -> LSTMState:
        return replace(self, **changes)

    def fork(self, beams: int) -> LSTMState:
        """Every row as ``beams`` equal rows."""
        hidden, cell = jax.tree.map(lambda x: jnp.repeat(x, beams, 0), (self.hidden, self.cell))
        return replace(self, hidden=hidden, cell=cell)

    def take(self, rows_B: jax.Array) -> LSTMState:
        """The state of some of the sentences."""

        def of(x_RxH):
            x_BxKxH = x_RxH.reshape(len(self.start), -1, x_RxH.shape[-1])
            return x_BxKxH[rows_B].reshape(-1, x_RxH.shape[-1])

        hidden, cell = jax.tree.map(of, (self.hidden, self.cell))
        return replace(self, hidden=hidden, cell=cell, start=self.start[rows_B])

    def grow(self, count: int) -> LSTMState:
        """The same state: its size does not depend on the number of tokens."""
        return self

    def reorder(self, beams_BxK: jax.Array) -> LSTMState:
        """After ``fork``: beam k continues from the state of the given beam of its sentence."""
        batch, beams = beams_BxK.shape
        rows = (beams * jnp.arange(batch)[:, None] + beams_BxK).reshape(-1)
        hidden, cell = jax.tree.map(lambda x: x[rows], (self.hidden, self.cell))
        return replace(self, hidden=hidden, cell=cell)


class LSTMLayer(nnx.Module):
    """``c' = f * c + i * g``, ``h' = o * tanh(c')``; one product gives the four gates (input, forget, cell, output).

    The forget gate starts open (bias 1; Jozefowicz et al. 2015).
    """

    def __init__(self, n_in: int, hidden: int, *, keys: ParamKeys):
        self.input = Linear(n_in, 4 * hidden, ("embed", "mlp"), bias=True, keys=keys)
        self.recurrent = Linear(hidden, 4 * hidden, ("embed", "mlp"), bias=False, keys=keys)
        self.input.bias.set_value(self.input.bias.get_value().at[hidden : 2 * hidden].set(1.0))

    def __call__(self, x_BxTxD: jax.Array, h_BxH: jax.Array, c_BxH: jax.Array, real_BxT: jax.Array):
        """``(outputs [B, T, H], h, c)``; where ``real`` is false, a step does not change the state."""

        def step(carry, inputs):
            h, c = carry
            gates_Bx4H, real_B = inputs
            i, f, g, o = jnp.split(gates_Bx4H + self.recurrent(h), 4, -1)
            c_new = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h_new = jax.nn.sigmoid(o) * jnp.tanh(c_new)
            keep = real_B[:, None]
            h, c = jnp.where(keep, h_new, h), jnp.where(keep, c_new, c)
            return (h, c), h

        gates_TxBx4H = self.input(x_BxTxD).swapaxes(0, 1)
        (h_BxH, c_BxH), out_TxBxH = jax.lax.scan(step, (h_BxH, c_BxH), (gates_TxBx4H, real_BxT.T))
        return out_TxBxH.swapaxes(0, 1), h_BxH, c_BxH


class LSTMLM(nnx.Module):
    """From tokens to the logits of the tokens that follow them, with the same methods as ``DecoderLM``."""

    def __init__(self, config: LSTMConfig, *, keys: ParamKeys):
        self.config = config
        hidden, width = config.d_hidden, config.width
        self.embed = Embedding(config.vocab_size, width, ("vocab", "embed"), keys=keys, std=width**-0.5)
        self.layers = nnx.List(
            [LSTMLayer(width if i == 0 else hidden, hidden, keys=keys) for i in range(config.layers)]
        )
        # A tied head needs an output as wide as the embedding.
        bridged = config.tie_embeddings and hidden != width
        self.bridge = Linear(hidden, width, ("mlp", "embed"), bias=False, keys=keys) if bridged else None
        untied = not config.tie_embeddings
        self.head = Linear(hidden, config.vocab_size, ("embed", "vocab"), bias=False, keys=keys) if untied else None

    def __call__(self, tokens_BxT: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """Logits ``[B, T, V]`` in float32. Dropout needs a ``key``."""
        return self._advance(tokens_BxT, self.init_cache(tokens_BxT.shape[0], 0), key)[0]

    def init_cache(self, batch: int, length: int) -> LSTMState:
        """The zero state of ``batch`` rows; its size does not depend on ``length``."""
        zeros = tuple(jnp.zeros((batch, self.config.d_hidden), self.config.dtype) for _ in self.layers)
        return LSTMState(zeros, jax.tree.map(jnp.copy, zeros), jnp.int32(0), jnp.zeros(batch, jnp.int32))

    def decode(self, tokens_BxT: jax.Array, cache: LSTMState) -> tuple[jax.Array, LSTMState]:
        """Appends T tokens to every row: their logits ``[B, T, V]`` and the state after them."""
        return self._advance(tokens_BxT, cache, None)

    def _advance(self, tokens_BxT, state: LSTMState, key) -> tuple[jax.Array, LSTMState]:
        rate, T = self.config.dropout, tokens_BxT.shape[1]
        keys = split_key(key, len(self.layers) + 1)
        start_B = jnp.repeat(state.start, len(tokens_BxT) // len(state.start))
        real_BxT = state.index + jnp.arange(T)[None] >= start_B[:, None]
        x = dropout(self.embed(tokens_BxT, jnp.dtype(self.config.dtype)), rate, keys[-1])
        hidden, cell = [], []
        for layer, h, c, layer_key in zip(self.layers, state.hidden, state.cell, keys, strict=False):
            x, h, c = layer(x, h, c, real_BxT)
            x = dropout(x, rate, layer_key)
            hidden.append(h)
            cell.append(c)
        x = x if self.bridge is None else self.bridge(x)
        logits = self.embed.logits(x) if self.head is None else self.head(x)
        state = state.replace(hidden=tuple(hidden), cell=tuple(cell), index=state.index + T)
        return logits.astype(jnp.float32), state
