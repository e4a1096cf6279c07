"""Solves for kernels by a choice for each: GPTQ, or SparseGPT where they are pruned too.

Kernels with the same input have the same Hessian, and GPTQ takes the rows of a matrix (outputs) independently of each
other. So all candidates of all such kernels are rows of one matrix, each row with its own bits, scales and zero points
for every column, and one compiled program solves for all bits and groups.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from jaxlm.compression.prune.admm import search_mask
from jaxlm.compression.prune.sparsegpt import sparsegpt
from jaxlm.compression.quantize.column_solver import SolverInfo, solve_matrix, solve_stack
from jaxlm.compression.quantize.hessian import fix_dead_inputs
from jaxlm.compression.quantize.rtn import IntegerGrid, fit_grid, round_to_grid
from jaxlm.compression.steps import check_grid, check_sparsity
from jaxlm.core.leaves import QArray, expand_groups
from jaxlm.core.tree import Leaf

__all__ = ["KernelChoice", "Solver"]

_CANDIDATES = 8  # of each kernel that are rows of one matrix
_MOST_WEIGHTS = 1 << 27  # in such a matrix, unless one candidate alone has more


@dataclass(frozen=True)
class KernelChoice:
    """What to do to one kernel: prune the share ``sparsity``, or all but ``n`` of every ``m`` inputs, if any; and round
    it to ``bits``, if any, with zero points, on a grid for each ``group`` of inputs (0: for each output channel).

    ``kernel`` is its name, ``decoder/3/mlp/up``: the layers of a side are numbered through all its layer groups.
    """

    kernel: str
    bits: int = 0
    group: int = 0
    sparsity: float = 0.0
    n: int = 0
    m: int = 0

    def __post_init__(self):
        if self.bits or not self.sparse:
            check_grid(self.bits, self.group)
        if self.sparse:
            check_sparsity(self.sparsity, self.n, self.m)

    @property
    def sparse(self) -> bool:
        return bool(self.sparsity or self.m)

    @property
    def pattern(self) -> float | tuple[int, int]:
        """The sparsity as ``prune.sparsegpt`` takes it."""
        return (self.n, self.m) if self.m else self.sparsity

    def __str__(self) -> str:
        return f"rounded to {self.bits} bits" if self.bits else "pruned"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _FittedGrid:
    """A ``column_solver.Grid`` that is fitted already: ``bits`` of each row, ``[..., out, 1]``, and the scale and the
    zero of each weight, ``[..., out, in]``, so that every column is a group."""

    bits: jax.Array
    scale: jax.Array
    zero: jax.Array

    def fit(self, w_OxI: jax.Array, group: int, weight_I: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        return self.scale, self.zero

    def codes(self, w_OxI: jax.Array, params: tuple, group: int = 0) -> jax.Array:
        return round_to_grid(w_OxI, *params, self.bits, group)

    def values(self, codes_OxI: jax.Array, params: tuple, group: int = 0) -> jax.Array:
        return IntegerGrid.values(self, codes_OxI, params, group)


@dataclass(frozen=True)
class Solver:
    """How kernels are solved for.

    Attributes:
        clip: the least share of a group's span that its grid keeps (``rtn.IntegerGrid.min_clip``).
        sweeps, damping: see ``gptq.gptq``.
        search: iterations that choose a pruning mask over the whole kernel (``admm.search_mask``); 0: SparseGPT's own.
    """

    clip: float = 0.6
    sweeps: int = 3
    search: int = 30
    damping: float = 0.01

    def __call__(
        self, kernels: Mapping[str, jax.Array], h_IxI: jax.Array, choices: Mapping[str, Sequence[KernelChoice]]
    ) -> dict[str, list[tuple[Leaf, SolverInfo]]]:
        """Each kernel by each of its choices.

        Args:
            kernels: by name, those that have the same input: ``[in, out]``, or ``[experts, in, out]``.
            h_IxI: ``E[x x^T]`` of that input, ``[in, in]`` or ``[experts, in, in]``.
            choices: for each kernel those to solve for.
        """
        w_OxI = {name: kernel.swapaxes(-1, -2).astype(jnp.float32) for name, kernel in kernels.items()}
        at_once = {name: [each for each in some if self._joins(each)] for name, some in choices.items()}
        joined = self._joined(w_OxI, h_IxI, at_once) if any(at_once.values()) else {}
        return {
            name: [
                joined[name, each] if self._joins(each) else self._alone(kernels[name], w_OxI[name], h_IxI, each)
                for each in some
            ]
            for name, some in choices.items()
        }

    def _joins(self, choice: KernelChoice) -> bool:
        """Whether rows are solved for independently: not where a mask is chosen over all of them on the way."""
        return bool(choice.bits and (not choice.sparse or self.search))

    def _alone(
        self, kernel_IxO: jax.Array, w_OxI: jax.Array, h_IxI: jax.Array, choice: KernelChoice
    ) -> tuple[Leaf, SolverInfo]:
        bits = jnp.full(w_OxI.shape[:-2], choice.bits)
        found = sparsegpt(
            w_OxI, h_IxI, sparsity=choice.pattern, grid=_Bits(bits, min_clip=self.clip) if choice.bits else None,
            group=choice.group, search=self.search, act_order=self.search > 0, damping=self.damping, sweeps=self.sweeps,
        )
        if not choice.bits:
            return found.weights_OxI.swapaxes(-1, -2).astype(kernel_IxO.dtype), found.info
        group = 0 if choice.group >= w_OxI.shape[-1] else choice.group
        return QArray(found.codes_OxI, *found.params, choice.bits, group), found.info

    def _joined(
        self, w_OxI: Mapping[str, jax.Array], h_IxI: jax.Array, choices: Mapping[str, Sequence[KernelChoice]]
    ) -> dict[tuple[str, KernelChoice], tuple[Leaf, SolverInfo]]:
        """Kernels and their choices as rows of one matrix after the other, all of one shape."""
        found, masks = {}, _Masks(w_OxI, h_IxI, self)
        every = [each for some in choices.values() for each in some]
        rounds = max(map(len, choices.values()))
        size = sum(w.size for w in w_OxI.values())
        at_once = max(1, min(_CANDIDATES, rounds, _MOST_WEIGHTS // size))
        for start in range(0, rounds, at_once):
            rows = []
            for number in range(start, start + at_once):
                for name, w in w_OxI.items():
                    some = choices.get(name) or every[:1]  # what fills up is solved for and dropped
                    choice = some[min(number, len(some) - 1)]
                    group = 0 if choice.group >= w.shape[-1] else choice.group
                    kept = masks.of(name, choice)
                    params, fitted = _fit_grid(w, h_IxI, kept, choice.bits, group=group, clip=self.clip)
                    rows.append((name, choice, group, w, kept, params, fitted))
            codes, info = _solve_rows(
                [row[3] for row in rows], h_IxI, [row[4] for row in rows], [row[6] for row in rows], self.damping,
                self.sweeps,
            )
            for (name, choice, group, _, _, params, _), codes_OxI in zip(rows, codes, strict=True):
                if choice in choices.get(name, ()):
                    found[name, choice] = QArray(codes_OxI, *params, choice.bits, group), info
        return found


@dataclass(frozen=True)
class _Masks:
    """Which weights of kernels are kept: those that are not zero, or that a search chooses once for each sparsity."""

    w_OxI: Mapping[str, jax.Array]
    h_IxI: jax.Array
    solver: Solver
    _found: dict[tuple, jax.Array] = field(default_factory=dict)

    def of(self, name: str, choice: KernelChoice) -> jax.Array:
        key = name, choice.pattern if choice.sparse else None
        if key not in self._found:
            if choice.sparse:
                self._found.update(self._searched(name, choice.pattern))
            else:
                self._found[key] = self.w_OxI[name] != 0
        return self._found[key]

    def _searched(
        self, name: str, sparsity: float | tuple[int, int]
    ) -> dict[tuple[str, float | tuple[int, int]], jax.Array]:
        """The masks of all kernels of that shape, which share the factors of the Hessian."""
        shape = self.w_OxI[name].shape
        names = [each for each, w in self.w_OxI.items() if w.shape == shape]
        w_NxOxI = jnp.stack([self.w_OxI[each] for each in names])
        masks = _search_masks(w_NxOxI, self.h_IxI, sparsity, self.solver.search, self.solver.damping)
        return {(each, sparsity): mask for each, mask in zip(names, masks, strict=True)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Bits(IntegerGrid):
    """An ``IntegerGrid`` whose number of bits is an array, so that one program solves for all of them."""

    bits: jax.Array
    symmetric: bool = field(default=False, metadata={"static": True})
    min_clip: float = field(default=1.0, metadata={"static": True})


@functools.partial(jax.jit, static_argnums=(2, 3))
def _search_masks(
    w_NxOxI: jax.Array, h_IxI: jax.Array, sparsity: float | tuple[int, int], iterations: int, damping: jax.Array
) -> jax.Array:
    def search(w_OxI, h_IxI):
        return search_mask(w_OxI, h_IxI, sparsity, iterations, damping)

    for _ in h_IxI.shape[:-2]:
        search = jax.vmap(search)
    return jax.vmap(search, in_axes=(0, None))(w_NxOxI, h_IxI)


@functools.partial(jax.jit, static_argnames=("group", "clip"))
def _fit_grid(
    w_OxI: jax.Array, h_IxI: jax.Array, kept_OxI: jax.Array, bits: jax.Array, *, group: int, clip: float
) -> tuple[tuple[jax.Array, jax.Array], _FittedGrid]:
    """The scale and the zero of a grid, ``[..., out, groups]``, as ``solve_matrix`` fits it; and of each weight."""

    def fit(w_OxI, h_IxI, kept_OxI):
        w_OxI, h_IxI = fix_dead_inputs(w_OxI, h_IxI)
        weight_I = jnp.maximum(jnp.diagonal(h_IxI), 0)
        return fit_grid(jnp.where(kept_OxI, w_OxI, 0), bits, group, False, weight_I, clip)

    for _ in h_IxI.shape[:-2]:
        fit = jax.vmap(fit)
    params = fit(w_OxI, h_IxI, kept_OxI)
    scale, zero = (jnp.broadcast_to(expand_groups(each, group, w_OxI.shape[-1]), w_OxI.shape) for each in params)
    return params, _FittedGrid(jnp.full((*w_OxI.shape[:-1], 1), bits), scale, zero)


@functools.partial(jax.jit, static_argnames="sweeps")
def _solve_rows(
    w_OxI: Sequence[jax.Array], h_IxI: jax.Array, kept_OxI: Sequence[jax.Array], grids: Sequence[_FittedGrid],
    damping: float, sweeps: int,
) -> tuple[list[jax.Array], SolverInfo]:
    """The codes of matrices with the same input, as one matrix."""

    def join(*parts: jax.Array) -> jax.Array:
        return jnp.concatenate(parts, -2)

    solve = functools.partial(
        solve_matrix, group=1, act_order=True, static_groups=True, damping=damping, sweeps=sweeps, block=64
    )
    found = solve_stack(solve, join(*w_OxI), h_IxI, join(*kept_OxI), jax.tree.map(join, *grids))
    ends = [sum(w.shape[-2] for w in w_OxI[: i + 1]) for i in range(len(w_OxI) - 1)]
    return jnp.split(found.codes_OxI, ends, -2), found.info
