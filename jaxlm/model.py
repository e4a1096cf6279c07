"""``LM``: a model in hand, with the verbs as methods; ``load`` gets one from disk."""

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
from jaxlm.compression.fit.budget import FittedKernel
from jaxlm.compression.platforms import place
from jaxlm.compression.recipe import Recipe
from jaxlm.compression.report import Row
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
    read_tokenizer,
    write_model,
)
from jaxlm.hf.gguf.export import GGUF_PREFIX, export_gguf
from jaxlm.hf.hub import local_path
from jaxlm.hf.peft.adapters import ADAPTER_CONFIG, Adapter, apply_adapter, read_adapter
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.nn.config import KVCache, ModelConfig

if TYPE_CHECKING:
    from jaxlm.inference.engine.engine import Engine

__all__ = ["LM", "base_fields", "load", "model_config", "model_tokenizer"]



@dataclass(frozen=True)
class LM:
    """A language or translation model: structure, parameters and tokenizer.

    ``generation`` has the defaults of ``generate`` and ``translate``, from generation_config.json.
    ``info`` says where it came from (see ``hf.directory.read_model``; ``notes`` were made while loading).
    ``recipe`` and ``report`` are those of ``compress``, and ``fitted_kernels`` what it chose for each kernel where it was given a budget.
    """

    config: ModelConfig
    graphdef: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer | None = None
    generation: GenerationConfig = PLAIN
    info: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    report: tuple[Row, ...] = ()
    fitted_kernels: tuple[FittedKernel, ...] = ()

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
            if self.fitted_kernels:
                files["compression.json"]["choices"] = [row.to_json() for row in self.fitted_kernels]
        return write_model(
            directory, self.config, self.params, self.tokenizer, self.generation, files=files,
            storage="plain" if self.recipe is None else self.recipe.storage,
            info={} if self.recipe is None else {"recipe": self.recipe.to_json()},
        )

    def export(self, directory: str | Path, *, format: str | None = None, dtype: str = "float32") -> Path:
        """Writes the model for others to load, and says where.

        ``format`` is a Hugging Face family (default: the plainest), "compressed-tensors" (see ``export_model``), or
        "gguf-f16", "gguf-q8_0", "gguf-q4_0" or "gguf-q4_k" (see ``hf.gguf.export``; ``directory`` may be the
        name of the file, and ``dtype`` has no part in it).
        """
        if format and format.startswith(GGUF_PREFIX):
            kind = format.removeprefix(GGUF_PREFIX)
            return export_gguf(directory, self.config, self.params, self.tokenizer, kind)[0]
        return export_model(
            directory, self.config, self.params, self.tokenizer, self.generation, format=format, dtype=dtype
        )

    def generate(self, prompts: Any, **options: Any) -> list[str]:
        """Continuations of texts or conversations; see ``jaxlm.inference.generation.generate``."""
        from jaxlm.inference.generation import generate

        return generate(self, prompts, **options)

    def engine(self, **options: Any) -> Engine:
        """What serves many requests at once; see ``jaxlm.inference.engine.engine.Engine``."""
        from jaxlm.inference.engine.engine import Engine

        return Engine(self, **options)

    def translate(self, sentences: str | Sequence[str], **options: Any) -> list[str]:
        """Translations of sentences; see ``jaxlm.inference.translation.translate``."""
        from jaxlm.inference.translation import translate

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

    ``kv_cache`` says how decoding keeps keys and values (``jaxlm.nn.attention.kv_cache``); None is as the model was saved.

    ``adapter`` is a LoRA adapter of PEFT for the model, a directory or on the hub; ``path`` may itself be one that says
    where its base model is. It is merged into the weights, or without ``merge`` kept apart in ``LoRA`` leaves.

    UserError where there is no such model, or something in it is damaged.
    """
    keep_freed_memory()
    path, adapters = _base(path)
    if adapter is not None:
        adapters.append(read_adapter(local_path(adapter)))
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
    path = local_path(path)
    if (path / "adapter" / ADAPTER_CONFIG).is_file() and not (path / "model").exists():
        path = path / "adapter"
    if not (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file():
        return path, []
    adapter = read_adapter(path)
    return local_path(adapter.base_model), [adapter]


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


def _adapted(
    path: Path, adapters: Sequence[Adapter], config: ModelConfig, params: Params, tokenizer: Tokenizer | None
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """The model with its adapters kept apart, and the tokenizer that the last one with a tokenizer was trained with."""
    fields = read_json(path / "config.json") if (path / "config.json").is_file() else None
    for adapter in adapters:
        config, params = apply_adapter(adapter, config, params, fields)
        tokenizer = read_tokenizer(adapter.file.parent, config) or tokenizer
    return config, params, tokenizer
