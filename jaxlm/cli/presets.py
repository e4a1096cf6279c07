"""Lists the shapes of models and of meshes that have names.

    jaxlm presets

In a configuration a model is `nn.preset("124m")`, with fields changed as in `nn.preset("tiny", dropout=0.1)`; a mesh is
chosen by `--mesh.preset fsdp+tp`, here for 64 devices. "weights" are those of the layers, without embeddings.
"""

from __future__ import annotations

from jaxlm.cli.output import print_table

MODELS = {
    "tiny": "translation, for small corpora and a CPU",
    "base": "the base Transformer of 2017, for translation",
    "big": "the big one",
    "nano": "characters, for a first look",
    "124m": "the smallest GPT-2",
    "1b": "a Llama of a billion weights",
    "7b": "Llama 2 7B",
    "70b": "Llama 2 70B",
    "8x7b": "Mixtral, of 8 experts a layer",
}
MESHES = {
    "ddp": "every device holds the whole model",
    "fsdp": "weights are split, and gathered a kernel at a time",
    "fsdp+tp": "layers are split over neighbours, the rest as fsdp",
    "3d": "layers are split, and in stages of a pipeline, and there are replicas",
    "moe": "experts are split over neighbours, the rest as fsdp",
}
_DEVICES = 64


def add_arguments(parser) -> None:
    """It takes none."""


def run(args) -> None:
    import math

    from jaxlm import nn
    from jaxlm.core.sharding import abstract_mesh, describe_mesh
    from jaxlm.core.tree import flatten

    def row(name: str, meaning: str) -> dict[str, object]:
        config = nn.preset(name)
        leaves = flatten(nn.abstract(nn.preset(name, vocab_size=config.vocab_size or 1))[1])
        weights = sum(math.prod(leaf.shape) for path, leaf in leaves.items() if "layers/" in path)
        layers = getattr(config, "layers", 0) or f"{config.encoder_layers} + {config.decoder_layers}"
        return {"model": name, "kind": config.kind, "width": config.width, "layers": str(layers),
                "weights": f"{weights / 1e6:,.1f} M", "what it is": meaning}

    print_table([row(*each) for each in MODELS.items()])
    print()
    print_table([{"mesh": name, f"{_DEVICES} devices": describe_mesh(abstract_mesh(name, {}, _DEVICES).shape),
                  "what it does": meaning} for name, meaning in MESHES.items()])
