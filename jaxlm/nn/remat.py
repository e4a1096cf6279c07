"""Rematerialization: which values of a layer the forward pass keeps for the backward pass, by the name of a policy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from jaxlm.core.sharding import HOST_MEMORY
from jaxlm.nn.config import Remat

__all__ = ["LAYER_INPUT", "with_remat"]

LAYER_INPUT = "layer_input"  # the name of a layer's input for ``jax.ad_checkpoint.checkpoint_name``


def with_remat(body: Callable, policy: Remat, *, mapped: bool = False, chosen: bool = False) -> Callable:
    """``body``, which runs a layer, keeping only some values for its backward pass; it computes the others again.

    - ``none`` keeps everything, except the parameters where they are ``chosen``
    - ``full`` keeps the layer's input; ``offload`` keeps it in the memory of the host
    - ``dots`` keeps the layer's input and the results of products with parameters; ``offload_dots`` keeps only these
      results, in the memory of the host

    Args:
        mapped: the layer is mapped over pipeline stages, so that products with parameters have a batch dimension.
        chosen: the parameters are selected inside ``body``.
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


def _one_batch_dimension(policy: Callable, primitive, *operands, **params):
    """A policy for products without batch dimensions, extended to products with one."""
    if primitive.name == "dot_general":
        contracted, (batched, _) = params["dimension_numbers"]
        if len(batched) == 1:
            params["dimension_numbers"] = contracted, ((), ())
    return policy(primitive, *operands, **params)
