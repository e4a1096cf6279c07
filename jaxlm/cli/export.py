"""Writes a model as one of a Hugging Face family, which transformers loads.

Compressed weights are written as what they stand for. Without --format it is the plainest family that can be the model:
llama, gpt2, m2m_100 or marian, then any other.
"""

from __future__ import annotations

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import size


def add_arguments(parser) -> None:
    add_model(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the model directory to write")
    parser.add_argument("--format", metavar="NAME", help="the family: a model_type of transformers, such as llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights")


def run(args) -> None:
    import jaxlm
    from jaxlm.checkpoint.directory import read_json, weight_bytes

    out = jaxlm.load(args.model, expand=False).export(args.out, format=args.format, dtype=args.dtype)
    kind = read_json(out / "config.json")["model_type"]
    print(f"{out}: {kind}, {size(weight_bytes(out))} of weights in {args.dtype}")
