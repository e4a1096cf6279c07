"""Formats of other projects: Hugging Face model directories, quantized layouts, GGUF, and adapters of PEFT.

    from jaxlm.hf import read_model, export_model

    config, params, tokenizer, info = read_model("path/to/qwen3")
    export_model("path/to/copy", config, params, tokenizer, dtype="bfloat16")

``jaxlm.load``, ``LM.save`` and ``LM.export`` do the same for a whole ``LM``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.hf.config import from_hf_config
    from jaxlm.hf.directory import (
        export_model,
        model_bytes,
        read_generation,
        read_model,
        read_model_config,
        read_tokenizer,
        weight_bytes,
        write_model,
    )
    from jaxlm.hf.families.registry import FAMILIES
    from jaxlm.hf.gguf.export import export_gguf
    from jaxlm.hf.hub import local_path
    from jaxlm.hf.peft.adapters import Adapter, LoraDelta, apply_adapter, read_adapter, save_adapter
    from jaxlm.hf.quantized.layouts import LAYOUTS, open_weights
    from jaxlm.hf.tensor_files import TensorFiles, write_tensors
    from jaxlm.hf.writer import to_hf_config
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        config="from_hf_config",
        directory="export_model model_bytes read_generation read_model read_model_config read_tokenizer weight_bytes "
        "write_model",
        families__registry="FAMILIES",
        gguf__export="export_gguf",
        hub="local_path",
        peft__adapters="Adapter LoraDelta apply_adapter read_adapter save_adapter",
        quantized__layouts="LAYOUTS open_weights",
        tensor_files="TensorFiles write_tensors",
        writer="to_hf_config",
    )
