"""The files of a LoRA adapter in the format of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.core.disk import replaced_directory
from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import Pattern, read_json
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.tensor_files import TensorFiles, write_file

__all__ = ["ADAPTER_CONFIG", "Adapter", "LoraDelta", "read_adapter", "write_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_MAGNITUDE = ".lora_magnitude_vector"
# PEFT 0.21 writes a resized table that it trains (modules_to_save) under three names: as NAME.weight, the same within
# its wrapper, and what the wrapper replaces.
_TRAINED, _ORIGINAL = ".modules_to_save.", ".original_module."
_PREFIX = "base_model.model."  # starts every name in the file
_LARGEST = 1e9  # of ranks and alphas

_FIELDS = {
    "alpha_pattern", "base_model_name_or_path", "init_lora_weights", "lora_alpha", "peft_type", "r", "rank_pattern",
    "revision", "use_dora", "use_rslora",
}
# Fields about training, and fields that the names and shapes of the tensors make superfluous.
_IGNORED_FIELDS = {
    "auto_mapping", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "runtime_config",
    "target_modules", "task_type",
}
# Values of init_lora_weights that leave the base model as it is; all others change it.
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal")
# Suffix of A -> (suffix of B, whether the pair adapts a linear map; else it adapts an embedding).
_PAIRS = {
    ".lora_A.weight": (".lora_B.weight", True), ".lora_embedding_A": (".lora_embedding_B", False),
}


@dataclass(frozen=True)
class LoraDelta:
    """The change of one module: ``scale * a_IxR @ b_RxO`` is added to its weight ``[I, O]`` (of an embedding: ``[rows,
    width]``). ``magnitude`` has the norms ``[O]`` that the columns of the sum get in DoRA. ``linear`` is false for an
    embedding."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    linear: bool = True
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter as its file has it, under the names of the base model's family.

    - ``base`` is where the base model is: a directory or a name on the hub, there with a ``revision``.
    - ``deltas`` are by the names of modules, as in model.layers.0.self_attn.q_proj.
    - ``base_layer_tensors`` are whole tensors of modules that have deltas, such as biases.
    - ``saved_modules`` are whole tensors of other modules (PEFT's ``modules_to_save``).
    """

    file: Path
    base: str
    revision: str | None
    deltas: Mapping[str, LoraDelta]
    base_layer_tensors: Mapping[str, np.ndarray]
    saved_modules: Mapping[str, np.ndarray]

    @property
    def base_model(self) -> str:
        """Where the base model is: a path for ``jaxlm.load``.

        Raises:
            UserError: the adapter names no directory and no repository of the hub.
        """
        name = self.base if self.base.startswith("hf://") or Path(self.base).is_dir() else f"hf://{self.base}"
        if not re.fullmatch(r"hf://[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", name) and not Path(name).is_dir():
            raise UserError(
                f"{self.file.with_name(ADAPTER_CONFIG)}: its base model {self.base!r} is not there; name the model's "
                "directory, and this one as its adapter"
            )
        return f"{name}@{self.revision}" if self.revision and name.startswith("hf://") and "@" not in name else name


def read_adapter(directory: str | Path) -> Adapter:
    """The LoRA adapter of a PEFT directory.

    Raises:
        UserError: there is none, a file is damaged, or the adapter is not LoRA or has a field that may change results
            and is not supported.
    """
    directory = Path(directory).expanduser()
    path = directory / ADAPTER_CONFIG
    if not path.is_file():
        raise UserError(f"{directory} has no {ADAPTER_CONFIG}; name a PEFT adapter directory")
    config = {name: value for name, value in read_json(path).items() if value is not None}
    try:
        _check_config(config)
        for name in ("rank_pattern", "alpha_pattern"):  # they match the end of a module's name, as in PEFT
            given = config.get(name, {})
            config[name] = [
                (Pattern(rf"(.*\.)?({pattern})$", name, pattern), value) for pattern, value in given.items()
            ]
        return _read_tensors(directory, config)
    except UserError as error:
        raise UserError(str(error) if str(directory) in str(error) else f"{path}: {error}") from None


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type {config.get('peft_type')!r} is not supported; only LORA is")
    for name, value in sorted(config.items()):
        if value and name not in _FIELDS and name not in _IGNORED_FIELDS:
            raise UserError(f"{name} = {value!r} is not supported, and might change what the adapter computes")
    init = config.get("init_lora_weights")
    if init not in _PLAIN_INITS:
        raise UserError(
            f"init_lora_weights = {init!r} changed the base model as well; save the adapter again with peft's "
            "path_initial_model_for_weight_conversion"
        )
    for name, pattern in {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}.items():
        if not isinstance(config.get(pattern, {}), dict):
            raise UserError(f"{pattern} = {config[pattern]!r} is not an object with named fields")
        for value in (config.get(name, 8), *config.get(pattern, {}).values()):
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
                raise UserError(f"{name} = {repr(value)[:80]} is not a number that it can be")


def _read_tensors(directory: Path, config: Mapping[str, Any]) -> Adapter:
    file = directory / _WEIGHTS
    if not file.is_file():
        raise UserError(f"{directory} has no {_WEIGHTS}; save the adapter with peft as safetensors")
    tensors = TensorFiles(directory, _WEIGHTS)
    seconds = {second: first for first, (second, _) in _PAIRS.items()}
    deltas: dict[str, LoraDelta] = {}
    base_layer_tensors: dict[str, np.ndarray] = {}
    saved_modules: dict[str, np.ndarray] = {}
    adapted = {
        name.removeprefix(_PREFIX).removesuffix(first) for name in tensors for first in _PAIRS if name.endswith(first)
    }
    for name in tensors:
        module = name.removeprefix(_PREFIX)
        if module == name:
            raise UserError(f"{file}: tensor {name!r} does not begin with {_PREFIX}; it is not an adapter of PEFT")
        first = next((each for each in _PAIRS if module.endswith(each)), None)
        second = next((each for each in seconds if module.endswith(each)), None)
        if first is not None:
            module, (partner, linear) = module.removesuffix(first), _PAIRS[first]
            delta = _delta(tensors, name, f"{_PREFIX}{module}{partner}", linear, module, config)
            deltas[module] = replace(delta, magnitude=_magnitude(tensors, module, delta, config))
        elif second is not None:
            if name.removesuffix(second) + seconds[second] not in tensors:
                partner = seconds[second].lstrip(".")
                raise UserError(f"{file}: tensor {name!r} has no partner {partner}; save the adapter again")
        elif module.endswith(_MAGNITUDE):
            if module.removesuffix(_MAGNITUDE) not in adapted:
                raise UserError(f"{file}: tensor {name!r} has no partner lora_A; save the adapter again")
        elif "lora_" in module:
            raise UserError(f"{file}: tensor {name!r} is not of a plain LoRA adapter; only those are supported")
        elif ".base_layer." in module:
            base_layer_tensors[module.replace(".base_layer.", ".")] = tensors.read_floats(name)
        elif _ORIGINAL not in module:
            module, array = module.replace(_TRAINED, "."), tensors.read_floats(name)
            if not np.array_equal(saved_modules.setdefault(module, array), array, equal_nan=True):
                raise UserError(f"{file}: tensor {name!r} is another than {module!r}; save the adapter again")
    base, revision = config.get("base_model_name_or_path", ""), config.get("revision")
    return Adapter(file, str(base), revision, deltas, base_layer_tensors, saved_modules)


def _delta(
    tensors: TensorFiles, first: str, second: str, linear: bool, module: str, config: Mapping[str, Any]
) -> LoraDelta:
    """The delta of ``module`` from the tensors ``first`` (A) and ``second`` (B), without its magnitude."""
    a, b = tensors.read_floats(first), tensors.read_floats(second)
    file = tensors.path_of(first)
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or 0 in a.shape:
        raise UserError(f"{file}: tensor {first!r} is {list(a.shape)} and its partner {list(b.shape)}; they do not fit")
    rank = _matching(config["rank_pattern"], module, config.get("r", 8))
    if rank != a.shape[0]:
        raise UserError(f"{file}: tensor {first!r} has rank {a.shape[0]}, by {ADAPTER_CONFIG} it should be {rank}")
    alpha = _matching(config["alpha_pattern"], module, config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraDelta(a.T.astype(np.float32), b.T.astype(np.float32), scale, linear)


def _magnitude(
    tensors: TensorFiles, module: str, delta: LoraDelta, config: Mapping[str, Any]
) -> np.ndarray | None:
    name = f"{_PREFIX}{module}{_MAGNITUDE}"
    if (name in tensors) != bool(config.get("use_dora")):
        raise UserError(
            f"use_dora is {bool(config.get('use_dora'))}, and {name!r} does not go with it; save the adapter again"
        )
    if name not in tensors:
        return None
    magnitude = tensors.read_floats(name).astype(np.float32).reshape(-1)
    if len(magnitude) != delta.b.shape[1]:
        outputs = delta.b.shape[1]
        raise UserError(f"{tensors.path_of(name)}: tensor {name!r} has {len(magnitude)} numbers for {outputs} outputs")
    return magnitude


def _matching(patterns: Sequence[tuple[Pattern, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def write_adapter(
    directory: Path, settings: Mapping[str, Any], deltas: Mapping[str, LoraDelta], tokenizer: Tokenizer | None = None
) -> None:
    """Writes the files of an adapter, whole or not at all; ``settings`` are the fields beside ranks and scales."""
    tensors = {}
    for module, delta in deltas.items():
        first, second = next((first, second) for first, (second, linear) in _PAIRS.items() if linear == delta.linear)
        tensors[f"{_PREFIX}{module}{first}"] = np.ascontiguousarray(delta.a.T)
        tensors[f"{_PREFIX}{module}{second}"] = np.ascontiguousarray(delta.b.T)
        if delta.magnitude is not None:
            tensors[f"{_PREFIX}{module}{_MAGNITUDE}"] = np.ascontiguousarray(delta.magnitude)
    ranks = {module: delta.a.shape[1] for module, delta in deltas.items()}
    alphas = {module: delta.scale * ranks[module] for module, delta in deltas.items()}
    rank, alpha = (Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", **settings,
        "use_dora": any(delta.magnitude is not None for delta in deltas.values()),
        "inference_mode": True, "target_modules": sorted(deltas),
        "rank_pattern": {module: each for module, each in ranks.items() if each != rank},
        "alpha_pattern": {module: each for module, each in alphas.items() if each != alpha},
    }
    with replaced_directory(directory) as new:
        (new / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_file(new / _WEIGHTS, tensors)
        if tokenizer is not None:
            tokenizer.save(new)
