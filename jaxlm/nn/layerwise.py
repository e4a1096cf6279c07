"""A model one layer at a time, for methods that calibrate or solve for weights layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.core.tree import Leaf, Params, unflatten
from jaxlm.nn.block import LayerContext
from jaxlm.nn.config import ModelConfig, Side, layer_groups_of
from jaxlm.nn.decoder import DecoderLM
from jaxlm.nn.embeddings import embed, head_logits
from jaxlm.nn.positions import text_lengths
from jaxlm.nn.seq2seq import Seq2Seq
from jaxlm.nn.stack import run_layer

__all__ = ["LayerParams", "LayerPosition", "LayerState", "LayerwiseModel", "TokenBatch"]

TokenBatch = tuple[jax.Array, ...]  # (tokens [B, T],), or (source [B, S], decoder inputs [B, T])
LayerParams = Mapping[str, Leaf]  # path within the layer, as "attn/q/kernel" -> its leaf, without the layer dimension
LayerState = tuple[jax.Array, jax.Array | None]  # what layers pass on: [B, T, D], and the encoder's output or None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerPosition:
    """Where the parameters of a layer are: row ``row`` of the arrays of a layer group."""

    side: Side = field(metadata={"static": True})
    layer_group: int = field(metadata={"static": True})
    row: jax.Array | int

    @property
    def prefix(self) -> str:
        """With what the paths of the parameters of the layer group begin."""
        return f"{self.side}/layers/{self.layer_group}/"


@dataclass(frozen=True)
class LayerwiseModel:
    """The layers of a Transformer in the order they run, and pure functions from one to the next (to be jitted)."""

    config: ModelConfig
    graphdef: nnx.GraphDef

    def layer_positions(self) -> Iterator[LayerPosition]:
        """The positions of all layers, the encoder's first."""
        for side in self.config.sides:
            for layer_group, run in enumerate(layer_groups_of(self.config, side)):
                yield from (LayerPosition(side, layer_group, row) for row in range(len(run)))

    def embed(self, params: Params, batch: TokenBatch) -> LayerState:
        """The input of the first layer."""
        model = nnx.merge(self.graphdef, params)
        return _start(model, self.config.sides[0], batch)[0], None

    def enter_decoder(self, params: Params, batch: TokenBatch, state: LayerState) -> LayerState:
        """From the output of the encoder's last layer to the input of the decoder's first."""
        model = nnx.merge(self.graphdef, params)
        return _start(model, "decoder", batch)[0], model.encoder.finish(state[0])

    def run_layer(
        self, params: Params, position: LayerPosition, layer: LayerParams, batch: TokenBatch, state: LayerState
    ) -> LayerState:
        """The layer at ``position`` with the parameters ``layer``. Of ``params`` it reads only what is around the
        layers."""
        model = nnx.merge(self.graphdef, params)
        _, context = _start(model, position.side, batch)
        stack = model.encoder if position.side == "encoder" else model.decoder
        graphdef, like = nnx.split(stack.layers[position.layer_group])
        block = nnx.merge(graphdef, unflatten(like, dict(layer)))
        settings = jax.tree.map(lambda each: each[position.row], stack.layer_settings(position.layer_group))
        x_BxTxD, memory_BxMxD = state
        x_BxTxD, *_ = run_layer(stack.config, block, x_BxTxD, context, settings, memory_BxMxD=memory_BxMxD)
        return x_BxTxD, memory_BxMxD

    def logits(self, params: Params, state: LayerState) -> jax.Array:
        """Logits ``[B, T, V]``, from the output of the last layer."""
        model = nnx.merge(self.graphdef, params)
        return head_logits(model, model.decoder.finish(state[0]))

    def row_weights(self, position: LayerPosition, name: str, batch: TokenBatch) -> jax.Array | None:
        """How much each row of the input of a layer's kernel ``name`` counts: ``[B * T]`` float32, 0 for padding.

        None for batches without padding (one array of tokens), and for experts, whose rows are sorted.
        """
        if len(batch) == 1 or "/experts/" in name:
            return None
        if position.side == "encoder" or name.startswith(("cross/k/", "cross/v/")):
            real = batch[0] != self.config.pad_id
        else:  # the first input is the start token, which may be the padding token
            real = (batch[1] != self.config.pad_id).at[:, 0].set(True)
        return real.reshape(-1).astype(jnp.float32)


def _start(model: DecoderLM | Seq2Seq, side: Side, batch: TokenBatch) -> tuple[jax.Array, LayerContext]:
    """The input of the first layer of a stack, and the context of its layers; see ``Stack.start``."""
    if len(batch) == 1:
        return model.decoder.start(embed(model.embed, batch[0], model.config))[:2]
    mask_BxS = model.source_mask(batch[0])
    if side == "encoder":
        return model.encoder.start(model.embed_source(batch[0]), real_BxT=mask_BxS)[:2]
    # The first input is the start token, which may be the padding token.
    length_B = text_lengths((batch[1] != model.config.pad_id).at[:, 0].set(True))
    x_BxTxD = embed(model.embed, batch[1], model.config)
    return model.decoder.start(x_BxTxD, memory_mask_BxM=mask_BxS, length_B=length_B)[:2]
