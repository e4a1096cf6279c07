"""Shows what is in a model: its configuration, its sizes, and every tensor with its representation."""

from __future__ import annotations

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import add_json, check_json, print_fields, print_table, shape_str, size, write_json


def add_arguments(parser) -> None:
    add_model(parser)
    add_json(parser)


def run(args) -> None:
    check_json(args.json)
    import jax

    import jaxlm
    from jaxlm.compression.placement import place
    from jaxlm.core.config import to_dict
    from jaxlm.core.tree import count_bytes, count_params, flatten
    from jaxlm.nn.cache import bytes_a_token

    lm = jaxlm.load(args.model, expand=False)
    placed, notes = place(lm.params, jax.default_backend())
    summary = {
        "source": lm.info["source"],
        "parameters": count_params(lm.params),
        "bytes_on_disk": lm.info.get("bytes_on_disk"),
        "bytes_in_memory": count_bytes(placed),
        "bytes_a_cached_token": bytes_a_token(lm.config),
        "recipe": lm.recipe.name if lm.recipe else None,
        "vocabulary": lm.tokenizer.vocab_size if lm.tokenizer else None,
        "generation": lm.generation.to_json(lm.config),
        "notes": [*lm.info["notes"], *notes],
    }
    config = to_dict(lm.config)
    sizes = lm.info.get("tensor_bytes", {})  # a checkpoint in training has none
    tensors = [_row(path, leaf, sizes.get(path)) for path, leaf in flatten(lm.params).items()]
    shown = {name: size(value) if name.startswith("bytes") and value else value for name, value in summary.items()}
    print_fields({name: value for name, value in shown.items() if value})
    print()
    usual = to_dict(type(lm.config)())
    print_fields({name: _differences(value, usual[name]) for name, value in config.items()})
    print()
    print_table([_shown(row) for row in tensors])
    write_json(args.json, {**summary, "config": config, "tensors": tensors})


def _row(path, leaf, size) -> dict:
    """A tensor. ``bytes`` are those of the file, or of memory where the file does not tell; ``bits`` a weight count all
    of them, scales and zeros too."""
    import jax
    import numpy as np

    from jaxlm.compression.placement import describe
    from jaxlm.core.leaves import dequantize

    size = sum(array.nbytes for array in jax.tree.leaves(leaf)) if size is None else size
    count = int(np.prod(leaf.shape))
    return {
        "tensor": path, "shape": list(leaf.shape), "representation": describe(leaf), "bits": 8 * size / max(count, 1),
        "sparsity": float(np.mean(np.asarray(dequantize(leaf)) == 0)) if count else 0.0, "bytes": size,
    }


def _shown(row) -> dict:
    return row | {
        "shape": shape_str(row["shape"]), "bits": f"{row['bits']:.2f}", "sparsity": f"{row['sparsity']:.0%}"
    }


def _differences(value, usual):
    """Of a group of settings, those that are not as usual; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return {name: each for name, each in value.items() if each != usual[name]}
