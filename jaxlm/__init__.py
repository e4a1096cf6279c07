"""jaxlm: language and translation models in JAX, trained sharded, made smaller, and measured.

    import jaxlm

    lm = jaxlm.load("path/to/model")
    lm.generate(["Once upon a time"], max_new_tokens=64)
    small = jaxlm.compress(lm, "w4a16-rtn+huffman")
    small.save("path/to/smaller")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxlm.checkpoint.generation_config import GenerationConfig
    from jaxlm.core.errors import UserError
    from jaxlm.evaluation.evaluate import evaluate
    from jaxlm.inference.generate import generate
    from jaxlm.inference.translate import translate
    from jaxlm.model import LM, compress, load
    from jaxlm.serving.server import serve
    from jaxlm.training.loop import train

# Imported at first use, so that the command line answers before JAX is there.
_HOMES = {
    "GenerationConfig": "jaxlm.checkpoint.generation_config", "LM": "jaxlm.model", "UserError": "jaxlm.core.errors",
    "compress": "jaxlm.model",
    "evaluate": "jaxlm.evaluation.evaluate", "generate": "jaxlm.inference.generate", "load": "jaxlm.model",
    "serve": "jaxlm.serving.server", "train": "jaxlm.training.loop", "translate": "jaxlm.inference.translate",
}
__all__ = [
    "GenerationConfig", "LM", "UserError", "compress", "evaluate", "generate", "load", "serve", "train", "translate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
