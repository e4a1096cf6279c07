"""jaxlm's own files: the checkpoints of a training run, and compressed weights in safetensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.checkpoint.checksums import array_checksums, first_mismatch
    from jaxlm.checkpoint.storage import PackedWeights, StoredTensor, leaf_bytes, pack_params, unpack_params
    from jaxlm.checkpoint.store import Store
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, checksums="array_checksums first_mismatch",
        storage="PackedWeights StoredTensor leaf_bytes pack_params unpack_params", store="Store",
    )  # fmt: skip
