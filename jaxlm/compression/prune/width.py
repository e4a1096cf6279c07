"""Pruning the width: channels of the residual stream go, from everything that writes, normalises or reads it."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.structured import head_size
from jaxlm.compression.prune.units import Statistics, largest, of, refit, remaining, select, squares
from jaxlm.compression.quantize.rotate import through
from jaxlm.compression.residual_stream import (
    Leaves,
    bias_of,
    dense_leaves,
    input_norm,
    learned_positions,
    normed_inputs,
    replace_leaves,
    role,
    writes,
)
from jaxlm.core.tree import Params, flatten
from jaxlm.nn.config import ModelConfig, StackConfig


def prune_width(
    config: ModelConfig,
    params: Params,
    share: float,
    *,
    multiple: int = 1,
    statistics: Statistics | None = None,
    grams: Statistics | None = None,
    damping: float = 1e-3,
) -> tuple[ModelConfig, Params]:
    """About ``share`` of the channels of the residual stream go, everywhere; ``multiple`` divides what is left.

    A channel is judged by its part of what each kernel that reads the stream makes of it, on average over the kernels:
    by the statistics of those kernels where they are given, else by the sizes of what is written, of the norm's scale
    and of the kernel's rows. With ``grams`` of such kernels, they are solved anew. What biases of norms gave through
    the channels, biases of kernels take up where there are any.

    A norm divides by the mean square over the width. All that is written shrinks by ``sqrt(new width / width)``, so
    that where the channels that go are zero every norm, its epsilon included, divides by what it divided by: RMSNorm
    models then compute exactly what they did, and models with LayerNorm if the mean of the channels that stay is zero
    too, as it always can be made (a LayerNorm does not see it).

    Heads and feed-forward blocks stay as they are; sinusoidal positions become a learned table.
    UserError where the encoder's and the decoder's heads differ in size.
    """
    dense_leaves(config, params, "pruning the width")
    size = head_size(config)
    config, params = learned_positions(config, params)
    leaves = flatten(params)
    left = remaining(config.width, share, "channels of the width", multiple)
    kept = largest(_scores(config, leaves, statistics, grams), left)
    gone = jnp.setdiff1d(jnp.arange(config.width), kept)
    new = dict(leaves)
    for path, leaf in leaves.items():
        kind = role(path)
        if kind in ("table", "writer", "norm"):
            new[path] = select(leaf, kept, -1)
        elif kind == "reader":
            gram = None if grams is None or path not in grams else of(grams, path)
            new[path], _ = refit(leaf, None, kept, None, gram, damping)
            shift, bias = leaves.get(f"{input_norm(config, path)}/bias"), bias_of(path)
            if shift is not None and bias in leaves and gram is None:
                new[bias] += through(shift[..., gone], leaf[..., gone, :]).astype(leaf.dtype)
    _shrink(config, new, (left / config.width) ** 0.5)
    changes = {"width": left, "head_dim": size, "ffn": config.d_ffn}
    return dataclasses.replace(config, **changes), replace_leaves(params, new)


def _shrink(config: ModelConfig, new: Leaves, s: float) -> None:
    """The same model with its residual stream, and what norms read, times ``s``.

    Where embeddings are multiplied by the root of the width, the smaller width does that by itself.
    """
    for path, leaf in list(new.items()):
        kind, factor = role(path), 1.0
        if kind == "table":
            factor = 1.0 if config.embed_scale and path.endswith("embed/table") else s
        elif kind == "writer":
            factor = s
        elif kind == "norm":
            norm, part = path.rsplit("/", 1)
            if writes(config, norm):
                factor = s if part == "bias" else 1.0
            else:
                factor = 1.0 if part == "bias" else 1 / s
        elif kind == "reader" and input_norm(config, path) is None:
            factor = 1 / s
        new[path] = leaf * jnp.asarray(factor, leaf.dtype)
    if config.tie_embeddings:  # the head multiplies by what became of the table
        factor = 1.0 if config.embed_scale else 1 / s
        if config.norm_position != "post":
            for path in new.keys() & {"decoder/final_norm/scale", "decoder/final_norm/bias"}:
                new[path] = new[path] * jnp.asarray(factor, new[path].dtype)
        else:  # the last norm of the last layer, after which only the head reads
            last = max(int(path.split("/")[2]) for path in new if path.startswith("decoder/layers/"))
            for part in ("scale", "bias"):
                if (path := f"decoder/layers/{last}/mlp_norm/{part}") in new:
                    new[path] = new[path].at[-1].multiply(factor / s)


def _scores(config: StackConfig, leaves: Leaves, statistics: Statistics | None, grams: Statistics | None) -> jax.Array:
    """``[D]``: the mean of each channel's shares in what the kernels make of the stream."""
    written, shares = _written(config, leaves), []
    readers = {path: leaf for path, leaf in leaves.items() if role(path) == "reader"}
    if config.tie_embeddings:
        readers["head/kernel"] = leaves["embed/table"].T
    for path, kernel in readers.items():
        rows = squares(kernel, -1)
        if statistics is not None and path in statistics:
            square = of(statistics, path)
        elif grams is not None and path in grams:
            square = jnp.diagonal(of(grams, path), axis1=-2, axis2=-1)
        else:
            scale = leaves.get(f"{input_norm(config, path)}/scale")
            square = written if scale is None else written * jnp.square(scale)
        if rows.ndim - square.ndim == 1 and rows.ndim == 3:  # experts, which read one norm
            square = square[..., None, :]
        shares.append(_shares(rows * square))
    return jnp.mean(jnp.stack(shares), 0)


def _written(config: StackConfig, leaves: Leaves) -> jax.Array:
    """``[D]``: each channel's share in what the tables, kernels and biases write, on average over them."""
    shares = []
    for path, leaf in leaves.items():
        kind = role(path)
        if kind == "table" or kind == "writer" and path.endswith("/kernel"):
            columns = squares(leaf, -2)
            out = re.sub(r"(attn|cross|mlp)/.*", r"\1_out_norm/scale", path)
            if not normed_inputs(config):
                out = out.replace("_out_norm", "_norm")
            if kind == "writer" and out in leaves:
                scale = jnp.square(leaves[out])
                columns = columns * (scale[:, None] if columns.ndim == 3 else scale)
            shares.append(_shares(columns))
        elif kind == "writer" or kind == "norm" and path.endswith("/bias") and writes(config, path[: -len("/bias")]):
            shares.append(_shares(jnp.square(leaf.astype(jnp.float32))))
    return jnp.mean(jnp.stack(shares), 0)


def _shares(squares: jax.Array) -> jax.Array:
    """Of the last axis in its sum, averaged over the others."""
    total = jnp.sum(squares, -1, keepdims=True)
    return jnp.mean((squares / jnp.where(total > 0, total, 1)).reshape(-1, squares.shape[-1]), 0)
