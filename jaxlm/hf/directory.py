"""Model directories, read and written: config.json, model.safetensors, tokenizer.json, generation_config.json.

A dense model that is one of the families of ``hf.families.registry`` is written as such, so that transformers loads it.
Any other model, and every compressed one, is written with a ``model_type`` of jaxlm's own.

``read_model`` reads both, and also the directory of a training run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxlm import nn
from jaxlm.checkpoint.storage import PackedWeights, tensor_bytes, unpack_params
from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.disk import replaced_directory
from jaxlm.core.errors import UserError
from jaxlm.core.host_memory import on_host
from jaxlm.core.leaves import is_leaf, merge_adapters
from jaxlm.core.tree import Params, flatten, unflatten
from jaxlm.core.untrusted import parse_json, read_json, read_sealed_json
from jaxlm.data.tokenizers.files import find_tokenizer
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.config import RUNTIME_FIELDS, jaxlm_section, read_config
from jaxlm.hf.families.known_fields import tokenizer_notes
from jaxlm.hf.quantized.compressed_tensors_export import running_dtype, to_compressed_tensors
from jaxlm.hf.reader import read_hf_model
from jaxlm.hf.tensor_files import LazyTensor, TensorFiles, write_tensors, written_bytes
from jaxlm.hf.validate import validate_sizes
from jaxlm.hf.wrappers import text_fields
from jaxlm.hf.writer import plan_export, simplest_hf_config, to_hf_config, to_hf_tensors
from jaxlm.inference.generation_config import FILE as GENERATION_FILE
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.nn.config import ModelConfig

__all__ = ["export_model", "model_bytes", "read_generation", "read_model", "read_model_config", "read_tokenizer",
           "weight_bytes", "write_model"]

COMPRESSED_TENSORS = "compressed-tensors"
_OWN_TYPES = "jaxlm-"  # the prefix of our own model types


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
    packed: PackedWeights | None = None,
) -> Path:
    """Writes a model directory, whole or not at all, in place of an older one of that name.

    On several hosts each process must call this function.

    Args:
        directory: is created, with its parents; where it exists it must be empty or hold a model.
        config, params, tokenizer: the model. Parameters keep their representation, but adapters are merged.
        generation: the defaults of generation.
        storage: "plain", or "huffman" for entropy coding.
        info: JSON-safe facts about how the model was made, kept in config.json under "jaxlm".
        files: JSON-safe contents of further files, by name.
        packed: the same parameters, packed already. It is not used if it holds others, or another storage.

    Returns:
        The directory.

    Raises:
        UserError: the directory holds something else, or the disk is full.
    """

    if packed is not None and not packed.holds(params, storage):
        packed = None

    def write_weights(new: Path, params: Params) -> None:
        fields, tensors, metadata = _weights(config, params, packed or PackedWeights(params, storage), info or {})
        _write_json(new / "config.json", fields)
        write_tensors(new, tensors, metadata)

    files = {GENERATION_FILE: generation.to_json(config), **(files or {})}
    return _write(directory, merge_adapters(params), tokenizer, write_weights, files)


def model_bytes(config: ModelConfig, params: Params, packed: PackedWeights) -> int:
    """The size of the weights that ``write_model`` would write, without writing them; ``packed`` holds ``params``."""
    _, tensors, metadata = _weights(config, params, packed, {})
    return written_bytes(tensors, metadata)


def _weights(
    config: ModelConfig, params: Params, packed: PackedWeights, info: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, np.ndarray | LazyTensor], str]:
    """config.json, the tensors of the files, and their metadata."""
    fields = to_dict(config)
    dense = packed.storage == "plain" and not any(is_leaf(leaf) for leaf in flatten(params).values())
    if dense and (family := simplest_hf_config(config)):
        runtime = {name: fields[name] for name in RUNTIME_FIELDS if name in fields}
        types = {str(leaf.dtype) for leaf in flatten(params).values()}
        family = family | {"dtype": "bfloat16" if types == {"bfloat16"} else "float32"}
        tensors = to_hf_tensors(config, params, family, jnp.dtype(family["dtype"]))
        return family | {"jaxlm": {**info, "runtime": runtime}}, tensors, ""
    model_type = _OWN_TYPES + fields.pop("kind")
    return {"model_type": model_type, **fields, "jaxlm": dict(info)}, packed.tensors, json.dumps(packed.metadata)


def export_model(
    directory: str | Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer | None,
    generation: GenerationConfig = PLAIN,
    *,
    format: str | None = None,
    dtype: str = "float32",
) -> Path:
    """Writes a model directory for transformers; see ``write_model`` for the other arguments.

    Parameters that the family has and the model lacks are added where that changes nothing, such as biases of zero.

    Args:
        format: the ``model_type`` of the family; None is the simplest family that can hold the model.
            "compressed-tensors" is that family with quantized weights in the layout of that name, codes and scales
            unchanged; in all other formats they are written dense.
        dtype: the type of dense weights.

    Raises:
        UserError: the family, or every family, or the layout cannot hold the model.
    """
    compressed = format == COMPRESSED_TENSORS
    fields = to_hf_config(config, format) if format and not compressed else simplest_hf_config(config, exact=False)
    if fields is None:
        raise UserError(f"no family of transformers can be this {config.kind} model: name one with format to see why")

    def write_weights(new: Path, params: Params) -> None:
        if compressed:
            plan = plan_export(config, merge_adapters(params), fields)
            tensors, quantization = to_compressed_tensors(plan, fields["model_type"], jnp.dtype(dtype))
            runs = {"dtype": running_dtype(quantization, dtype), "quantization_config": quantization}
            _write_json(new / "config.json", fields | runs)
            write_tensors(new, tensors)
        else:
            family = fields | {"dtype": dtype}
            _write_json(new / "config.json", family)
            write_tensors(new, to_hf_tensors(config, params, family, jnp.dtype(dtype)))

    return _write(directory, params, tokenizer, write_weights, {GENERATION_FILE: generation.to_json(config)})


def _write(
    directory: str | Path,
    params: Params,
    tokenizer: Tokenizer | None,
    write_weights: Callable[[Path, Params], None],
    files: Mapping[str, Any],
) -> Path:
    """Writes a model directory in the first process. ``write_weights`` writes config.json and the weights into it."""
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


def read_model(
    path: str | Path, *, mesh: Mesh | None = None, dtype: str = "float32", stacked: bool = True
) -> tuple[ModelConfig, Params, Tokenizer | None, dict[str, Any]]:
    """Reads a model directory, of jaxlm or of Hugging Face, or the directory of a training run.

    Args:
        path: the directory.
        mesh: where the parameters of a Hugging Face directory go; each device's part is read by itself.
        dtype: the type of their dense parameters. All other parameters are as stored, compressed ones included.
        stacked: whether layers that are alike are stacked in one array (see ``nn.single_layers``).

    Returns:
        (config, params, tokenizer, info). ``info`` is that of ``write_model``, with ``source`` (the directory),
        ``bytes_on_disk`` (all weights), ``tensor_bytes`` (of each parameter), ``notes`` on what was read in another way
        than it is stored, and ``weights`` (the metadata of packed weights).

    Raises:
        UserError: there is no model, or something is missing or damaged; the message names the file and the tensor.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        problem = "is not a directory" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}; name a model directory or a training run")
    if not _holds_model(path):
        if (path / "experiment.json").is_file():
            return _read_run(path, mesh, dtype, stacked)
        raise UserError(f"{path} has no config.json; name a model directory or a training run")
    try:
        fields, wrapper = text_fields(read_json(path / "config.json"))
        config = _config(fields)
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from None
    tokenizer = read_tokenizer(path, config)
    info = {name: value for name, value in jaxlm_section(fields).items() if name != "runtime"} | {"source": str(path)}
    if not _is_ours(fields):
        config = config if stacked else nn.single_layers(config)
        config, params, facts = read_hf_model(path, fields, config, mesh=mesh, dtype=dtype, wrapper=wrapper)
        notes = facts["notes"] + ([] if tokenizer is None else tokenizer_notes(tokenizer.config))
        return config, params, tokenizer, info | facts | {"notes": notes}
    files = TensorFiles(path)
    weights = _weights_metadata(files, path)
    try:
        params = unpack_params(nn.abstract(config)[1], files, weights)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if not stacked:
        config, params = nn.unstack_layers(config, params)
    return config, params, tokenizer, info | {
        "bytes_on_disk": files.nbytes, "tensor_bytes": tensor_bytes(files.nbytes_of, weights), "weights": weights
    }


