"""The core: parameters as a tree, leaves in other representations, products with them, sharding, and configuration.

It stands on JAX, Flax and NumPy alone; every other package may import it.
"""

from __future__ import annotations

from jaxlm.core.lazy import lazy

TYPE_CHECKING = False  # typing is left out of what every start of the command line imports
if TYPE_CHECKING:
    from jaxlm.core.config import from_dict, load_config, override, to_dict
    from jaxlm.core.errors import UserError
    from jaxlm.core.leaves import (
        Codebook,
        FakeQuant,
        LoRA,
        LowRank,
        Observer,
        QArray,
        dequantize,
        dequantize_tree,
        is_leaf,
        merge_adapters,
    )
    from jaxlm.core.ops import dot, dot_t, ragged_dot, take
    from jaxlm.core.sharding import constrain, make_mesh, override_sharding, shardings
    from jaxlm.core.tree import (
        Leaf,
        Params,
        Transform,
        compose,
        count_bytes,
        count_params,
        flatten,
        map_params,
        rule,
        unflatten,
    )
else:  # imported at first use, so that the command line answers before JAX is imported
    __getattr__, __dir__, __all__ = lazy(
        __name__,
        config="from_dict load_config override to_dict", errors="UserError",
        leaves="Codebook FakeQuant LoRA LowRank Observer QArray dequantize dequantize_tree is_leaf merge_adapters",
        ops="dot dot_t ragged_dot take", sharding="constrain make_mesh override_sharding shardings",
        tree="Leaf Params Transform compose count_bytes count_params flatten map_params rule unflatten",
    )
