"""Safetensors files, one or many, read and written with complaints that name the file and the tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxlm.core.errors import UserError

__all__ = ["FILE", "TensorFiles", "write_tensors"]

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a model directory: those of model.safetensors, or of the files that its index names.

    Opening reads headers only, and the library checks them against the size of the file; nothing is allocated for a
    tensor before it is read. UserError where a file is missing or damaged.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        files = [FILE] if (directory / FILE).is_file() else self._indexed()
        self._files: dict[str, Path] = {}
        self._open = {}
        for name in files:
            path = directory / name
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise UserError(f"{path} is missing; copy the model directory again") from None
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged ({error}); copy or save it again") from None
            self._files |= dict.fromkeys(self._open[path].keys(), path)

    def _indexed(self) -> list[str]:
        path = self.directory / INDEX
        if not path.is_file():
            raise UserError(f"{self.directory} has no {FILE}; name a model directory with its weights as safetensors")
        try:
            return sorted(set(json.loads(path.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"{path} is not an index of safetensors files; copy the model directory again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name)

    @property
    def metadata(self) -> dict[str, str]:
        """What the files say about themselves."""
        return {key: text for file in self._open.values() for key, text in (file.metadata() or {}).items()}

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(path.stat().st_size for path in self._open)

    def file(self, name: str) -> Path:
        """Where a tensor is. UserError if it is nowhere."""
        if name not in self._files:
            where = next(iter(self._open)) if len(self._open) == 1 else self.directory
            raise UserError(f"{where} has no tensor {name!r}; it belongs to another model, or was saved incompletely")
        return self._files[name]

    def read(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """A tensor, in the type it is stored in. UserError unless it has this ``shape``, where one is given."""
        path = self.file(name)
        found = tuple(self._open[path].get_slice(name).get_shape())
        if shape is not None and found != tuple(shape):
            raise UserError(f"{path}: tensor {name!r} is {list(found)}, by config.json it should be {list(shape)}")
        try:
            return self._open[path].get_tensor(name)
        except (SafetensorError, TypeError, AttributeError) as error:  # a type that numpy does not have
            raise UserError(f"{path}: tensor {name!r} cannot be read ({error})") from None


def write_tensors(directory: Path, tensors: Mapping[str, np.ndarray], note: str) -> None:
    """Writes model.safetensors, with a note in its metadata under "jaxlm". The same arguments give the same bytes: more
    metadata than one entry would be written in any order."""
    contiguous = {name: np.require(tensor, requirements="C") for name, tensor in tensors.items()}
    save_file(contiguous, directory / FILE, metadata={"jaxlm": note})
