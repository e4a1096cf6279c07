"""Arguments that several commands take."""

from __future__ import annotations


def add_model(parser, *, adapter: bool = False) -> None:
    """``MODEL``, and ``--adapter`` where the command works on the model as it computes."""
    parser.add_argument("model", metavar="MODEL", help="a model directory, a training run or hf://org/name")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter of PEFT, to merge into the model")
