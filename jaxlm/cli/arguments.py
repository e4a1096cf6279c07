"""Arguments that several commands take."""

from __future__ import annotations

from typing import Any

from jaxlm.core.errors import UserError


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


def add_languages(parser) -> None:
    """Of models that translate between many languages."""
    for name, side in (("source", "translate from"), ("target", "translate into")):
        parser.add_argument(
            f"--{name}-language", metavar="CODE", help=f"{side}, for a model with many, as it spells them (deu_Latn)"
        )


def add_search(parser) -> None:
    """How a command translates."""
    parser.add_argument("--beam", type=int, metavar="N", help="1 is greedy (as the model says, or 5)")
    parser.add_argument(
        "--length-penalty", type=float, metavar="X", help="exponent of the length (as the model says, or 1)"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N",
        help="tokens of a translation (as the model says, or 128; at most 2 x source + 10)",
    )


GENERATION = "generation."  # what begins the names of its settings


def add_generation(parser) -> None:
    """Leave to set anything of generation_config.json, or to pass it by."""
    parser.epilog = (
        "What is not given is as generation_config.json has it. Any setting of that file can be given by its name, as\n"
        "in --generation.repetition_penalty 1.2"
    )
    parser.add_argument("--ignore-generation-config", action="store_true", help="as if the model had no such file")
    parser.set_defaults(overrides=GENERATION)


def with_generation(lm, args) -> Any:
    """The model with the settings that ``add_generation`` took. UserError on what is none."""
    from jaxlm.inference.generation_config import GenerationConfig

    changes = parse_overrides(args.overrides)
    generation = GenerationConfig() if args.ignore_generation_config else lm.generation
    return lm.replace(
        generation=generation.override({name.removeprefix(GENERATION): value for name, value in changes.items()})
    )


def parse_overrides(words: list[str]) -> dict[str, str]:
    """``["--a.b", "1", "--c.d=2"]`` as ``{"a.b": "1", "c.d": "2"}``; UserError on anything else."""
    changes = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; settings are written --a.b VALUE")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = next(rest, None)
        if value is None:
            raise UserError(f"{word} has no value; write {word} VALUE")
        changes[key] = value
    return changes


def load_experiment(path: str, overrides: list[str]) -> Any:
    """The Experiment that a Python file defines, with fields set by ``--a.b VALUE``. UserError where it is none."""
    from jaxlm.core.config import load_config, override
    from jaxlm.training.config import Experiment

    config = load_config(path)
    if not isinstance(config, Experiment):
        raise UserError(f"{path}: config is a {type(config).__name__}; it must be a jaxlm Experiment")
    changes = parse_overrides(overrides)
    of_model = {key: changes.pop(key) for key in list(changes) if key.startswith("model.")}
    config = override(config, changes)
    if of_model:  # the model that they change may be that of init_from
        from jaxlm.training.setup import with_model

        config = override(with_model(config), of_model)
    return config
