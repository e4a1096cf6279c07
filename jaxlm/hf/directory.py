"""A model as a Hugging Face directory: config.json, model.safetensors, tokenizer.json, generation_config.json.

A dense model that is one of the families of ``hf_maps`` is written as such, so that transformers loads it; another one,
and whatever is compressed, has a ``model_type`` of ours.

``read_model`` also reads directories of the Hugging Face families in ``hf_maps`` and the directory of a training run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm import nn
from jaxlm.checkpoint.storage import pack_params, tensor_bytes, unpack_params
from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.disk import replaced_directory
from jaxlm.core.errors import UserError
from jaxlm.core.host_memory import on_host
from jaxlm.core.leaves import is_leaf, merge_adapters
from jaxlm.core.tree import Params, flatten, unflatten
from jaxlm.data.tokenizers.files import find_tokenizer
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.quantized.compressed_tensors_export import compressed_tensors
from jaxlm.hf.reader import RUNTIME, ours, read_config, read_hf
from jaxlm.hf.tensor_files import TensorFiles, write_tensors
from jaxlm.hf.validate import check_sizes
from jaxlm.hf.writer import express, hf_config, hf_tensors, plan
from jaxlm.inference.generation_config import FILE as GENERATION
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.nn.config import ModelConfig

__all__ = ["export_model", "read_generation", "read_model", "read_model_config", "read_tokenizer", "weight_bytes",
           "write_model"]

COMPRESSED_TENSORS = "compressed-tensors"
_PREFIX = "jaxlm-"  # of our model types


def write_model(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    generation: GenerationConfig = PLAIN,
    *,
    storage: str = "plain",
    info: Mapping[str, Any] | None = None,
    files: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model directory, all of it or nothing, in place of an older one of that name.

    Args:
        directory: made, with its parents; where it exists it must be empty or hold a model.
        config, params, tokenizer: the model. Parameters keep their representation, but adapters are merged; on several
            hosts, each must call.
        generation: how it is to generate.
        storage: "plain", or "huffman" for entropy coding.
        info: JSON-safe, kept in config.json under "jaxlm" (how the model came about).
        files: JSON-safe contents of further files, by name.
    """

    def write_weights(new: Path, params: Params) -> None:
        fields = to_dict(config)
        dense = storage == "plain" and not any(is_leaf(leaf) for leaf in flatten(params).values())
        if dense and (family := express(config)):
            runtime = {name: fields[name] for name in RUNTIME if name in fields}
            types = {str(leaf.dtype) for leaf in flatten(params).values()}
            dtype = "bfloat16" if types == {"bfloat16"} else "float32"
            _write_family(new, family, config, params, dtype, {"jaxlm": {**(info or {}), "runtime": runtime}})
        else:
            kind = _PREFIX + fields.pop("kind")
            _write_json(new / "config.json", {"model_type": kind, **fields, "jaxlm": dict(info or {})})
            tensors, weights = pack_params(params, storage)
            write_tensors(new, tensors, json.dumps(weights))

    files = {GENERATION: generation.to_json(config), **(files or {})}
    return _write(directory, merge_adapters(params), tokenizer, write_weights, files)


def export_model(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    generation: GenerationConfig = PLAIN,
    *,
    kind: str | None = None,
    dtype: str = "float32",
) -> Path:
    """As ``write_model``, as a model of the family ``kind``, or of the plainest that can be it.

    What the family has and the model has not is added where it changes nothing, such as biases of zero. Compressed
    weights are written as what they stand for; with "compressed-tensors" in place of a family they keep their codes,
    in that layout. UserError where the family, or any, or the layout cannot be the model.
    """
    compressed = kind == COMPRESSED_TENSORS
    fields = hf_config(config, kind) if kind and not compressed else express(config, exactly=False)
    if fields is None:
        raise UserError(f"no family of transformers can be this {config.kind} model: name one with format to see why")

    def write_weights(new: Path, params: Params) -> None:
        if compressed:
            how = plan(config, merge_adapters(params), fields)
            tensors, layout = compressed_tensors(how, fields["model_type"], jnp.dtype(dtype))
            _write_json(new / "config.json", fields | {"dtype": dtype, "quantization_config": layout})
            write_tensors(new, tensors)
        else:
            _write_family(new, fields, config, params, dtype, {})

    return _write(directory, params, tokenizer, write_weights, {GENERATION: generation.to_json(config)})


def _write(
    directory: str | Path,
    params: Params,
    tokenizer: Tokenizer | None,
    write_weights: Callable[[Path, Params], None],  # into a directory, config.json with them
    files: Mapping[str, Any],
) -> Path:
    """A model directory, from the first process; UserError where it would replace something that is not one."""
    directory = Path(directory).expanduser()
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not _holds_model(directory)):
        raise UserError(f"{directory} exists and is not a model directory; choose another")
    params = jax.tree.map(on_host, params)
    if jax.process_index() == 0:
        with replaced_directory(directory) as new:
            write_weights(new, params)
            if tokenizer is not None:
                tokenizer.save(new)
            for name, content in files.items():
                _write_json(new / name, content)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jaxlm.write_model")
    return directory


def _write_family(
    new: Path, fields: dict[str, Any], config: ModelConfig, params: Params, dtype: str, more: dict[str, Any]
) -> None:
    fields = fields | {"dtype": dtype}
    _write_json(new / "config.json", fields | more)
    write_tensors(new, hf_tensors(config, params, fields, jnp.dtype(dtype)))


