"""``LM``, a model with everything it can do as methods, and ``load``, which reads one from disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxlm import nn
from jaxlm.checkpoint.storage import PackedWeights
from jaxlm.compression.fit.search import FittedKernel
from jaxlm.compression.platforms import lower_for_platform
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.report import TensorReport
from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.host_memory import keep_freed_memory
from jaxlm.core.leaves import LoRA, QArray, merge_adapters
from jaxlm.core.sharding import shardings
from jaxlm.core.tree import Params, flatten
from jaxlm.data.tokenizers.files import find_tokenizer
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import (
    export_model,
    read_generation,
    read_json,
    read_model,
    read_model_config,
    write_model,
)
from jaxlm.hf.gguf.export import GGUF_PREFIX, export_gguf
from jaxlm.hf.hub import local_path
from jaxlm.hf.peft.adapters import read_adapter
from jaxlm.hf.peft.base_models import apply_adapters, weights_of
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.nn.config import KVCache, ModelConfig

if TYPE_CHECKING:
    from jaxlm.inference.engine.engine import Engine

__all__ = ["LM", "base_fields", "load", "model_config", "model_tokenizer"]


@dataclass(frozen=True)
class LM:
    """A language or translation model: structure, parameters and tokenizer.

    Attributes:
        config, graphdef, params, tokenizer: the model itself.
        generation: the defaults of ``generate`` and ``translate``, from generation_config.json.
        info: where the model came from (see ``hf.directory.read_model``); ``notes`` are lines for the user.
        recipe, report: how ``compress`` made the model, and what it did to each tensor.
        fitted_kernels: what ``compress`` chose for each kernel where it was given a budget.
        packed: the parameters as ``compress`` measured them and ``save`` writes them.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer | None = None
    generation: GenerationConfig = PLAIN
    info: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    report: tuple[TensorReport, ...] = ()
    fitted_kernels: tuple[FittedKernel, ...] = ()
    packed: PackedWeights | None = field(default=None, repr=False, compare=False)

    def __call__(self, *tokens: jax.Array) -> jax.Array:
        """Float32 logits ``[B, T, V]`` of tokens ``[B, T]``; a translation model takes sources ``[B, S]`` and decoder
        inputs ``[B, T]``."""
        return _logits(self.graphdef, self.params, *tokens)

    def replace(self, **changes: Any) -> LM:
        """The same model with other values of some fields: ``lm.replace(params=transform(lm.params))``."""
        if "params" in changes:
            changes = {"packed": None} | changes
        return dataclasses.replace(self, **changes)

    def configure(self, **fields: Any) -> LM:
        """The same parameters under a configuration with other fields: ``lm.configure(kv_cache="int8")``.

        Raises:
            UserError: the configuration has no such field, or the field cannot have that value.
        """
        config = from_dict(type(self.config), to_dict(self.config) | fields)
        return self.replace(config=config, graphdef=nn.initializer(config)[0])

    def save(self, directory: str | Path) -> Path:
        """Writes a model directory (see ``hf.directory.write_model``) and returns it; with compression.json where
        ``compress`` has just made the model."""
        files = {}
        if self.report:
            rows = [row.to_json() for row in self.report]
            files["compression.json"] = {"recipe": self.recipe.to_json(), "tensors": rows}
            if self.fitted_kernels:
                files["compression.json"]["choices"] = [row.to_json() for row in self.fitted_kernels]
        return write_model(
            directory, self.config, self.params, self.tokenizer, self.generation, files=files,
            storage="plain" if self.recipe is None else self.recipe.storage,
            info={} if self.recipe is None else {"recipe": self.recipe.to_json()}, packed=self.packed,
        )

    def export(self, directory: str | Path, *, format: str | None = None, dtype: str = "float32") -> Path:
        """Writes the model for other programs to load, and returns where it is.

        Args:
            directory: what to write; for GGUF it may be the name of the file.
            format: a family of Hugging Face models (default: the plainest that can be the model), "compressed-tensors"
                (see ``hf.directory.export_model``), or "gguf-f16", "gguf-q8_0", "gguf-q4_0" or "gguf-q4_k" (see
                ``hf.gguf.export``).
            dtype: of dense weights; GGUF does not use it.

        Raises:
            UserError: the format cannot hold the model.
        """
        if format and format.startswith(GGUF_PREFIX):
            kind = format.removeprefix(GGUF_PREFIX)
            return export_gguf(
                directory, self.config, self.params, self.tokenizer, kind, generation=self.generation,
                source=self.info.get("source"),
            )[0]
        return export_model(
            directory, self.config, self.params, self.tokenizer, self.generation, format=format, dtype=dtype
        )

    def generate(self, prompts: Any, **options: Any) -> list[str]:
        """Continues texts or conversations; see ``jaxlm.inference.generation.generate``."""
        from jaxlm.inference.generation import generate

        return generate(self, prompts, **options)

    def engine(self, **options: Any) -> Engine:
        """An engine that serves many requests at once; see ``jaxlm.inference.engine.engine.Engine``."""
        from jaxlm.inference.engine.engine import Engine

        return Engine(self, **options)

    def translate(self, sentences: str | Sequence[str], **options: Any) -> list[str]:
        """Translates sentences; see ``jaxlm.inference.translation.translate``."""
        from jaxlm.inference.translation import translate

        return translate(self, sentences, **options)

    def evaluate(self, spec: str, **options: Any) -> dict[str, Any]:
        """Measures perplexity, and BLEU and chrF of a translation model; see ``jaxlm.evaluation.scoring.evaluate``."""
        from jaxlm.evaluation.scoring import evaluate

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
    stacked: bool = True,
    mesh: Mesh | None = None,
    dtype: str = "float32",
    kv_cache: KVCache | None = None,
) -> LM:
    """Reads a model.

    Args:
        path: a model directory, a training run (its exported model, else its best, else its latest checkpoint) or
            ``hf://org/name``; or a LoRA adapter of PEFT that names its base model.
        adapter: a LoRA adapter of PEFT for the model: a directory, or on the hub.
        merge: merges adapters into the weights; without it they are kept apart, in ``LoRA`` leaves.
        expand: makes dense what this platform cannot run at speed as it is (``info["notes"]`` lists it); without it
            parameters have the representation of the file.
        stacked: whether layers that are alike are stacked in one array. Without it decoding on CPUs is up to twice as
            fast, and compiling takes longer (``nn.single_layers``); on other platforms they always are.
        mesh: where to put the parameters; each device reads its own part of them.
        dtype: of the parameters of a Hugging Face model.
        kv_cache: how decoding stores keys and values (``jaxlm.nn.attention.kv_cache``); None: as the model was saved.

    Raises:
        UserError: there is no such model, or one of its files is damaged; the message names the file.
    """
    keep_freed_memory()
    path, adapters = weights_of(path)
    if adapter is not None:
        adapters.append(read_adapter(local_path(adapter)))
    stacked = stacked or mesh is not None or jax.default_backend() != "cpu"
    config, params, tokenizer, info = read_model(path, mesh=mesh, dtype=dtype, stacked=stacked)
    generation = read_generation(Path(info["source"]))
    notes = info.get("notes")
    notes = [*(map(str, notes) if isinstance(notes, list) else ()), *generation.notes()]
    if expand:
        params, placed = lower_for_platform(params, jax.default_backend())
        notes += placed
    if adapters:
        config, params, tokenizer = apply_adapters(path, adapters, config, params, tokenizer)
        params = params if mesh is None else jax.device_put(params, shardings(params, mesh))
        if merge:
            count = sum(isinstance(leaf, LoRA) and isinstance(leaf.base, QArray) for leaf in flatten(params).values())
            if count:
                notes.append(f"{count} quantized tensors are dense with the adapter merged into them")
            params = merge_adapters(params)
    recipe = Recipe.from_json(info["recipe"]) if "recipe" in info else None
    training = info.get("training")
    if recipe is None and isinstance(training, dict) and (trained_for := training.get("recipe")):
        notes.append(f"trained to be compressed by {trained_for}, and validated so: these are the weights before")
    lm = LM(config, nn.initializer(config)[0], params, tokenizer, generation, info | {"notes": notes}, recipe)
    return lm if kv_cache is None else lm.configure(kv_cache=kv_cache)


def model_config(path: str | Path) -> ModelConfig:
    """The configuration of the model that ``load`` would return, read without its weights."""
    return read_model_config(weights_of(path)[0])


def model_tokenizer(path: str | Path) -> Tokenizer | None:
    """The tokenizer of the model that ``load`` would return, if it has one."""
    base, adapters = weights_of(path)
    directories = [*(adapter.file.parent for adapter in adapters), base, base / "model"]
    directory = next((each for each in directories if find_tokenizer(each)), None)
    return None if directory is None else Tokenizer.load(directory)


def base_fields(path: str | Path) -> Mapping[str, Any] | None:
    """The config.json beside the weights of a model; None for a training run that has not exported a model."""
    base, _ = weights_of(path)
    file = next((file for file in (base / "config.json", base / "model/config.json") if file.is_file()), None)
    return None if file is None else read_json(file)
