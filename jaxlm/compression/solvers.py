"""Steps that solve for weights with data: GPTQ, SparseGPT, Wanda."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import Block, Layer, Reading, gram, moments
from jaxlm.compression.prune.scores import wanda
from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.column_solver import SolverInfo
from jaxlm.compression.quantize.gptq import gptq
from jaxlm.compression.quantize.rtn import IntegerGrid
from jaxlm.compression.steps import BLOCKS, BlockStep, check_grid, check_sparsity
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import QArray

__all__ = ["Gptq", "SparseGpt", "Wanda"]

# Kernels of a layer in the order their inputs are there; those of one entry have the same input.
_ORDER = (
    ("attn/q", "attn/k", "attn/v"), ("attn/o",), ("cross/k", "cross/v"), ("cross/q",), ("cross/o",),
    ("mlp/gate", "mlp/up"), ("mlp/experts/gate", "mlp/experts/up"), ("mlp/down",), ("mlp/experts/down",),
)


def by_input(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Names of kernels of a layer, those with the same input together, in the order they run."""
    for group in _ORDER:
        if found := tuple(f"{name}/kernel" for name in group if f"{name}/kernel" in names):
            yield found


def read_inputs(block: Block, how, layer: Layer | None = None, groups=None) -> dict[str, Reading]:
    """What ``how`` measures of the input of each target, measured once where several have the same.

    UserError where no token came by.
    """
    groups = list(by_input(block.targets)) if groups is None else groups
    readings = block.measure(how, [group[0] for group in groups], layer)
    for name, reading in readings.items():
        if not float(jnp.sum(reading["count"])) > 0:
            raise UserError(f"{block.path(name)} saw no token of the calibration data; give more")
    return {name: readings[group[0]] for group in groups for name in group}


def experts_alone(block: Block, name: str, reading: Reading, what: str, like: jax.Array) -> jax.Array:
    """``like`` (``[E, ...]``, statistics of experts) with those that saw too few tokens replaced by what makes a solver
    do without data, ones or an identity; and a note about them."""
    n_in = like.shape[-1]
    few_E = reading["count"] < n_in / 4
    if reading["count"].ndim and (count := int(few_E.sum())):
        seen = ", ".join(str(int(each)) for each in reading["count"][few_E][:4])
        block.notes.append(
            f"{block.path(name)}: {count} of {len(few_E)} experts saw too few tokens of the calibration data "
            f"({seen}): {what} without data"
        )
    neutral = jnp.ones(n_in) if like.ndim == few_E.ndim + 1 else jnp.eye(n_in)
    return jnp.where(few_E.reshape(few_E.shape + (1,) * (like.ndim - few_E.ndim)), neutral, like)


def hessian(block: Block, name: str, reading: Reading, what: str) -> jax.Array:
    """``E[x x^T]`` of a kernel's inputs, ``[in, in]`` or ``[E, in, in]``."""
    count = jnp.maximum(reading["count"], 1)[..., None, None]
    h = reading["gram"] / count
    return experts_alone(block, name, reading, what, h) if reading["count"].ndim else h


def note_failures(block: Block, names: Sequence[str], info: SolverInfo, what: str) -> None:
    where = ", ".join(block.path(name) for name in names)
    if bool(jnp.any(info.failed)):
        block.notes.append(f"{where}: the Hessian cannot be factored: {what} without error feedback")
    elif bool(jnp.any(info.retries > 0)):
        block.notes.append(f"{where}: the Hessian needed a damping of {float(jnp.max(info.damping)):g}")


