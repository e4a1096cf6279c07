"""``compress``: a smaller model, by a recipe or to a budget, with a report of each tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
import numpy as np

from jaxlm import nn
from jaxlm.checkpoint.storage import PackedWeights, leaf_bytes
from jaxlm.compression.calibration import Calibration
from jaxlm.compression.fit.budget import Budget, LossTarget
from jaxlm.compression.fit.search import BudgetSearch, FittedModel
from jaxlm.compression.fit.sensitivity import CANDIDATES, SPARSITY_CANDIDATES, measure_sensitivity
from jaxlm.compression.names import load_recipe
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.report import report as make_report
from jaxlm.compression.steps import LAYER_KERNELS, matching
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import dequantize, is_leaf, merge_adapters
from jaxlm.core.progress import Progress
from jaxlm.core.tree import Leaf, Params, flatten
from jaxlm.data.calibration import calibration_batches, hold_out
from jaxlm.data.config import FirstTokenOption, SpecialTokens
from jaxlm.hf.directory import model_bytes
from jaxlm.model import LM
from jaxlm.nn.config import ModelConfig
from jaxlm.nn.layerwise import LayerwiseModel

__all__ = ["compress"]


def compress(
    lm: LM,
    recipe: str | Recipe | None = None,
    *,
    fit: str = "",
    max_perplexity: str = "",
    storage: str = "plain",
    calibrate: str = "",
    special_tokens: SpecialTokens = "text",
    first_token: FirstTokenOption = "auto",
    samples: int = 128,
    context: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> LM:
    """A smaller model, by a recipe or to a budget, with a report of each tensor; the same arguments, the same bytes.

    The parameters of the result keep their compressed representation. ``load`` may expand them for its platform.
    An adapter is merged first.

    Args:
        lm: a dense model.
        recipe: a name (``jaxlm recipes`` lists them), a file or a ``Recipe``. Without one, bits, groups and sparsity
            are chosen for each kernel of the blocks (``compression.fit.budget``); the result has a recipe that says so.
        fit: the least loss in "3.2bits" a weight of these kernels, scales and zero points included; in "900MiB" of
            all weights on disk, embeddings and head too, which stay as they are; or with "70%zeros" in these kernels,
            which are pruned and not rounded.
        max_perplexity: the smallest model of a perplexity of at most "46.5", or "+1%" above the dense model's, on a
            fifth of the calibration data, which is then not calibrated with.
        storage: of a model without a recipe, plain or huffman.
        calibrate: a SPEC of calibration data, for recipes that need some: text the model should be good at, or
            sentence pairs.
        special_tokens: whether special tokens that this data spells are characters ("text") or parsed ("parse").
        first_token: whether windows of this data begin with what the tokenizer puts before a text ("auto", "never").
        samples: the number of windows of ``context`` tokens (0: the model's own context, at most 2,048) to calibrate
            with; of sentence pairs, 16 times as many.
        seed: of the choice of windows, of rotations and of learned rounding.
        progress: see ``core.progress``.

    Raises:
        UserError: the recipe is unknown, cannot be applied to this model or lacks its data; the budget is too small;
            or the model is compressed already.
    """
    if sum(map(bool, (recipe, fit, max_perplexity))) != 1:
        raise UserError("give either a recipe, or a budget to fit to, or a perplexity to keep")
    if recipe is not None and storage != "plain":
        raise UserError(f"a recipe says how it is stored: add +{storage} to its name")
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    target = Budget.parse(fit) if fit else LossTarget.parse(max_perplexity) if max_perplexity else None
    lm = lm.replace(params=merge_adapters(lm.params))
    if any(is_leaf(leaf) for leaf in flatten(lm.params).values()):
        raise UserError("this model is quantized already; compress the dense one")
    calibration = None
    if calibrate:
        calibration = _calibration(lm, calibrate, special_tokens, first_token, samples, context, seed, progress)
    if recipe is None:
        fitted = _fit(lm, target, f"fit-{fit or max_perplexity}", storage, calibration)
        recipe, done, packed, fitted_kernels = fitted.recipe, fitted.model, fitted.packed, fitted.kernels
    else:
        done, fitted_kernels = recipe.run(lm.config, lm.params, calibration), ()
        packed = PackedWeights(done.params, recipe.storage)
    alike = not any(step.folds_scales for step in recipe.steps)
    rows = make_report(lm.params if alike else None, done.params, packed.sizes)
    return lm.replace(
        config=done.config, graphdef=nn.initializer(done.config)[0], params=done.params, packed=packed, recipe=recipe,
        report=tuple(rows), fitted_kernels=fitted_kernels,
        info=lm.info | {"notes": [*lm.info.get("notes", ()), *done.notes]},
    )


def _fit(
    lm: LM, target: Budget | LossTarget, name: str, storage: str, calibration: Calibration | None
) -> FittedModel:
    Recipe((), storage)  # raises where there is no such storage
    if calibration is None:
        raise UserError("a budget is fitted to with data; give some (--calibrate SPEC)")
    held_out = ()
    if isinstance(target, LossTarget):
        kept, held_out = hold_out(calibration.batches)
        calibration = dataclasses.replace(calibration, batches=kept)
    zeros = isinstance(target, Budget) and bool(target.zeros)
    size = _nonzero if zeros else partial(leaf_bytes, storage=storage)
    candidates = SPARSITY_CANDIDATES if zeros else CANDIDATES
    measuring = dataclasses.replace(calibration, task="trying each kernel")
    sensitivity = measure_sensitivity(lm.config, lm.params, measuring, size, candidates=candidates)
    search = BudgetSearch(lm.config, lm.params, calibration, sensitivity, size, storage, name)
    if isinstance(target, LossTarget):
        return search.within_loss(target, partial(_loss, lm, held_out))
    if zeros:
        return search.within(target, _kernel_nonzero)
    return search.within(target, _kernel_bytes if target.bits else model_bytes)


def _kernel_nonzero(config: ModelConfig, params: Params, packed: PackedWeights) -> int:
    """The number of weights of the kernels of the blocks that are not zero."""
    flat = flatten(params)
    return sum(_nonzero(flat[path]) for path in matching(LAYER_KERNELS, params))


def _kernel_bytes(config: ModelConfig, params: Params, packed: PackedWeights) -> int:
    """What the kernels of the blocks take in a file."""
    return sum(packed.stored(path).nbytes for path in matching(LAYER_KERNELS, params))


def _nonzero(leaf: Leaf) -> int:
    return int(jnp.count_nonzero(dequantize(leaf)))


def _loss(lm: LM, batches: Sequence[tuple[np.ndarray, ...]], params: Params) -> float:
    """The loss on batches of calibration data with other parameters, in nats a token."""
    from jaxlm.evaluation.likelihood import row_nll

    nll, count = 0.0, 0
    for *source, tokens_BxT in batches:
        targets_BxT = tokens_BxT[:, 1:]
        real_BxT = targets_BxT != lm.config.pad_id if source else np.ones(targets_BxT.shape, bool)
        batch = {"inputs": tokens_BxT[:, :-1], "targets": targets_BxT, "weights": real_BxT.astype(np.float32)}
        batch |= {"src": source[0]} if source else {}
        nll += float(np.asarray(row_nll(lm.graphdef, params, batch), np.float64).sum())
        count += int(real_BxT.sum())
    return nll / count


def _calibration(
    lm: LM, spec: str, special_tokens: SpecialTokens, first_token: FirstTokenOption, samples: int, context: int,
    seed: int, progress
) -> Calibration:
    if lm.config.kind == "lstm":
        raise UserError("layers of an LSTM are not calibrated; choose a recipe that needs no data")
    batches = calibration_batches(
        spec, lm.tokenizer, pairs=lm.config.kind == "seq2seq", samples=samples,
        context=context or min(lm.config.max_positions, 2048), seed=seed, special_tokens=special_tokens,
        first_token=first_token,
    )
    if (largest := max(int(part.max()) for batch in batches for part in batch)) >= lm.config.vocab_size:
        raise UserError(f"{spec!r} holds the id {largest} and the model knows {lm.config.vocab_size}")
    return Calibration(batches, lambda config: LayerwiseModel(config, nn.initializer(config)[0]), seed, progress)
