"""What of a layer is kept for the backward pass, by name."""

from __future__ import annotations

from functools import partial

import jax

from jaxlm.core.sharding import HOST_MEMORY

LAYER_INPUT = "layer_input"  # what ``jax.ad_checkpoint.checkpoint_name`` calls the input of a layer


def rematerialised(body, policy: str, *, mapped: bool = False, chosen: bool = False):
    """What of a layer is kept for the backward pass; the rest is computed again.

    - ``none``: everything, save, where they are ``chosen``, the parameters
    - ``full``: its input; ``offload``: that too, in the memory of the host
    - ``dots``: also what matrix products with parameters gave; ``offload_dots``: only those, in the memory of the host

    Layers that are ``mapped`` over stages have products with parameters that differ from stage to stage.
    """
    if policy == "none" and not chosen:
        return body
    policies = jax.checkpoint_policies
    saveable = {
        "none": lambda primitive, *_, **__: primitive.name != "select_n",
        "full": None,
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device", offload_dst=HOST_MEMORY,
        ),
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload_dots": policies.offload_dot_with_no_batch_dims("device", HOST_MEMORY),
    }[policy]
    if mapped and "dots" in policy:
        saveable = partial(_one_batch_dimension, saveable)
    return partial(jax.checkpoint, prevent_cse=False, policy=saveable)(body)


def _one_batch_dimension(policy, primitive, *operands, **params):
    """A policy for products without batch dimensions, extended to those with one."""
    if primitive.name == "dot_general":
        contracted, (batched, _) = params["dimension_numbers"]
        if len(batched) == 1:
            params["dimension_numbers"] = contracted, ((), ())
    return policy(primitive, *operands, **params)
