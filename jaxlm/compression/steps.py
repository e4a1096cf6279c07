"""The steps of recipes. Three kinds, by what they need:

- a ``WeightStep`` looks at one weight at a time: it is a ``Transform``, in or out of ``jit``;
- a ``BlockStep`` solves for the weights of one layer, given what goes through it (``calibrate.Block``);
- a ``ModelStep`` changes the model's configuration too.

This file holds the first kind, and what all have in common.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxlm.compression.calibration import Block, Calibration, Layer, solve_blocks
from jaxlm.compression.layer_groups import join
from jaxlm.compression.prune.scores import magnitude, n_of_m
from jaxlm.compression.quantize.codebook import E2M1, kmeans, mxfp4, nf4, nf4_table
from jaxlm.compression.quantize.float8 import quantize_float8
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import Codebook, LowRank, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, map_params

__all__ = [
    "BLOCKS", "BlockStep", "Float8", "Half", "Magnitude", "ModelStep", "NofM", "Quantize", "Share", "Step", "Table",
    "WeightStep", "apply_step",
]

# The linear maps of the blocks: embeddings, head and norms stay dense unless a step's target says otherwise.
BLOCKS = r"(.*/)?layers/\d+/((attn|cross|mlp|mlp/experts)/[a-z]+|input|recurrent)/kernel"


def matching(target: str, params: Params) -> list[str]:
    """The paths of parameters that a regular expression means; routers of experts are never compressed."""
    matches = re.compile(target).fullmatch
    return [path for path in flatten(params) if matches(path) and not path.endswith("/router/kernel")]


def targets(step: WeightStep | BlockStep, params: Params) -> list[str]:
    """The paths that a step is to compress. UserError where there are none, or one that is no dense kernel or table."""
    found = matching(step.target, params)
    if not found:
        raise UserError(f"the target {step.target!r} of a {step.kind} step matches no parameter; see `jaxlm inspect`")
    flat = flatten(params)
    for path in found:
        if not path.endswith(("/kernel", "/table")):
            raise UserError(f"the target of a {step.kind} step matches {path}; only kernels and tables are compressed")
        leaf = flat[path]
        factors = isinstance(step, WeightStep) and isinstance(leaf, LowRank) and not is_leaf(leaf.a)
        if is_leaf(leaf) and not factors:
            raise UserError(f"{path} is already quantized; put the {step.kind} step first or start from a dense model")
    return found


def apply_step(step: WeightStep, params: Params, weight: Callable[[Leaf, int], Leaf]) -> Params:
    """``weight(leaf, axis)`` over what is the target of a step, ``axis`` being that of contraction."""
    chosen = set(targets(step, params))

    def of_leaf(path: str, leaf: Leaf) -> Leaf:
        if path not in chosen:
            return leaf
        if isinstance(leaf, LowRank):
            return LowRank(weight(leaf.a, -2), weight(leaf.b, -2))
        return weight(leaf, -1 if path.endswith("/table") else -2)

    return map_params(of_leaf, params)


class WeightStep:
    """A Transform that replaces each of its target's weights by itself."""

    kind: ClassVar[str]
    target: str

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        """A weight, with its contraction at ``axis``, compressed."""
        raise NotImplementedError

    def __call__(self, params: Params) -> Params:
        return apply_step(self, params, self.weight)


class BlockStep:
    """Replaces the weights of its target layer by layer, with data.

    ``originals`` says whether its blocks are to know what the layers gave before (``calibrate.Block.originals``).
    """

    kind: ClassVar[str]
    originals: ClassVar[bool] = False
    folds_scales: ClassVar[bool] = False  # its weights mean the same only together: one cannot be compared with before
    target: str

    def solve(self, block: Block) -> Layer:
        """The layer's parameters, those of ``block.targets`` compressed."""
        raise NotImplementedError

    def __call__(self, config: Any, params: Params, calibration: Calibration, notes: list[str]) -> tuple[Any, Params]:
        chosen = set(targets(self, params))
        for path in sorted(chosen):
            if not re.match(r"(encoder|decoder)/layers/\d+/", path):
                raise UserError(f"a {self.kind} step calibrates the layers' kernels, and its target matches {path}")
        layers = solve_blocks(config, params, calibration, self.solve, chosen.__contains__, notes, self.originals)
        return join(config, params, layers)


class ModelStep:
    """Changes configuration and parameters together, better where there is data."""

    kind: ClassVar[str]

    def __call__(
        self, config: Any, params: Params, calibration: Calibration | None, notes: list[str]
    ) -> tuple[Any, Params]:
        raise NotImplementedError


Step = WeightStep | BlockStep | ModelStep


def needs_data(steps: Sequence[Step]) -> Step | None:
    """The first step that cannot do without calibration."""
    return next((step for step in steps if isinstance(step, BlockStep)), None)


def check_grid(bits: int, group: int) -> None:
    """UserError unless weights can be rounded so."""
    if not 2 <= bits <= 8:
        raise UserError(f"cannot quantize to {bits} bits; use 2 to 8")
    if group < 0:
        raise UserError(f"a group of {group} inputs is impossible; use 0 for one group an output channel")


def check_sparsity(sparsity: float, n: int, m: int) -> None:
    """UserError unless so much, or N of every M, can be pruned; ``m`` 0 is no pattern."""
    if m and not 0 < n < m <= 32:
        raise UserError(f"{n}:{m} sparsity is impossible; N:M keeps 0 < N < M weights of every M <= 32")
    if not m and not 0 < sparsity < 1:
        raise UserError(f"a sparsity of {sparsity:.0%} is impossible; use more than 0% and less than 100%")


