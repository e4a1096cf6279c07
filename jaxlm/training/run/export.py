"""Exports a finished training: as a model directory, an adapter, or both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxlm.core.tree import unflatten
from jaxlm.hf.directory import write_model
from jaxlm.hf.peft.adapters import save_adapter
from jaxlm.model import base_fields
from jaxlm.training.compression_aware import CompressionAwareTraining
from jaxlm.training.setup import Setup

__all__ = ["Exporter"]


class Exporter:
    """Writes the model of a training into its run directory.

    - RUN/model: the model. A training of adapters writes it only with ``lora.merge``.
    - RUN/adapter: of a training of adapters, in the format of PEFT, for the model that the training started from.
    - RUN/compressed: the compressed model that was trained and validated, of a training with ``qat``.
    """

    def __init__(self, setup: Setup, compression: CompressionAwareTraining, run: Path):
        self._setup, self._compression, self._run = setup, compression, run

    def write(self, params: dict[str, Any], steps: list[int], line: Callable[[str], None]) -> Path:
        """Exports flat parameters.

        Args:
            params: the parameters.
            steps: the steps that they are the mean of.
            line: is called with a line for the user about each directory.

        Returns:
            The first directory that was written.
        """
        config = self._setup.config
        info = {"training": {"data": config.data.train, "steps": steps}}
        what = f"({'the mean of steps' if len(steps) > 1 else 'step'} {', '.join(map(str, steps))})"
        paths = []
        if config.lora.rank:
            paths.append(self._adapter(params))
            line(f"adapter: {paths[0]} {what}")
        if not config.lora.rank or config.lora.merge:
            paths.append(self._model(params, info))
            line(f"model: {paths[-1]} {what}")
        recipe = self._compression.recipe
        if self._compression.quantizes:
            compressed = self._write("compressed", self._compression.compressed(params), info | {
                "recipe": recipe.to_json()}, recipe.storage)
            line(f"compressed model, as trained and validated, by {recipe.name}: {compressed}")
        return paths[0]

    def _model(self, params: dict[str, Any], info: dict[str, Any]) -> Path:
        if recipe := self._compression.recipe:
            info = {"training": info["training"] | {"recipe": recipe.name}}
        return self._write("model", self._compression.pruned(params), info)

    def _adapter(self, params: dict[str, Any]) -> Path:
        setup, base = self._setup, self._setup.config.init_from
        return save_adapter(
            self._run / "adapter", setup.config.model, unflatten(setup.like, params), base_fields(base),
            base=base if base.startswith("hf://") else str(Path(base).expanduser().absolute()),
            tokenizer=setup.tokenizer,
        )

    def _write(self, name: str, params: dict[str, Any], info: dict[str, Any], storage: str = "plain") -> Path:
        setup = self._setup
        return write_model(
            self._run / name, setup.config.model, unflatten(setup.like, params), setup.tokenizer, info=info,
            storage=storage,
        )