@dataclass(frozen=True)
class Gptq(BlockStep):
    """GPTQ (arXiv:2210.17323): each column is rounded in turn, and the ones to come make up for its error.

    Attributes:
        bits, group, symmetric: the grid; see ``Quantize``.
        act_order: columns of large inputs first, in groups fitted to the original weights (``static_groups``).
        true_sequential: each product of a layer is solved given the rounded ones before it, which takes a forward pass
            for each.
        damping: added to the Hessian's diagonal, as a share of its mean.
        clip: shrinks each group's span, at most to this share, where that lowers the error weighted by E[x**2]; None is
            0.6 at 2 bits, 0.8 at 3 and 1, that is never, from 4 on: what serves best where it was tried.
        sweeps: passes of coordinate descent over the result.

    Zeros stay zeros: what was pruned before remains so.
    """

    kind: ClassVar[str] = "gptq"
    bits: int
    group: int = 128
    symmetric: bool = False
    act_order: bool = True
    static_groups: bool = True
    true_sequential: bool = False
    damping: float = 0.01
    clip: float | None = None
    sweeps: int = 3
    target: str = BLOCKS

    def __post_init__(self):
        check_grid(self.bits, self.group)

    def solve(self, block: Block) -> Layer:
        groups = list(by_input(block.targets))
        layer = dict(block.layer)
        for part in [[group] for group in groups] if self.true_sequential else [groups]:
            readings = read_inputs(block, gram, layer, part)
            for group in part:
                layer |= self._solve(block, group, readings[group[0]])
        return layer

    def _solve(self, block: Block, names: tuple[str, ...], reading: Reading) -> Layer:
        """Kernels with the same input, as one matrix: rows do not know of each other."""
        what = f"rounded to {self.bits} bits"
        h = hessian(block, names[0], reading, what)
        kernels = [block.layer[name].swapaxes(-1, -2) for name in names]
        w_OxI = jnp.concatenate(kernels, -2).astype(jnp.float32)
        group = 0 if self.group >= w_OxI.shape[-1] else self.group
        clip = {2: 0.6, 3: 0.8}.get(self.bits, 1.0) if self.clip is None else self.clip
        found = gptq(
            w_OxI, h, w_OxI != 0, grid=IntegerGrid(self.bits, self.symmetric, clip), group=group,
            act_order=self.act_order, static_groups=self.static_groups, damping=self.damping, sweeps=self.sweeps,
        )
        note_failures(block, names, found.info, what)
        ends = list(itertools.accumulate(kernel.shape[-2] for kernel in kernels))[:-1]
        whole = QArray(found.codes_OxI, *found.params, self.bits, group)
        split = jax.tree.map(lambda part: jnp.split(part, ends, -2), whole)
        return {name: jax.tree.map(lambda _, cut, i=i: cut[i], whole, split) for i, name in enumerate(names)}


@dataclass(frozen=True)
class SparseGpt(BlockStep):
    """SparseGPT (arXiv:2301.00774): prunes by what the loss of each weight costs, and later columns make up for it.
    With ``bits`` it rounds what remains in the same pass.

    Attributes:
        sparsity: the share of weights to drop, or 0 with
        n, m: ``n`` kept of every ``m`` inputs.
        bits, group, symmetric: the grid of what remains; 0 bits: it stays dense.
        damping: added to the Hessian's diagonal, as a share of its mean.
        search: iterations that choose the weights to drop over the whole matrix beforehand (``admm.search_mask``); 0: a
            block of columns at a time, as in the paper.
        sweeps: passes of coordinate descent over the result.
    """

    kind: ClassVar[str] = "sparsegpt"
    sparsity: float = 0.0
    n: int = 0
    m: int = 0
    bits: int = 0
    group: int = 0
    symmetric: bool = False
    damping: float = 0.01
    search: int = 30
    sweeps: int = 5
    target: str = BLOCKS

    def __post_init__(self):
        check_sparsity(self.sparsity, self.n, self.m)
        if self.bits:
            check_grid(self.bits, self.group)

    def solve(self, block: Block) -> Layer:
        readings = read_inputs(block, gram)
        return block.layer | {name: self._solve(block, name, readings[name]) for name in block.targets}

    def _solve(self, block: Block, name: str, reading: Reading) -> jax.Array | QArray:
        h = hessian(block, name, reading, "pruned")
        kernel = block.layer[name]
        w_OxI = kernel.swapaxes(-1, -2).astype(jnp.float32)
        group = 0 if self.group >= w_OxI.shape[-1] else self.group
        found = sparsegpt(
            w_OxI, h, sparsity=(self.n, self.m) if self.m else self.sparsity, search=self.search,
            grid=IntegerGrid(self.bits, self.symmetric) if self.bits else None, group=group, damping=self.damping,
            sweeps=self.sweeps,
        )
        note_failures(block, [name], found.info, "pruned")
        if self.bits:
            return QArray(found.codes_OxI, *found.params, self.bits, group)
        return found.weights_OxI.swapaxes(-1, -2).astype(kernel.dtype)


@dataclass(frozen=True)
class Wanda(BlockStep):
    """Wanda (arXiv:2306.11695): drops, of each output's weights, those of least magnitude times input norm."""

    kind: ClassVar[str] = "wanda"
    sparsity: float = 0.0
    n: int = 0
    m: int = 0
    target: str = BLOCKS

    def __post_init__(self):
        check_sparsity(self.sparsity, self.n, self.m)

    def solve(self, block: Block) -> Layer:
        readings = read_inputs(block, moments)

        def pruned(name):
            norms = jnp.sqrt(readings[name]["square"])
            if readings[name]["count"].ndim:
                norms = experts_alone(block, name, readings[name], "pruned by magnitude", norms)
            share = None if self.m else self.sparsity
            w_OxI = wanda(block.layer[name].swapaxes(-1, -2), norms, sparsity=share, n=self.n, m=self.m)
            return w_OxI.swapaxes(-1, -2)

        return block.layer | {name: pruned(name) for name in block.targets}
