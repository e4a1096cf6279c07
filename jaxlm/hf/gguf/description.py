"""What a GGUF file says about a model besides its shape: name, licence, and defaults of sampling."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jaxlm.inference.generation_config import GenerationConfig

__all__ = ["description_metadata"]

_CARD_FIELDS = {"license": "license", "license_name": "license.name", "license_link": "license.link"}
_SNAPSHOT = re.compile(r"models--(?:.+--)?([^/]+)/snapshots/[^/]+$")  # a model in the cache of the Hugging Face hub


def description_metadata(source: str | Path | None, generation: GenerationConfig) -> dict[str, Any]:
    """The key-value pairs of a model.

    Args:
        source: the directory that the model was read from; its README.md may be a model card that names the licence.
        generation: defaults of sampling. llama.cpp samples where a file does not say how.
    """
    out: dict[str, Any] = {"general.name": "jaxlm"}
    if source is not None:
        path = Path(source).resolve()
        found = _SNAPSHOT.search(path.as_posix())
        out["general.name"] = found[1] if found else path.name or "jaxlm"
        out |= {f"general.{key}": value for key, value in _model_card(path / "README.md").items()}
    if generation.do_sample:
        out |= {
            "general.sampling.temp": float(generation.temperature), "general.sampling.top_k": generation.top_k,
            "general.sampling.top_p": float(generation.top_p), "general.sampling.min_p": float(generation.min_p),
        }
    if generation.repetition_penalty != 1.0:
        out["general.sampling.penalty_repeat"] = float(generation.repetition_penalty)
    return out


def _model_card(file: Path) -> dict[str, str]:
    """The licence in the header of a model card: lines ``name: value`` between two lines ``---``."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return {}
    if not lines or lines[0].strip() != "---" or "---" not in lines[1:]:
        return {}
    fields = (line.partition(":") for line in lines[1 : lines.index("---", 1)])
    return {
        _CARD_FIELDS[name]: text for name, _, value in fields
        if name in _CARD_FIELDS and (text := value.strip().strip("\"'"))
    }
