"""Which parameters of a Transformer write the residual stream, which read it, and which norms stand between.

What changes the basis or the width of the stream (``quantize.rotate``, ``prune.width``) knows parameters by these roles
alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlm.core.errors import UserError
from jaxlm.core.leaves import is_leaf
from jaxlm.core.tree import Params, flatten, path_str
from jaxlm.nn.config import LSTMConfig, ModelConfig, Seq2SeqConfig, StackConfig

Role = Literal["table", "writer", "reader", "norm", "other"]
Leaves = dict[str, jax.Array]

_ROLES: tuple[tuple[Role, re.Pattern], ...] = tuple(
    (role, re.compile(pattern)) for role, pattern in (
        ("table", r"(src_)?embed/table|(en|de)coder/pos/table"),
        ("writer", r".*/(o|down)/(kernel|bias)"),  # the stream is its last axis
        ("reader", r".*/(q|k|v|gate|up|router|shared_gate)/kernel|head/kernel"),  # the stream is its last axis but one
        ("norm", r".*/((attn|cross|mlp)(_out)?|final|embed)_norm/(scale|bias)"),
    )
)


def role(path: str) -> Role:
    """The role of a parameter towards the residual stream; "other" if it has none."""
    return next((name for name, pattern in _ROLES if pattern.fullmatch(path)), "other")


def normed_inputs(config: StackConfig) -> bool:
    """Whether layers read the stream through a norm."""
    return config.parallel or config.norm_position in ("pre", "sandwich")


def input_norm(config: StackConfig, path: str) -> str | None:
    """The path of the norm whose output the kernel at ``path`` reads; None where it reads the stream itself."""
    if path == "head/kernel" or re.search(r"/cross/[kv]/kernel$", path):
        side = "decoder" if path == "head/kernel" else "encoder"
        return None if config.norm_position == "post" else f"{side}/final_norm"
    layer, part = re.match(r"(.*/layers/\d+)/(attn|cross|mlp)/", path).groups()
    part = "attn" if part == "mlp" and config.parallel and config.shared_norm else part
    return f"{layer}/{part}_norm" if normed_inputs(config) else None


def bias_path(path: str) -> str:
    """The path of the bias that belongs to a kernel, whether or not the model has it."""
    return "logits_bias" if path == "head/kernel" else path.replace("/kernel", "/bias")


def writes_stream(config: StackConfig, norm: str) -> bool:
    """Whether the output of a norm is added to the stream or becomes it, rather than being read by kernels."""
    if norm.endswith(("/embed_norm", "_out_norm")):
        return True
    return not norm.endswith("/final_norm") and not normed_inputs(config)


def dense_leaves(config: ModelConfig, params: Params, what: str) -> Leaves:
    """The leaves by path.

    Raises:
        UserError: when the model is no Transformer, or a weight is compressed; ``what`` is the operation that it names.
    """
    if isinstance(config, LSTMConfig):
        raise UserError(f"{what} is for Transformers; this is a recurrent model")
    leaves = flatten(params)
    if coded := next((path for path, leaf in leaves.items() if is_leaf(leaf)), None):
        raise UserError(f"{what} comes before other compression: {coded} is not dense")
    return leaves


def replace_leaves(params: Params, leaves: Leaves, axes: Mapping[str, tuple[str, ...]] | None = None) -> Params:
    """The tree of exactly these leaves. Leaves at paths of ``params`` keep its metadata, such as logical axes; ``axes``
    has the logical axes of the others."""
    known = {path_str(path): variable for path, variable in nnx.to_flat_state(params)}

    def variable(path, leaf):
        return known[path].replace(leaf) if path in known else nnx.Param(leaf, axes=axes[path])

    def parts(path):
        return tuple(int(part) if part.isdigit() else part for part in path.split("/"))

    return nnx.from_flat_state((parts(path), variable(path, leaf)) for path, leaf in leaves.items())


def learned_positions(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model with sinusoidal positions replaced by a learned table of the same values; other models as they are.

    A change of basis or width would make other functions of the sinusoids. The table ends at ``max_positions``.
    """
    if config.positions not in ("sinusoidal", "sinusoidal_t2t"):
        return config, params
    half = config.width // 2
    steps = half - 1 if config.positions == "sinusoidal_t2t" else half  # see ``nn.positions.sinusoids``
    frequencies = 10000.0 ** -(np.arange(half) / max(steps, 1))
    rows = np.arange(config.max_positions + config.position_offset)
    table = np.concatenate([f(rows[:, None] * frequencies) for f in (np.sin, np.cos)], -1)
    sides = ("encoder", "decoder") if isinstance(config, Seq2SeqConfig) else ("decoder",)
    new = {f"{side}/pos/table": jnp.asarray(table, jnp.float32) for side in sides}
    params = replace_leaves(params, flatten(params) | new, dict.fromkeys(new, ("positions", "embed")))
    return dataclasses.replace(config, positions="learned"), params


def learned_scales(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """The model with a scale of ones in norms that have none, for what folds something into scales; other models as
    they are.

    Raises:
        UserError: when the norms without scales are elsewhere than before attention, MLP and head.
    """
    if config.norm_scale:
        return config, params
    if config.norm_position != "pre" or config.qk_norm != "none" or config.embed_norm or len(config.sides) > 1:
        raise UserError("only in decoders with norm_position 'pre' and no others can norms get scales (norm_scale)")
    leaves = flatten(params)
    ones = {"decoder/final_norm/scale": jnp.ones(config.width)}
    for path, kernel in leaves.items():
        if role(path) == "reader" and "/layers/" in path:
            ones[f"{input_norm(config, path)}/scale"] = jnp.ones((len(kernel), config.width))
    axes = {path: ("layers", "norm")[-each.ndim :] for path, each in ones.items()}
    config = dataclasses.replace(config, norm_scale=True, norm_bias=False)
    return config, replace_leaves(params, leaves | ones, axes)


def multiply_rows(row: jax.Array, kernel: jax.Array) -> jax.Array:
    """Rows ``[..., D]`` times kernels ``[..., D, O]``, one row a kernel or one row for all: ``[..., O]``, float32."""
    row, kernel = row.astype(jnp.float32), kernel.astype(jnp.float32)
    return jnp.einsum("...d,...do->...o", row, kernel, precision=jax.lax.Precision.HIGHEST)
