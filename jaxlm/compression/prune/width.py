"""Pruning of the width: channels of the residual stream are removed from all that writes, normalises or reads it."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.heads import head_size
from jaxlm.compression.prune.units import InputData, data_of, refit, remaining, select, squared_norm, top_indices
from jaxlm.compression.residual_stream import (
    Leaves,
    bias_path,
    dense_leaves,
    input_norm,
    learned_positions,
    learned_scales,
    multiply_rows,
    normed_inputs,
    replace_leaves,
    role,
    writes_stream,
)
from jaxlm.core.tree import Params, flatten
from jaxlm.nn.config import ModelConfig, StackConfig


def prune_width(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    multiple: int = 1,
    mean_squares: InputData | None = None,
    grams: InputData | None = None,
    damping: float = 1e-3,
) -> tuple[ModelConfig, Params]:
    """Removes about the share ``share`` of the channels of the residual stream.

    The score of a channel is its share in what each kernel that reads the stream computes, averaged over the kernels.
    Where biases of norms reach a kernel through the removed channels, the kernel's bias takes them up if it has one.

    A norm divides by the root mean square over the width. All that is written to the stream shrinks by
    ``sqrt(new width / width)``, so that every norm divides by the same number as before (its epsilon included) where
    the removed channels are zero. Models with RMSNorm then compute exactly what they did. So do models with LayerNorm
    if the mean of the remaining channels is zero too, which can always be arranged, as a LayerNorm subtracts the mean.

    Heads and feed-forward blocks stay as they are; sinusoidal positions become a learned table.

    Args:
        config, params: a dense Transformer.
        share: of the channels, 0 to 1.
        multiple: divides the number of channels that remain.
        mean_squares, grams: about the inputs of the kernels that read the stream; see ``units``. Without them the score
            comes from the sizes of what is written, of the norm's scale and of the kernel's rows. With ``grams`` these
            kernels are solved anew.
        damping: see ``units.refit``.

    Raises:
        UserError: when the heads of encoder and decoder differ in size, and when all channels or none would remain.
    """
    dense_leaves(config, params, "pruning the width")
    size = head_size(config)
    config, params = learned_scales(*learned_positions(config, params))
    leaves = flatten(params)
    left = remaining(config.width, share, "channels of the width", multiple)
    kept = top_indices(_scores(config, leaves, mean_squares, grams), left)
    removed = jnp.setdiff1d(jnp.arange(config.width), kept)
    new = dict(leaves)
    for path, leaf in leaves.items():
        kind = role(path)
        if kind in ("table", "writer", "norm"):
            new[path] = select(leaf, kept, -1)
        elif kind == "reader":
            gram = None if grams is None or path not in grams else data_of(grams, path)
            new[path], _ = refit(leaf, None, kept, None, gram, damping)
            shift, bias = leaves.get(f"{input_norm(config, path)}/bias"), bias_path(path)
            if shift is not None and bias in leaves and gram is None:
                new[bias] += multiply_rows(shift[..., removed], leaf[..., removed, :]).astype(leaf.dtype)
    _shrink(config, new, (left / config.width) ** 0.5)
    changes = {"width": left, "head_dim": size, "ffn": config.d_ffn}
    return dataclasses.replace(config, **changes), replace_leaves(params, new)


def _shrink(config: ModelConfig, new: Leaves, s: float) -> None:
    """Multiplies the residual stream, and what norms read, by ``s``, in place; the model computes the same.

    Where embeddings are multiplied by the root of the width, the smaller width does so by itself.
    """
    for path, leaf in list(new.items()):
        kind, factor = role(path), 1.0
        if kind == "table":
            factor = 1.0 if config.embed_scale and path.endswith("embed/table") else s
        elif kind == "writer":
            factor = s
        elif kind == "norm":
            norm, part = path.rsplit("/", 1)
            if writes_stream(config, norm):
                factor = s if part == "bias" else 1.0
            else:
                factor = 1.0 if part == "bias" else 1 / s
        elif kind == "reader" and input_norm(config, path) is None:
            factor = 1 / s
        new[path] = leaf * jnp.asarray(factor, leaf.dtype)
    if config.tie_embeddings:  # the head multiplies by the table, which has shrunk
        factor = 1.0 if config.embed_scale else 1 / s
        if config.norm_position != "post":
            for path in new.keys() & {"decoder/final_norm/scale", "decoder/final_norm/bias"}:
                new[path] = new[path] * jnp.asarray(factor, new[path].dtype)
        else:  # the last norm of the last layer; only the head reads its output
            last = max(int(path.split("/")[2]) for path in new if path.startswith("decoder/layers/"))
            for part in ("scale", "bias"):
                if (path := f"decoder/layers/{last}/mlp_norm/{part}") in new:
                    new[path] = new[path].at[-1].multiply(factor / s)


def _scores(
    config: StackConfig, leaves: Leaves, mean_squares: InputData | None, grams: InputData | None
) -> jax.Array:
    """Each channel's share in what the kernels compute from the stream, averaged over the kernels, ``[D]``."""
    written, shares = _written(config, leaves), []
    readers = {path: leaf for path, leaf in leaves.items() if role(path) == "reader"}
    if config.tie_embeddings:
        readers["head/kernel"] = leaves["embed/table"].T
    for path, kernel in readers.items():
        rows = squared_norm(kernel, -1)
        if mean_squares is not None and path in mean_squares:
            square = data_of(mean_squares, path)
        elif grams is not None and path in grams:
            square = jnp.diagonal(data_of(grams, path), axis1=-2, axis2=-1)
        else:
            scale = leaves.get(f"{input_norm(config, path)}/scale")
            square = written if scale is None else written * jnp.square(scale)
        if rows.ndim - square.ndim == 1 and rows.ndim == 3:  # experts, which read the output of one norm
            square = square[..., None, :]
        shares.append(_shares(rows * square))
    return jnp.mean(jnp.stack(shares), 0)


def _written(config: StackConfig, leaves: Leaves) -> jax.Array:
    """Each channel's share in what tables, kernels and biases write to the stream, averaged over them, ``[D]``."""
    shares = []
    for path, leaf in leaves.items():
        kind = role(path)
        if kind == "table" or kind == "writer" and path.endswith("/kernel"):
            columns = squared_norm(leaf, -2)
            out = re.sub(r"(attn|cross|mlp)/.*", r"\1_out_norm/scale", path)
            if not normed_inputs(config):
                out = out.replace("_out_norm", "_norm")
            if kind == "writer" and out in leaves:
                scale = jnp.square(leaves[out])
                columns = columns * (scale[:, None] if columns.ndim == 3 else scale)
            shares.append(_shares(columns))
        elif kind == "writer" or (
            kind == "norm" and path.endswith("/bias") and writes_stream(config, path.removesuffix("/bias"))
        ):
            shares.append(_shares(jnp.square(leaf.astype(jnp.float32))))
    return jnp.mean(jnp.stack(shares), 0)


def _shares(squares: jax.Array) -> jax.Array:
    """The shares of the entries of the last axis in their sum, averaged over the other axes."""
    total = jnp.sum(squares, -1, keepdims=True)
    return jnp.mean((squares / jnp.where(total > 0, total, 1)).reshape(-1, squares.shape[-1]), 0)
