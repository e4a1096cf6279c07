"""Arguments that several commands take."""

from __future__ import annotations


def add_model(parser, *, adapter: bool = False) -> None:
    """``MODEL``, and ``--adapter`` where the command works on the model as it computes."""
    parser.add_argument("model", metavar="MODEL", help="a model directory, a training run or hf://org/name")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of PEFT, to merge into the model")


def add_kv_cache(parser) -> None:
    """``--kv-cache``."""
    parser.add_argument(
        "--kv-cache", choices=("full", "int8", "int4", "fp8"),
        help="how decoding keeps keys and values, and scoring rounds them alike (as the model was saved)",
    )