@dataclass(frozen=True)
class Quantize(WeightStep):
    """Rounds weights to ``bits`` on a grid a group of inputs (0: an output channel); see ``core.leaves.QArray``."""

    kind: ClassVar[str] = "quantize"
    bits: int
    group: int = 0
    symmetric: bool = False
    act_bits: int = 0
    target: str = BLOCKS

    def __post_init__(self):
        check_grid(self.bits, self.group)
        if self.act_bits not in (0, 8) or (self.act_bits and self.group):
            raise UserError("activations are quantized to 8 bits with one weight group a channel, or not at all")

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return quantize(
            dense, bits=self.bits, group=self.group, symmetric=self.symmetric, act_bits=self.act_bits, axis=axis
        )


@dataclass(frozen=True)
class Float8(WeightStep):
    """Rounds weights to float8 e4m3, with a scale an output channel; activations too, a token at a time, if
    ``act_bits`` is 8."""

    kind: ClassVar[str] = "float8"
    act_bits: int = 8
    target: str = BLOCKS

    def __post_init__(self):
        if self.act_bits not in (0, 8):
            raise UserError(f"activations of {self.act_bits} bits are impossible; use 8, or 0 to leave them alone")

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return quantize_float8(dense, act_bits=self.act_bits, axis=axis)


@dataclass(frozen=True)
class Magnitude(WeightStep):
    """Zeroes the ``sparsity`` share of smallest magnitude, a matrix at a time."""

    kind: ClassVar[str] = "magnitude"
    sparsity: float
    target: str = BLOCKS

    def __post_init__(self):
        check_sparsity(self.sparsity, 0, 0)

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return magnitude(dense, sparsity=self.sparsity)


@dataclass(frozen=True)
class NofM(WeightStep):
    """Keeps the ``n`` largest of every ``m`` consecutive inputs of an output channel."""

    kind: ClassVar[str] = "n_of_m"
    n: int
    m: int
    target: str = BLOCKS

    def __post_init__(self):
        check_sparsity(0, self.n, self.m)

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        return n_of_m(dense, n=self.n, m=self.m, axis=axis)


@dataclass(frozen=True)
class Table(WeightStep):
    """Rounds weights to the 16 values of a format of 4 bits, a scale a group of inputs: "nf4" (QLoRA, arXiv:2305.14314,
    section 3), or "mxfp4" (OCP Microscaling Formats v1.0), whose groups are of 32."""

    kind: ClassVar[str] = "table"
    format: Literal["nf4", "mxfp4"]
    group: int = 64
    target: str = BLOCKS

    def __post_init__(self):
        if self.format not in ("nf4", "mxfp4") or self.group < 1 or (self.format == "mxfp4" and self.group != 32):
            raise UserError(f"{self.format} in groups of {self.group} is no format; use nf4, or mxfp4 in groups of 32")

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        w_OxI = dense.swapaxes(-1, -2) if axis == -2 else dense
        group = min(self.group, w_OxI.shape[-1])
        codes, scale = nf4(w_OxI, group=group) if self.format == "nf4" else mxfp4(w_OxI)
        table = jnp.asarray(nf4_table() if self.format == "nf4" else E2M1, jnp.float32)
        table = jnp.broadcast_to(table, (*w_OxI.shape[:-2], len(table)))
        return Codebook(codes, table, scale, 4, group, self.format, axis)


@dataclass(frozen=True)
class Share(WeightStep):
    """Weights of a matrix share ``2**bits`` values, found by k-means; zeros stay zeros (Deep Compression,
    arXiv:1510.00149, section 3). Not inside ``jit``."""

    kind: ClassVar[str] = "share"
    bits: int
    target: str = BLOCKS

    def __post_init__(self):
        if not 1 <= self.bits <= 8:
            raise UserError(f"a codebook of {self.bits} bits is impossible; use 1 to 8")

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        if isinstance(dense, jax.core.Tracer):
            raise TypeError("k-means runs on the host: share weights outside of jit")
        codes, table = kmeans(dense.swapaxes(-1, -2) if axis == -2 else dense, self.bits)
        return Codebook(codes, table, None, self.bits, 0, "shared", axis)


@dataclass(frozen=True)
class Half(ModelStep):
    """Keeps what is dense in bfloat16, and scales of coded weights as float16 numbers where those reach: put it last.

    Its rounding, a part in 512 of a weight and in 2,048 of a scale, is small beside that of codes of a few bits.
    """

    kind: ClassVar[str] = "half"

    def __call__(self, config, params, calibration, notes):
        return config, map_params(lambda path, leaf: self._leaf(leaf), params)

    def _leaf(self, leaf: Leaf) -> Leaf:
        if isinstance(leaf, LowRank):
            return LowRank(self._leaf(leaf.a), self._leaf(leaf.b))
        if not is_leaf(leaf):
            return leaf.astype(jnp.bfloat16)
        if leaf.scale is None:
            return leaf
        limits = jnp.finfo(jnp.float16)
        reached = (leaf.scale >= limits.tiny) & (leaf.scale <= limits.max)
        scale = jnp.where(reached, leaf.scale.astype(jnp.float16).astype(jnp.float32), leaf.scale)
        return dataclasses.replace(leaf, scale=scale)
