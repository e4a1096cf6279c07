"""What the steps of all recipes have in common. There are three kinds of step, by what they look at:

- a ``WeightStep`` looks at one weight at a time: it is a ``Transform``, in or out of ``jit``;
- a ``LayerStep`` solves for the weights of one layer, given the data that runs through it (``CalibratedLayer``);
- a ``ModelStep`` changes the configuration of the model too.

Each step stands beside its mathematics, in ``quantize/``, ``prune/``, ``fit/`` or ``low_rank``. What others must know
of a step (does it need data, is its result fast on CPU, ...) is said by its class, in the attributes of ``Step``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

from jaxlm.compression.calibration import CalibratedLayer, Calibration, LayerParams, solve_layers
from jaxlm.compression.layer_groups import join
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import LowRank, is_leaf
from jaxlm.core.tree import Leaf, Params, flatten, map_params
from jaxlm.core.untrusted import Pattern
from jaxlm.nn.config import ModelConfig

__all__ = ["LAYER_KERNELS", "LayerStep", "ModelStep", "Step", "WeightStep", "apply_step"]

# The kernels of the layers. Embeddings, head and norms stay dense unless the target of a step says otherwise.
LAYER_KERNELS = r"(.*/)?layers/\d+/((attn|cross|mlp|mlp/experts|mlp/shared)/[a-z]+|input|recurrent)/kernel"

Data = Literal["needed", "of use", ""]
OnCpu = Literal["faster", "faster with jax 0.12", "as dense"]


class Step:
    """A step of a recipe: a frozen dataclass, whose fields are stored with the models that it makes.

    Attributes:
        kind: its name in stored recipes. It never changes.
        data: whether it is calibrated with data.
        folds_scales: whether it moves scales or bases between weights, so that the weights after it equal those before
            only together, and no single one can be compared.
    """

    kind: ClassVar[str]
    data: ClassVar[Data] = ""
    folds_scales: ClassVar[bool] = False

    @property
    def on_cpu(self) -> OnCpu:
        """How large matrices run on CPU after this step; see ``platforms``. "as dense": they are expanded on
        loading."""
        return "as dense"

    def without_data(self, config: ModelConfig) -> tuple[Step, ...]:
        """Steps that need no data and whose result has the same shapes and representations, for forecasts.

        ``config`` is that of the model before the recipe.

        Raises:
            UserError: when the shapes depend on the data.
        """
        return (self,)


class WeightStep(Step):
    """A Transform that replaces each weight of its target, a regular expression over paths, by itself.

    ``prunes``: it only sets weights to zero, and a training can do so gradually (``schedule``).
    """

    prunes: ClassVar[bool] = False
    target: str

    def weight(self, dense: Leaf, axis: int) -> Leaf:
        """The compressed form of a weight whose contraction axis is ``axis``."""
        raise NotImplementedError

    def __call__(self, params: Params) -> Params:
        return apply_step(self, params, self.weight)


class LayerStep(Step):
    """Replaces the weights of its target layer by layer, with data.

    ``needs_dense_outputs`` asks for ``CalibratedLayer.dense_outputs``.
    """

    data: ClassVar[Data] = "needed"
    needs_dense_outputs: ClassVar[bool] = False
    target: str

    def solve(self, layer: CalibratedLayer) -> LayerParams:
        """The layer's parameters, those of ``layer.targets`` compressed."""
        raise NotImplementedError

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration, notes: list[str]
    ) -> tuple[ModelConfig, Params]:
        """The compressed model; ``notes`` gets lines for the user."""
        chosen = set(targets(self, params))
        for path in sorted(chosen):
            if not re.match(r"(encoder|decoder)/layers/\d+/", path):
                raise UserError(f"a {self.kind} step solves for kernels of the layers, but its target matches {path}")
        layers = solve_layers(
            config, params, calibration, self.solve, chosen.__contains__, notes, self.needs_dense_outputs
        )
        return join(config, params, layers)


class ModelStep(Step):
    """Changes configuration and parameters together."""

    def __call__(
        self, config: ModelConfig, params: Params, calibration: Calibration | None, notes: list[str]
    ) -> tuple[ModelConfig, Params]:
        """The compressed model; ``notes`` gets lines for the user."""
        raise NotImplementedError


def matching(target: str, params: Params) -> list[str]:
    """The paths of parameters that a regular expression matches. Routers of experts are never compressed."""
    matches = Pattern(target, "a step's target").fullmatch
    return [path for path in flatten(params) if matches(path) and not path.endswith("/router/kernel")]


def targets(step: WeightStep | LayerStep, params: Params) -> list[str]:
    """The paths of the weights that a step compresses.

    Raises:
        UserError: when there are none, or one of them is not a dense kernel or table.
    """
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
    """``weight(leaf, axis)`` over the targets of a step, where ``axis`` is the contraction axis of the leaf."""
    chosen = set(targets(step, params))

    def compress(path: str, leaf: Leaf) -> Leaf:
        if path not in chosen:
            return leaf
        if isinstance(leaf, LowRank):
            return LowRank(weight(leaf.a, -2), weight(leaf.b, -2))
        return weight(leaf, -1 if path.endswith("/table") else -2)

    return map_params(compress, params)


def needs_data(steps: Sequence[Step]) -> Step | None:
    """The first step that cannot do without calibration data."""
    return next((step for step in steps if step.data == "needed"), None)


def integers_on_cpu(group: int) -> OnCpu:
    """How weight-only integers run on CPU: fast with one scale an output channel, where XLA's int8 kernels are."""
    return "as dense" if group else "faster with jax 0.12"


def check_grid(bits: int, group: int) -> None:
    """Raises UserError unless weights can be rounded to ``bits`` in groups of ``group`` inputs."""
    if not 2 <= bits <= 8:
        raise UserError(f"cannot quantize to {bits} bits; use 2 to 8")
    if group < 0:
        raise UserError(f"a group of {group} inputs is impossible; use 0 for one group an output channel")


def check_sparsity(sparsity: float, n: int, m: int) -> None:
    """Raises UserError unless the share ``sparsity``, or all but ``n`` of every ``m`` inputs (``m`` > 0), can be
    pruned."""
    if m and not 0 < n < m <= 32:
        raise UserError(f"{n}:{m} sparsity is impossible; N:M keeps 0 < N < M weights of every M <= 32")
    if not m and not 0 < sparsity < 1:
        raise UserError(f"a sparsity of {sparsity:.0%} is impossible; use more than 0% and less than 100%")