def read_model(
    path: str | Path, *, mesh: Mesh | None = None, dtype: str = "float32"
) -> tuple[ModelConfig, Params, Tokenizer | None, dict[str, Any]]:
    """(config, params, tokenizer, info) of a model directory, a Hugging Face one, or a training run.

    Parameters come as stored, compressed leaves included; those of a Hugging Face directory in ``dtype``, and on a
    ``mesh`` each device's part by itself. ``info`` is what ``write_model`` was given, with ``source``
    (the directory), ``bytes_on_disk`` (of the weights), ``tensor_bytes`` (of each parameter), ``notes`` on what was
    read in another way than it was stored, and ``weights`` (the metadata of packed weights).

    Raises:
        UserError: nothing there, or something missing or damaged; the message names the file, and the tensor.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; name a model directory or a training run")
    if not _holds_model(path):
        if (path / "experiment.json").is_file():
            return _read_run(path, mesh, dtype)
        raise UserError(f"{path} has no config.json; name a model directory or a training run")
    fields = read_json(path / "config.json")
    try:
        config = _config(fields)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from None
    tokenizer = read_tokenizer(path, config)
    info = {name: value for name, value in ours(fields).items() if name != "runtime"} | {"source": str(path)}
    if not _is_ours(fields):
        config, params, facts = read_hf(path, fields, config, mesh=mesh, dtype=dtype)
        return config, params, tokenizer, info | facts
    files = TensorFiles(path)
    weights = _weights_metadata(files, path)
    try:
        params = unpack_params(nn.abstract(config)[1], files, weights)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return config, params, tokenizer, info | {
        "bytes_on_disk": files.nbytes, "tensor_bytes": tensor_bytes(files.size, weights), "weights": weights
    }


def read_model_config(path: Path) -> ModelConfig:
    """The configuration of what ``read_model`` would read. UserError where there is none."""
    file = next((file for file in (path / "config.json", path / "model/config.json") if file.is_file()), None)
    if file is not None:
        try:
            return _config(read_json(file))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    if not (path / "experiment.json").is_file():
        raise UserError(f"{path} has no config.json; name a model directory or a training run")
    return from_dict(ModelConfig, read_json(path / "experiment.json").get("model"), stored=True)


def _is_ours(fields: Mapping[str, Any]) -> bool:
    return str(fields.get("model_type")).startswith(_PREFIX)


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    if not _is_ours(fields):
        return read_config(fields)
    own = {name: value for name, value in fields.items() if name not in ("jaxlm", "model_type")}
    config = from_dict(ModelConfig, own | {"kind": fields["model_type"].removeprefix(_PREFIX)}, stored=True)
    check_sizes(config)
    return config


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer in a directory, if any. UserError where it has ids for which the model has no embeddings."""
    if not find_tokenizer(directory):
        return None
    tokenizer = Tokenizer.load(directory)
    try:
        rows = getattr(config, "src_vocab_size", 0) or config.vocab_size
        tokenizer.vocabulary.check_embedding_rows(rows, config.vocab_size)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    return tokenizer


def read_generation(directory: Path) -> GenerationConfig:
    """How a model is to generate: its generation_config.json, else what older ones say in config.json. UserError where
    a value is of the wrong kind."""
    if (directory / GENERATION).is_file():
        return GenerationConfig.read(directory / GENERATION, read_json(directory / GENERATION))
    file = directory / "config.json"
    return GenerationConfig.read(file, read_json(file), older=True) if file.is_file() else PLAIN


def _weights_metadata(files: TensorFiles, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(files.metadata["jaxlm"])
        if not isinstance(found, dict) or not isinstance(found.get("tensors"), dict):
            raise ValueError
        return found
    except (KeyError, ValueError, RecursionError):
        raise UserError(f"{path}: the weights do not belong to this config.json; copy both again") from None


def _read_run(
    run: Path, mesh: Mesh | None, dtype: str
) -> tuple[ModelConfig, Params, Tokenizer | None, dict[str, Any]]:
    """A training run: the model it exported, else its best checkpoint, else its latest."""
    if _holds_model(run / "model"):
        return read_model(run / "model", mesh=mesh, dtype=dtype)
    from jaxlm.checkpoint.store import Store  # Orbax, which only this needs

    experiment = read_json(run / "experiment.json")
    if experiment.get("lora", {}).get("rank"):
        raise UserError(f"{run} trains adapters and has not written them yet; let it finish")
    config = from_dict(ModelConfig, experiment.get("model"), stored=True)
    mode = "min" if experiment.get("eval", {}).get("metric", "loss") == "loss" else "max"
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} holds no checkpoint yet; let it train until it has one")
    store = Store(run / "checkpoints", metric_mode=mode, read_only=True)
    try:
        steps = store.best_steps(1) or store.steps()[-1:]
        if not steps:
            raise UserError(f"{run} holds no checkpoint yet; let it train until it has one")
        like = nn.abstract(config)[1]
        which = "average" if experiment.get("train", {}).get("ema") else "params"
        params = unflatten(like, store.restore_part(steps[0], which, flatten(like)))
    finally:
        store.close()
    return config, params, read_tokenizer(run, config), {"source": str(run), "step": steps[0]}


def weight_bytes(directory: str | Path) -> int:
    """What the weights of a model directory take on disk."""
    return TensorFiles(Path(directory)).nbytes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. UserError if it is something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy or save it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} does not hold a JSON object; copy or save it again")
    return data


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _holds_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()
