"""``LM``: a model in hand, with the verbs as methods; ``load`` gets one from disk, ``compress`` makes a smaller one."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxlm import nn
from jaxlm.checkpoint.adapters import CONFIG, Adapter, apply_adapter, read_adapter
from jaxlm.checkpoint.directory import (
    export_model,
    read_generation,
    read_json,
    read_model,
    read_model_config,
    read_tokenizer,
    weight_bytes,
    write_model,
)
from jaxlm.checkpoint.formats import leaf_bytes, pack_params, stored
from jaxlm.checkpoint.generation_config import PLAIN, GenerationConfig
from jaxlm.checkpoint.gguf_export import GGUF, export_gguf
from jaxlm.checkpoint.hub import local
from jaxlm.compression.budget import Budget, Fit, Fitted, LossTarget
from jaxlm.compression.budget import Row as ChoiceRow
from jaxlm.compression.calibrate import Calibration
from jaxlm.compression.placement import place
from jaxlm.compression.recipe import Recipe, load_recipe
from jaxlm.compression.report import Row
from jaxlm.compression.report import report as make_report
from jaxlm.compression.steps import BLOCKS, matching
from jaxlm.compression.survey import OPTIONS, SPARSITIES, survey
from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.errors import UserError
from jaxlm.core.host import keep_freed_memory
from jaxlm.core.leaves import LoRA, QArray, dequantize, is_leaf, merge_adapters
from jaxlm.core.sharding import shardings
from jaxlm.core.tree import Leaf, Params, flatten
from jaxlm.data.calibration import calibration_batches, hold_out
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.data.tokenizer_files import find_tokenizer
from jaxlm.nn.config import KVCache, ModelConfig
from jaxlm.nn.walk import Walk

if TYPE_CHECKING:
    from jaxlm.inference.engine import Engine

__all__ = ["LM", "base_fields", "compress", "load", "model_config", "model_tokenizer"]



@dataclass(frozen=True)
class LM:
    """A language or translation model: structure, parameters and tokenizer.

    ``generation`` has the defaults of ``generate`` and ``translate``, from generation_config.json.
    ``info`` says where it came from (see ``checkpoint.directory.read_model``; ``notes`` were made while loading).
    ``recipe`` and ``report`` are those of ``compress``, and ``choices`` what it chose where it was given a budget.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer | None = None
    generation: GenerationConfig = PLAIN
    info: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    report: tuple[Row, ...] = ()
    choices: tuple[ChoiceRow, ...] = ()

    def __call__(self, *tokens: jax.Array) -> jax.Array:
        """Float32 logits ``[B, T, V]`` of tokens ``[B, T]``; of (source ``[B, S]``, decoder inputs ``[B, T]``) where
        the model translates."""
        return _logits(self.graphdef, self.params, *tokens)

    def replace(self, **changes: Any) -> LM:
        """The same model but for some fields: ``lm.replace(params=transform(lm.params))``."""
        return dataclasses.replace(self, **changes)

    def configure(self, **fields: Any) -> LM:
        """The same parameters under a configuration with other fields: ``lm.configure(kv_cache="int8")``.

        UserError on a field that there is not, or a value it cannot have.
        """
        config = from_dict(type(self.config), to_dict(self.config) | fields)
        return self.replace(config=config, graphdef=nn.initializer(config)[0])

    def save(self, directory: str | Path) -> Path:
        """Writes a model directory (see ``write_model``), with compression.json if the model was just compressed."""
        files = {}
        if self.report:
            rows = [row.to_json() for row in self.report]
            files["compression.json"] = {"recipe": self.recipe.to_json(), "tensors": rows}
            if self.choices:
                files["compression.json"]["choices"] = [row.to_json() for row in self.choices]
        return write_model(
            directory, self.config, self.params, self.tokenizer, self.generation, files=files,
            storage="plain" if self.recipe is None else self.recipe.storage,
            info={} if self.recipe is None else {"recipe": self.recipe.to_json()},
        )

    def export(self, directory: str | Path, *, format: str | None = None, dtype: str = "float32") -> Path:
        """Writes the model for others to load, and says where.

        ``format`` is a Hugging Face family (default: the plainest), "compressed-tensors" (see ``export_model``), or
        "gguf-f16", "gguf-q8_0", "gguf-q4_0" or "gguf-q4_k" (see ``checkpoint.gguf_export``; ``directory`` may be the
        name of the file, and ``dtype`` has no part in it).
        """
        if format and format.startswith(GGUF):
            kind = format.removeprefix(GGUF)
            return export_gguf(directory, self.config, self.params, self.tokenizer, kind)[0]
        return export_model(
            directory, self.config, self.params, self.tokenizer, self.generation, kind=format, dtype=dtype
        )

    def generate(self, prompts: Any, **options: Any) -> list[str]:
        """Continuations of texts or conversations; see ``jaxlm.inference.generate.generate``."""
        from jaxlm.inference.generate import generate

        return generate(self, prompts, **options)

    def engine(self, **options: Any) -> Engine:
        """What serves many requests at once; see ``jaxlm.inference.engine.Engine``."""
        from jaxlm.inference.engine import Engine

        return Engine(self, **options)

    def translate(self, sentences: str | Sequence[str], **options: Any) -> list[str]:
        """Translations of sentences; see ``jaxlm.inference.translate.translate``."""
        from jaxlm.inference.translate import translate

        return translate(self, sentences, **options)

    def evaluate(self, spec: str, **options: Any) -> dict[str, Any]:
        """Perplexity, and BLEU and chrF where it translates; see ``jaxlm.evaluation.evaluate.evaluate``."""
        from jaxlm.evaluation.evaluate import evaluate

        return evaluate(self, spec, **options)


@partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, params: Params, *tokens: jax.Array) -> jax.Array:
    return nnx.merge(graphdef, params)(*tokens)


def load(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    merge: bool = True,
    expand: bool = True,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    kv_cache: KVCache | None = None,
) -> LM:
    """A model from a model directory, a training run (its exported model, or its best or latest checkpoint) or
    ``hf://org/name``.

    Parameters of a Hugging Face model get ``dtype``; on a ``mesh`` each device reads its own part of them.
    ``expand`` makes dense whatever this platform cannot run at speed as it is (``info["notes"]`` says what); without it
    the parameters are what the file holds.

    ``kv_cache`` says how decoding keeps keys and values (``jaxlm.nn.cache``); None is as the model was saved.

    ``adapter`` is a LoRA adapter of PEFT for the model, a directory or on the hub; ``path`` may itself be one that says
    where its base model is. It is merged into the weights, or without ``merge`` kept apart in ``LoRA`` leaves.

    UserError where there is no such model, or something in it is damaged.
    """
    keep_freed_memory()
    path, adapters = _base(path)
    if adapter is not None:
        adapters.append(read_adapter(local(adapter)))
    config, params, tokenizer, info = read_model(path, mesh=mesh, dtype=dtype)
    generation = read_generation(Path(info["source"]))
    notes = [*info.get("notes", ()), *generation.notes()]
    if expand:
        params, placed = place(params, jax.default_backend())
        notes += placed
    if adapters:
        config, params, tokenizer = _adapted(path, adapters, config, params, tokenizer)
        params = params if mesh is None else jax.device_put(params, shardings(params, mesh))
        if merge:
            over = sum(isinstance(leaf, LoRA) and isinstance(leaf.base, QArray) for leaf in flatten(params).values())
            notes += [f"{over} quantized tensors are dense with the adapter merged into them"] if over else []
            params = merge_adapters(params)
    recipe = Recipe.from_json(info["recipe"]) if "recipe" in info else None
    if recipe is None and (trained_for := info.get("training", {}).get("recipe")):
        notes.append(f"trained to be compressed by {trained_for}, and validated so: these are the weights before")
    lm = LM(config, nn.initializer(config)[0], params, tokenizer, generation, info | {"notes": notes}, recipe)
    return lm if kv_cache is None else lm.configure(kv_cache=kv_cache)