def read_model_config(path: Path) -> ModelConfig:
    """The configuration of the model that ``read_model`` would read.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = next((file for file in (path / "config.json", path / "model/config.json") if file.is_file()), None)
    if file is not None:
        try:
            return _config(text_fields(read_json(file))[0])
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
    if not (path / "experiment.json").is_file():
        raise UserError(f"{path} has no config.json; name a model directory or a training run")
    return _run_config(path, read_sealed_json(path / "experiment.json"))


def _is_ours(fields: Mapping[str, Any]) -> bool:
    return str(fields.get("model_type")).startswith(_OWN_TYPES)


def _config(fields: Mapping[str, Any]) -> ModelConfig:
    if not _is_ours(fields):
        return read_config(fields)
    own = {name: value for name, value in fields.items() if name not in ("jaxlm", "model_type")}
    config = from_dict(ModelConfig, own | {"kind": fields["model_type"].removeprefix(_OWN_TYPES)}, stored=True)
    validate_sizes(config)
    return config


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer in a directory; None where there is none.

    Raises:
        UserError: it has ids without an embedding in the model.
    """
    if not find_tokenizer(directory):
        return None
    tokenizer = Tokenizer.load(directory)
    try:
        tokenizer.vocabulary.check_embedding_rows(config.source_vocab_size, config.vocab_size)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    return tokenizer


