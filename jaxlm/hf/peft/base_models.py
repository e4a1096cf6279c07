"""Models and their adapters: where the base weights of an adapter are, and a model with adapters applied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxlm.core.tree import Params
from jaxlm.core.untrusted import read_json
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import read_tokenizer
from jaxlm.hf.hub import local_path
from jaxlm.hf.peft.adapters import ADAPTER_CONFIG, Adapter, apply_adapter, read_adapter
from jaxlm.nn.config import ModelConfig

__all__ = ["apply_adapters", "weights_of"]


def weights_of(path: str | Path) -> tuple[Path, list[Adapter]]:
    """Where the weights of a model are, and the adapter on them if ``path`` is one: a directory of PEFT, or a training
    run whose adapters are not merged.

    Raises:
        UserError: the adapter is damaged, or a model cannot be downloaded.
    """
    path = local_path(path)
    if (path / "adapter" / ADAPTER_CONFIG).is_file() and not (path / "model").exists():
        path = path / "adapter"
    if not (path / ADAPTER_CONFIG).is_file() or (path / "config.json").is_file():
        return path, []
    adapter = read_adapter(path)
    return local_path(adapter.base_model), [adapter]


def apply_adapters(
    path: Path, adapters: Sequence[Adapter], config: ModelConfig, params: Params, tokenizer: Tokenizer | None
) -> tuple[ModelConfig, Params, Tokenizer | None]:
    """The model at ``path`` with its adapters kept apart, and the tokenizer of the last adapter that has one.

    Raises:
        UserError: an adapter belongs to another model; the message names the tensor.
    """
    fields = read_json(path / "config.json") if (path / "config.json").is_file() else None
    for adapter in adapters:
        config, params = apply_adapter(adapter, config, params, fields)
        tokenizer = read_tokenizer(adapter.file.parent, config) or tokenizer
    return config, params, tokenizer
