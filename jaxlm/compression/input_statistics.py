"""Statistics of the inputs of a layer's kernels, as steps that solve with data need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import CalibratedLayer, LayerParams
from jaxlm.compression.observers import Observe, Statistics
from jaxlm.core.errors import UserError

__all__ = ["group_by_input", "observe_inputs", "replace_idle_experts", "second_moment"]

# The kernels of a layer in the order in which they run; those of one entry have the same input.
_ORDER = (
    ("attn/q", "attn/k", "attn/v"), ("attn/o",), ("cross/k", "cross/v"), ("cross/q",), ("cross/o",),
    ("mlp/gate", "mlp/up"), ("mlp/experts/gate", "mlp/experts/up"), ("mlp/shared/gate", "mlp/shared/up"),
    ("mlp/down",), ("mlp/experts/down",), ("mlp/shared/down",),
)


def group_by_input(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The kernels ``names`` of a layer in the order in which they run, those with the same input together."""
    for group in _ORDER:
        if found := tuple(f"{name}/kernel" for name in group if f"{name}/kernel" in names):
            yield found


def observe_inputs(
    layer: CalibratedLayer,
    how: Observe,
    params: LayerParams | None = None,
    groups: Sequence[tuple[str, ...]] | None = None,
) -> dict[str, Statistics]:
    """Statistics of the input of each target, taken once where several targets have the same input.

    Args:
        layer: the layer.
        how: the observer.
        params: the layer's parameters; None: as they are.
        groups: kernels with the same input; None: all targets.

    Raises:
        UserError: when a kernel saw no token.
    """
    groups = list(group_by_input(layer.targets)) if groups is None else groups
    statistics = layer.observe(how, [group[0] for group in groups], params)
    for name, each in statistics.items():
        if not float(jnp.sum(each["count"])) > 0:
            raise UserError(f"{layer.path(name)} saw no token of the calibration data; give more")
    return {name: statistics[group[0]] for group in groups for name in group}


def replace_idle_experts(
    layer: CalibratedLayer, name: str, statistics: Statistics, action: str, values: jax.Array
) -> jax.Array:
    """``values`` (``[E, in]`` or ``[E, in, in]``) with those of experts that saw too few tokens replaced by ones or an
    identity, so that a solver does without data there. Notes which experts, and that they are ``action`` without
    data."""
    n_in = values.shape[-1]
    few_E = statistics["count"] < n_in / 4
    if statistics["count"].ndim and (count := int(few_E.sum())):
        seen = ", ".join(str(int(each)) for each in statistics["count"][few_E][:4])
        layer.notes.append(
            f"{layer.path(name)}: {count} of {len(few_E)} experts saw too few tokens of the calibration data "
            f"({seen}): {action} without data"
        )
    neutral = jnp.ones(n_in) if values.ndim == few_E.ndim + 1 else jnp.eye(n_in)
    return jnp.where(few_E.reshape(few_E.shape + (1,) * (values.ndim - few_E.ndim)), neutral, values)


def second_moment(layer: CalibratedLayer, name: str, statistics: Statistics, action: str) -> jax.Array:
    """``E[x x^T]`` of a kernel's inputs, ``[in, in]`` or ``[E, in, in]``, from the statistics of ``observers.gram``.

    It is the Hessian of the layer-wise error. ``action`` is what happens to experts that saw too few tokens, for the
    note.
    """
    count = jnp.maximum(statistics["count"], 1)[..., None, None]
    h = statistics["gram"] / count
    return replace_idle_experts(layer, name, statistics, action, h) if statistics["count"].ndim else h
