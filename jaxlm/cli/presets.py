"""Lists the named shapes of models and of meshes.

    jaxlm presets

In a configuration a model is `nn.preset("124m")`, or `nn.preset("tiny", dropout=0.1)` with a changed field; a mesh is
chosen by `--mesh.preset fsdp+tp` and shown here for 64 devices. "weights" counts those of the layers, without
embeddings.
"""

from __future__ import annotations

import argparse

from jaxlm.cli.output import print_table

MODELS = {
    "tiny": "a translation model for small corpora and a CPU",
    "base": "the base Transformer of arXiv:1706.03762, for translation",
    "big": "the big Transformer of the same paper",
    "nano": "a character-level language model for first experiments",
    "124m": "the smallest GPT-2",
    "1b": "a Llama of a billion weights",
    "7b": "Llama 2 7B",
    "70b": "Llama 2 70B",
    "8x7b": "Mixtral 8x7B, with 8 experts a layer",
}
MESHES = {
    "ddp": "every device holds the whole model",
    "fsdp": "weights are split over all devices, and gathered one kernel at a time",
    "fsdp+tp": "tensor parallelism over neighbouring devices, fsdp over the rest",
    "3d": "tensor parallelism, pipeline stages, and replicas",
    "moe": "expert parallelism over neighbouring devices, fsdp over the rest",
}
_DEVICES = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """This command has no arguments."""


def run(args: argparse.Namespace) -> None:
    import math

    from jaxlm import nn
    from jaxlm.core.sharding import abstract_mesh, describe_mesh
    from jaxlm.core.tree import flatten

    def row(name: str, meaning: str) -> dict[str, object]:
        config = nn.preset(name)
        leaves = flatten(nn.abstract(nn.preset(name, vocab_size=config.vocab_size or 1))[1])
        weights = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if "layers/" in path)
        layers = " + ".join(str(config.side_layers(side)) for side in config.sides) or config.layers
        return {"model": name, "kind": config.kind, "width": config.width, "layers": str(layers),
                "weights": f"{weights / 1e6:,.1f} M", "description": meaning}

    print_table([row(*each) for each in MODELS.items()])
    print()
    print_table([{"mesh": name, f"{_DEVICES} devices": describe_mesh(abstract_mesh(name, {}, _DEVICES).shape),
                  "description": meaning} for name, meaning in MESHES.items()])
