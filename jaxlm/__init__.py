"""jaxlm: language and translation models in JAX, trained sharded, made smaller, and measured.

    import jaxlm

    lm = jaxlm.load("path/to/model")
    lm.generate(["Once upon a time"], max_new_tokens=64)
    small = jaxlm.compress(lm, "w4a16-rtn+huffman")
    small.save("path/to/smaller")
"""

from __future__ import annotations

from jaxlm.core.lazy import lazy

TYPE_CHECKING = False  # as type checkers know it; typing itself would be half the time of this import

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxlm.compress import compress
    from jaxlm.core.errors import UserError
    from jaxlm.evaluation.scoring import evaluate
    from jaxlm.inference.generation import generate
    from jaxlm.inference.generation_config import GenerationConfig
    from jaxlm.inference.translation import translate
    from jaxlm.model import LM, load
    from jaxlm.serving.server import serve
    from jaxlm.training.loop import train
else:  # at first use, so that the command line answers before JAX is there
    __getattr__, __dir__, __all__ = lazy(
        __name__, compress="compress", core__errors="UserError", evaluation__scoring="evaluate",
        inference__generation="generate", inference__generation_config="GenerationConfig",
        inference__translation="translate", model="LM load", serving__server="serve", training__loop="train",
    )