def _base(path: str | Path) -> tuple[Path, list[Adapter]]:
    """Where the weights of a MODEL are, and the adapter that it is on them, if it is one: a directory of PEFT, or a run
    that has trained adapters and not merged them."""
    path = local(path)
    if (path / "adapter" / CONFIG).is_file() and not (path / "model").exists():
        path = path / "adapter"
    if not (path / CONFIG).is_file() or (path / "config.json").is_file():
        return path, []
    adapter = read_adapter(path)
    return local(adapter.base_model), [adapter]


def model_config(path: str | Path) -> ModelConfig:
    """The configuration of the model that ``load`` would give, read without its weights."""
    return read_model_config(_base(path)[0])


def model_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of the model that ``load`` would give, if it has any."""
    base, adapters = _base(path)
    homes = [*(adapter.file.parent for adapter in adapters), base, base / "model"]
    home = next((home for home in homes if find_tokenizer(home)), None)
    return None if home is None else Tokenizer.load(home)


def base_fields(path: str | Path) -> Mapping[str, Any] | None:
    """The config.json that the weights of a MODEL have beside them; None for a run that has exported nothing."""
    base, _ = _base(path)
    file = next((file for file in (base / "config.json", base / "model/config.json") if file.is_file()), None)
    return None if file is None else read_json(file)


def compress(
    lm: LM,
    recipe: str | Recipe | None = None,
    *,
    fit: str = "",
    max_perplexity: str = "",
    storage: str = "plain",
    calibrate: str = "",
    samples: int = 128,
    context: int = 0,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> LM:
    """A smaller model, by a recipe or to a budget, with a report of each tensor; the same arguments, the same bytes.

    The parameters keep their compressed representation, whatever the platform makes of it when they are loaded.
    An adapter is merged first.

    Args:
        lm: a dense model.
        recipe: a name (``jaxlm recipes`` lists them), a file or a ``Recipe``. Without one, bits, groups and sparsity
            are chosen for each kernel of the blocks (``compression.budget``); the result has a recipe that says so.
        fit: the least loss in "3.2bits" a weight of these kernels, scales and zero points included; in "900MiB" of
            all weights on disk, embeddings and head too, which stay as they are; or with "70%zeros" in these kernels,
            which are pruned and not rounded.
        max_perplexity: the smallest model of a perplexity of at most "46.5", or "+1%" above the dense model's, on a
            fifth of the calibration data, which is then not calibrated with.
        storage: of a model without a recipe, plain or huffman.
        calibrate: a SPEC of data, for what needs some: text the model should be good at, or sentence pairs.
        samples: windows of text of ``context`` tokens (0: the model's own, at most 2,048) to calibrate with; of pairs,
            16 times as many.
        seed: of what is random: which windows, rotations, rounding that is learned.
        progress: called with what is going on, how much is done and how much there is.

    UserError on an unknown recipe, one that cannot be done to this model or lacks its data, a budget that is too small,
    and on a model that is compressed already.
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
    calibration = _calibration(lm, calibrate, samples, context, seed, progress) if calibrate else None
    if recipe is None:
        fitted = _fit(lm, target, f"fit-{fit or max_perplexity}", storage, calibration, progress)
        recipe, done, choices = fitted.recipe, fitted.model, fitted.rows
    else:
        done, choices = recipe.run(lm.config, lm.params, calibration), ()
    alike = not any(getattr(step, "folds_scales", False) for step in recipe.steps)
    rows = make_report(lm.params if alike else None, done.params, stored(*pack_params(done.params, recipe.storage)))
    return lm.replace(
        config=done.config, graphdef=nn.initializer(done.config)[0], params=done.params, recipe=recipe,
        report=tuple(rows), choices=choices, info=lm.info | {"notes": [*lm.info.get("notes", ()), *done.notes]},
    )


def _fit(
    lm: LM, target: Budget | LossTarget, name: str, storage: str, calibration: Calibration | None, progress
) -> Fitted:
    Recipe((), storage)  # raises where there is no such storage
    if calibration is None:
        raise UserError("what to give up is chosen with data; give some (--calibrate SPEC)")
    held = ()
    if isinstance(target, LossTarget):
        kept, held = hold_out(calibration.batches)
        calibration = dataclasses.replace(calibration, batches=kept)
    zeros = isinstance(target, Budget) and bool(target.zeros)
    size = _nonzero if zeros else partial(leaf_bytes, storage=storage)
    trying = None if progress is None else partial(progress, "trying each kernel")
    calibrating = dataclasses.replace(calibration, progress=trying)
    seen = survey(lm.config, lm.params, calibrating, size, ways=SPARSITIES if zeros else OPTIONS)
    best = Fit(lm.config, lm.params, calibration, seen, size, storage, name)
    if zeros:
        return best.within(target, lambda config, params: sum(map(_nonzero, _kernels(params).values())))
    if isinstance(target, Budget):
        return best.within(target, partial(_kernel_bytes if target.bits else _file_bytes, storage))
    return best.within_loss(target, partial(_loss, lm, held))


def _kernel_bytes(storage: str, config: ModelConfig, params: Params) -> int:
    """What the kernels of the blocks take in a file."""
    sizes = stored(*pack_params(params, storage))
    return sum(sizes[path][0] for path in _kernels(params))


def _kernels(params: Params) -> dict[str, Leaf]:
    """The kernels of the blocks that are compressed."""
    flat = flatten(params)
    return {path: flat[path] for path in matching(BLOCKS, params)}


def _nonzero(leaf: Leaf) -> int:
    return int(jnp.count_nonzero(dequantize(leaf)))


def _file_bytes(storage: str, config: ModelConfig, params: Params) -> int:
    """What all weights take on disk."""
    with tempfile.TemporaryDirectory() as scratch:
        return weight_bytes(write_model(Path(scratch) / "model", config, params, None, storage=storage))


def _loss(lm: LM, batches: Sequence[tuple[np.ndarray, ...]], params: Params) -> float:
    """Nats a token of batches of calibration data, with other parameters."""
    from jaxlm.evaluation.perplexity import row_nll

    nll, count = 0.0, 0
    for *source, tokens_BxT in batches:
        targets_BxT = tokens_BxT[:, 1:]
        real_BxT = targets_BxT != lm.config.pad_id if source else np.ones(targets_BxT.shape, bool)
        batch = {"inputs": tokens_BxT[:, :-1], "targets": targets_BxT, "weights": real_BxT.astype(np.float32)}
        batch |= {"src": source[0]} if source else {}
        nll += float(np.asarray(row_nll(lm.graphdef, params, batch), np.float64).sum())
        count += int(real_BxT.sum())
    return nll / count


def _calibration(lm: LM, spec: str, samples: int, context: int, seed: int, progress) -> Calibration:
    if lm.config.kind == "lstm":
        raise UserError("layers of an LSTM are not calibrated; choose a recipe that needs no data")
    batches = calibration_batches(
        spec, lm.tokenizer, pairs=lm.config.kind == "seq2seq", samples=samples,
        context=context or min(lm.config.max_positions, 2048), seed=seed,
    )
    if (largest := max(int(part.max()) for batch in batches for part in batch)) >= lm.config.vocab_size:
        raise UserError(f"{spec!r} holds the id {largest} and the model knows {lm.config.vocab_size}")
    return Calibration(
        batches, lambda config: Walk(config, nn.initializer(config)[0]), seed,
        None if progress is None else partial(progress, "solving layers"),
    )


def _adapted(
    path: Path, adapters: Sequence[Adapter], config: ModelConfig, params: Params, tokenizer: Tokenizer | None
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """The model with its adapters kept apart, and the tokenizer that the last one with a tokenizer was trained with."""
    fields = read_json(path / "config.json") if (path / "config.json").is_file() else None
    for adapter in adapters:
        config, params = apply_adapter(adapter, config, params, fields)
        tokenizer = read_tokenizer(adapter.file.parent, config) or tokenizer
    return config, params, tokenizer
