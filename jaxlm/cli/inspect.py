"""Shows the configuration of a model, its sizes, and every tensor with its representation.

    jaxlm inspect MODEL
    jaxlm inspect MODEL --html page.html --beside DENSE --data text:some.txt

--html also writes a page with figures, in a single file: the curves of its training; bits, zeros and errors of each
layer's kernels; the sharding of weights on a mesh; and with --text attention and attributions for a text. --beside and
--data compare the model with others by size and quality.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import (
    ProgressBar,
    add_json,
    check_writable,
    format_bytes,
    format_shape,
    print_fields,
    print_table,
    write_json,
    write_text,
)
from jaxlm.core.errors import UserError

if TYPE_CHECKING:
    from jaxlm.core.tree import Leaf
    from jaxlm.model import LM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_json(parser)
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write a page with figures")
    parser.add_argument("--beside", metavar="MODEL", action="append", default=[],
                        help="page: another model to compare with, the dense one first; may be repeated")
    parser.add_argument("--data", metavar="SPEC", help="page: the data on which the models are compared")
    parser.add_argument("--text", default="", help="page: the text for attention and attributions")
    parser.add_argument("--preset", default="fsdp+tp", help="page: the mesh whose sharding is drawn (%(default)s)")
    parser.add_argument("--devices", type=int, default=8, metavar="N", help="page: devices of that mesh (%(default)s)")


def run(args: argparse.Namespace) -> None:
    check_writable(args.json)
    _check_page(args)
    import jax

    import jaxlm
    from jaxlm.compression.platforms import lower_for_platform
    from jaxlm.core.config import to_dict
    from jaxlm.core.tree import count_bytes, count_params, flatten
    from jaxlm.nn.attention.kv_cache import cache_bytes_per_token

    lm = jaxlm.load(args.model, expand=False)
    placed, notes = lower_for_platform(lm.params, jax.default_backend())
    summary = {
        "source": lm.info["source"],
        "parameters": count_params(lm.params),
        "bytes_on_disk": lm.info.get("bytes_on_disk"),
        "bytes_in_memory": count_bytes(placed),
        "bytes_a_cached_token": cache_bytes_per_token(lm.config),
        "recipe": lm.recipe.name if lm.recipe else None,
        "vocabulary": lm.tokenizer.vocab_size if lm.tokenizer else None,
        "generation": lm.generation.to_json(lm.config),
        "notes": [*lm.info["notes"], *notes],
    }
    config = to_dict(lm.config)
    sizes = lm.info.get("tensor_bytes", {})  # a training checkpoint has no sizes of tensors
    tensors = [_row(path, leaf, sizes.get(path)) for path, leaf in flatten(lm.params).items()]
    shown = {
        name: format_bytes(value) if name.startswith("bytes") and value else value for name, value in summary.items()
    }
    print_fields({name: value for name, value in shown.items() if value})
    print()
    default = to_dict(type(lm.config)())
    settings = {name: _differences(value, default[name]) for name, value in config.items()}
    print_fields(settings)
    print()
    print_table([_formatted(row) for row in tensors])
    write_json(args.json, {**summary, "config": config, "tensors": tensors})
    if args.html:
        _write_page(args, lm, {name: value for name, value in shown.items() if value}, settings,
                    [_formatted(row) | {"bytes": row["bytes"]} for row in tensors])
        print(f"\npage: {args.html}")


def _check_page(args: argparse.Namespace) -> None:
    """Checks the options of the page before the work.

    Raises:
        UserError: when options contradict each other or have no meaning.
    """
    from jaxlm.core.sharding import PRESETS

    if args.html is None and (args.beside or args.data or args.text):
        raise UserError("--beside, --data and --text are for the page; add --html FILE")
    if args.data and not args.beside:
        raise UserError("--data compares models; add another one with --beside")
    check_writable(args.html, "--html")
    if args.preset not in PRESETS:
        raise UserError(f"--preset {args.preset}: unknown; choose from {', '.join(PRESETS)}")
    if args.devices < 1:
        raise UserError(f"--devices {args.devices}: give a positive number")


def _write_page(
    args: argparse.Namespace, lm: LM, summary: dict[str, Any], settings: dict[str, Any], tensors: list[dict[str, Any]]
) -> None:
    """Draws the figures and writes the page."""
    import jaxlm
    from jaxlm.evaluation.comparison import compare
    from jaxlm.pictures.html_page import page
    from jaxlm.pictures.model_pictures import album

    name = Path(args.model).resolve().name if not args.model.startswith("hf://") else args.model
    dense = jaxlm.load(args.beside[0], expand=False) if args.beside else None
    compared = ()
    if args.data:
        compared = compare({model: jaxlm.load(model) for model in [*args.beside, args.model]}, args.data,
                           progress=ProgressBar())
    pictures = album(lm, Path(args.model), dense=dense, compared=compared, preset=args.preset, devices=args.devices,
                     text=args.text)
    write_text(args.html, page(name, summary, pictures, settings, tensors))


def _row(path: str, leaf: Leaf, size: int | None) -> dict[str, Any]:
    """The facts of a tensor. ``size`` is its bytes in the file; if None, those in memory count. ``bits`` per weight
    include scales and zero points."""
    import jax
    import numpy as np

    from jaxlm.compression.platforms import describe_leaf
    from jaxlm.core.leaves import dequantize

    size = sum(array.nbytes for array in jax.tree.leaves(leaf)) if size is None else size
    count = int(np.prod(leaf.shape))
    return {
        "tensor": path, "shape": list(leaf.shape), "representation": describe_leaf(leaf),
        "bits": 8 * size / max(count, 1),
        "sparsity": float(np.mean(np.asarray(dequantize(leaf)) == 0)) if count else 0.0, "bytes": size,
    }


def _formatted(row: dict[str, Any]) -> dict[str, Any]:
    return row | {
        "shape": format_shape(row["shape"]), "bits": f"{row['bits']:.2f}", "sparsity": f"{row['sparsity']:.0%}"
    }


def _differences(value: Any, default: Any) -> Any:
    """For a group of settings, those that differ from the default; any other value unchanged."""
    if not isinstance(value, dict):
        return value
    return {name: each for name, each in value.items() if each != default[name]}