def read_generation(directory: Path) -> GenerationConfig:
    """The defaults of generation: of generation_config.json, or else of config.json, where older models have them.

    Raises:
        UserError: a value has the wrong type.
    """
    if (directory / GENERATION_FILE).is_file():
        return GenerationConfig.read(directory / GENERATION_FILE, read_json(directory / GENERATION_FILE))
    file = directory / "config.json"
    return GenerationConfig.read(file, read_json(file), older=True) if file.is_file() else PLAIN


def _weights_metadata(files: TensorFiles, path: Path) -> dict[str, Any]:
    try:
        weights = parse_json(files.metadata["jaxlm"])
        if not isinstance(weights, dict) or not isinstance(weights.get("tensors"), dict):
            raise ValueError
        return weights
    except (KeyError, ValueError):
        raise UserError(f"{path}: the weights do not belong to this config.json; copy both again") from None


def _run_config(run: Path, experiment: Mapping[str, Any]) -> ModelConfig:
    """The configuration of the model of a training run."""
    try:
        config = from_dict(ModelConfig, experiment.get("model"), stored=True)
        validate_sizes(config)
        return config
    except UserError as error:
        raise UserError(f"{run / 'experiment.json'}: {error}") from None


def _read_run(
    run: Path, mesh: Mesh | None, dtype: str, stacked: bool
) -> tuple[ModelConfig, Params, Tokenizer | None, dict[str, Any]]:
    """Reads a training run: the model it exported, else its best checkpoint, else its latest."""
    if _holds_model(run / "model"):
        return read_model(run / "model", mesh=mesh, dtype=dtype, stacked=stacked)
    from jaxlm.checkpoint.store import Store  # imports Orbax, which nothing else here needs

    experiment = read_sealed_json(run / "experiment.json")
    lora, evaluation, training = (
        each if isinstance(each := experiment.get(name), dict) else {} for name in ("lora", "eval", "train")
    )
    if lora.get("rank"):
        raise UserError(f"{run} trains adapters and has not written them yet; let it finish")
    config = _run_config(run, experiment)
    mode = "min" if evaluation.get("metric", "loss") == "loss" else "max"
    if not (run / "checkpoints").is_dir():
        raise UserError(f"{run} holds no checkpoint yet; let it train until it has one")
    store = Store(run / "checkpoints", metric_mode=mode, read_only=True)
    try:
        steps = store.best_steps(1) or store.steps()[-1:]
        if not steps:
            raise UserError(f"{run} holds no checkpoint yet; let it train until it has one")
        like = nn.abstract(config)[1]
        which = "average" if training.get("ema") else "params"
        params = unflatten(like, store.restore_part(steps[0], which, flatten(like)))
    finally:
        store.close()
    if not stacked:
        config, params = nn.unstack_layers(config, params)
    return config, params, read_tokenizer(run, config), {"source": str(run), "step": steps[0]}


def weight_bytes(directory: str | Path) -> int:
    """The size on disk of the weights of a model directory."""
    return TensorFiles(Path(directory)).nbytes


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _holds_model(directory: Path) -> bool:
    return (directory / "config.json").is_file()
