"""Whole layers go: a shallower model of the same width."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.compression.residual_stream import dense_leaves
from jaxlm.core.errors import UserError
from jaxlm.core.tree import Params, path_str
from jaxlm.nn.config import ModelConfig, Seq2SeqConfig


def block_influence(x_in: jax.Array, x_out: jax.Array) -> jax.Array:
    """How much a layer turns the residual stream ``[..., D]``: 1 minus the mean cosine (ShortGPT, arXiv:2403.03853)."""
    x_in, x_out = x_in.astype(jnp.float32), x_out.astype(jnp.float32)
    norms = jnp.linalg.norm(x_in, axis=-1) * jnp.linalg.norm(x_out, axis=-1)
    return 1 - jnp.mean(jnp.sum(x_in * x_out, -1) / jnp.maximum(norms, 1e-30))


def layers_to_drop(total: int, count: int, influence: Sequence[float] | None = None) -> tuple[int, ...]:
    """``count`` of ``total`` layers: those of least influence, or, without it, evenly spaced between first and last."""
    if not 0 < count < total:
        raise UserError(f"dropping {count} of {total} layers is impossible; use 1 to {total - 1}")
    if influence is None:
        kept = np.round(np.linspace(0, total - 1, total - count)).astype(int)
        return tuple(sorted(set(range(total)) - set(kept.tolist())))
    if len(influence) != total:
        raise UserError(f"there are {total} layers and {len(influence)} influences")
    return tuple(sorted(np.argsort(np.asarray(influence, np.float64), kind="stable")[:count].tolist()))


def drop_layers(
    config: ModelConfig, params: Params, layers: Sequence[int], *, side: Literal["encoder", "decoder"] = "decoder"
) -> tuple[ModelConfig, Params]:
    """The model without some layers of its decoder or encoder; those that follow read what those before wrote.

    UserError for layers that there are not, for all of them, and where the layers of encoder and decoder have windows
    that one configuration could not tell any more.
    """
    leaves = dense_leaves(config, params, "dropping layers")
    where = re.compile(rf"{side}/layers/(\d+)/.*")
    lengths = {int(match[1]): len(leaf) for path, leaf in leaves.items() if (match := where.fullmatch(path))}
    total = sum(lengths.values())
    if not set(layers) <= set(range(total)) or not 0 < len(set(layers)) < total:
        raise UserError(f"cannot drop the layers {sorted(set(layers))} of the {side}, which has {total} from 0 on")
    kept = [layer for layer in range(total) if layer not in set(layers)]
    starts = dict(zip(lengths, itertools.accumulate(lengths.values(), initial=0), strict=False))
    inside = {i: [layer - starts[i] for layer in kept if 0 <= layer - starts[i] < lengths[i]] for i in sorted(lengths)}
    numbers = {old: new for new, old in enumerate(old for old, found in inside.items() if found)}
    flat = []
    for path, variable in nnx.to_flat_state(params):
        if match := where.fullmatch(path_str(path)):
            layer_group = int(match[1])
            if layer_group not in numbers:
                continue
            path = (*path[:2], numbers[layer_group], *path[3:])
            variable = variable.replace(variable.get_value()[np.array(inside[layer_group])])
        flat.append((path, variable))
    counts = tuple(len(inside[old]) for old in numbers)
    return _with_layers(config, kept, counts, side), nnx.from_flat_state(flat)


def _with_layers(config: ModelConfig, kept: list[int], counts: tuple[int, ...], side: str) -> ModelConfig:
    """The configuration when of one side only the layers ``kept`` are left, in runs of ``counts``."""
    prefix = f"{side}_" if isinstance(config, Seq2SeqConfig) else ""
    other = 0
    if isinstance(config, Seq2SeqConfig):
        other = config.encoder_layers if side == "decoder" else config.decoder_layers
    cycle, dense = config.windows or (0,), set(config.dense_layers)
    kinds = [(cycle[layer % len(cycle)], layer in dense) for layer in kept]
    others = [(cycle[layer % len(cycle)], layer in dense) for layer in range(other)]
    told, shorter = sorted((kinds, others), key=len, reverse=True)
    if told[: len(shorter)] != shorter:
        raise UserError(
            "without these layers those of encoder and decoder would have different windows or experts; drop others"
        )
    windows = tuple(window for window, _ in told)
    if windows == tuple(cycle[i % len(cycle)] for i in range(len(windows))):
        windows = config.windows
    changes = {
        f"{prefix}layers": len(kept), "windows": windows,
        "dense_layers": tuple(i for i, (_, is_dense) in enumerate(told) if is_dense),
    }
    runs = tuple(len(list(run)) for _, run in itertools.groupby(kinds, lambda kind: config.experts > 0 and not kind[1]))
    explicit = config.side_layer_groups(side)
    changes[f"{prefix}layer_groups"] = counts if explicit or counts != runs else ()
    return dataclasses.replace(config, **changes)
