"""A model one layer at a time: what calibrates weights, or solves for them, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.tree import Leaf, Params, unflatten
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.decoder import embed, head_logits
from jaxlm.nn.stack import layer_groups_of

__all__ = ["LayerParams", "LayerPosition", "LayerState", "LayerwiseModel", "TokenBatch"]

TokenBatch = tuple[jax.Array, ...]  # (tokens [B, T],), or (source [B, S], decoder inputs [B, T])
LayerParams = Mapping[str, Leaf]  # path within the layer, as "attn/q/kernel" -> its leaf, without the layer dimension
LayerState = tuple[jax.Array, jax.Array | None]  # what layers pass on: [B, T, D], and the encoder's output or None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPosition:
    """Where a layer's parameters are: in row ``row`` of those of a layer_group."""

    side: Literal["encoder", "decoder"] = field(metadata={"static": True})
    layer_group: int = field(metadata={"static": True})
    row: jax.Array | int

    @property
    def prefix(self) -> str:
        """Of the paths of the layer_group."""
        return f"{self.side}/layers/{self.layer_group}/"


@dataclass(frozen=True)
class LayerwiseModel:
    """The layers of a Transformer in the order they run, and pure functions from one to the next (to be jitted)."""

    config: ModelConfig
    graphdef: nnx.GraphDef

    def layer_positions(self) -> Iterator[LayerPosition]:
        for side in ("encoder", "decoder") if self.config.kind == "seq2seq" else ("decoder",):
            for layer_group, run in enumerate(layer_groups_of(self.config, side)):
                yield from (LayerPosition(side, layer_group, row) for row in range(len(run)))

    def embed(self, params: Params, batch: TokenBatch) -> LayerState:
        """What the first layer is given."""
        model = nnx.merge(self.graphdef, params)
        side = "encoder" if len(batch) == 2 else "decoder"
        return _inputs(model, side, batch)[0], None

    def enter_decoder(self, params: Params, batch: TokenBatch, state: LayerState) -> LayerState:
        """What the first layer of a decoder is given, from what the last one of the encoder gave."""
        model = nnx.merge(self.graphdef, params)
        return _inputs(model, "decoder", batch)[0], model.encoder.finish(state[0])

    def run_layer(self, params: Params, place: LayerPosition, layer: LayerParams, batch: TokenBatch, state: LayerState) -> LayerState:
        """Through the layer at ``place``, with the parameters ``layer``; of ``params`` only those around the layers
        are used."""
        model = nnx.merge(self.graphdef, params)
        _, view, _ = _inputs(model, place.side, batch)
        stack = getattr(model, place.side)
        graphdef, like = nnx.split(stack.layers[place.layer_group])
        block = nnx.merge(graphdef, unflatten(like, dict(layer)))
        traits = jax.tree.map(lambda each: each[place.row], stack.layer_settings(place.layer_group))
        x_BxTxD, memory = state
        return stack.run_layer(block, x_BxTxD, view, traits, memory=memory)[0], memory

    def logits(self, params: Params, state: LayerState) -> jax.Array:
        """Logits ``[B, T, V]``, from what the last layer gave."""
        model = nnx.merge(self.graphdef, params)
        return head_logits(model, model.decoder.finish(state[0]))

    def row_weights(self, place: LayerPosition, name: str, batch: TokenBatch) -> jax.Array | None:
        """How much each row counts that the kernel ``name`` of a layer is given: ``[B * T]`` float32, 0 for padding.

        None where there is no padding, and for experts, to whom rows come sorted.
        """
        if len(batch) == 1 or "/experts/" in name:
            return None
        if place.side == "encoder" or name.startswith(("cross/k/", "cross/v/")):
            real = batch[0] != self.config.pad_id
        else:  # the first input is the start token, which may be the padding token
            real = (batch[1] != self.config.pad_id).at[:, 0].set(True)
        return real.reshape(-1).astype(jnp.float32)


def _inputs(model: Any, side: str, batch: TokenBatch):
    """Of a side's first layer: its input, the view and keys; see ``Stack.enter``."""
    if len(batch) == 1:
        return model.decoder.start(embed(model.embed, batch[0], model.config))
    mask_BxS = model.source_mask(batch[0])
    if side == "encoder":
        return model.encoder.start(model.embed_source(batch[0]), real_BxT=mask_BxS)
    return model.decoder.start(embed(model.embed, batch[1], model.config), memory_mask_BxM=mask_BxS)
