"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jaxlm.core.errors import UserError

if TYPE_CHECKING:
    from jaxlm.model import LM
    from jaxlm.training.config import Experiment


def add_model(parser: argparse.ArgumentParser, *, adapter: bool = False) -> None:
    """``MODEL``, and with ``adapter`` also ``--adapter``."""
    parser.add_argument("model", metavar="MODEL", help="a model directory, a training run or hf://org/name")
    if adapter:
        parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter in PEFT's format, merged into the model")


def add_kv_cache(parser: argparse.ArgumentParser) -> None:
    """``--kv-cache``."""
    parser.add_argument(
        "--kv-cache", choices=("full", "int8", "int4", "fp8"),
        help="the format of cached keys and values; scoring rounds them in the same way (default: as saved)",
    )


def add_languages(parser: argparse.ArgumentParser) -> None:
    """``--source-language`` and ``--target-language``."""
    for side in ("source", "target"):
        parser.add_argument(
            f"--{side}-language", metavar="CODE", help=f"the {side} language of a multilingual model, as deu_Latn"
        )


def add_special_tokens(parser: argparse.ArgumentParser, *, prompts: bool = False) -> None:
    """``--special-tokens``, and with ``prompts`` also ``--prompt-special-tokens``."""
    kinds = {"": "documents", "prompt-": "prompts and completions that are texts, as in instruct:"}
    for prefix, texts in kinds.items():
        if prompts or not prefix:
            parser.add_argument(
                f"--{prefix}special-tokens", choices=("text", "parse"),
                help=f"what special tokens are that {texts} spell: characters, or parsed as special tokens (text)",
            )


def add_first_token(parser: argparse.ArgumentParser) -> None:
    """``--first-token``."""
    parser.add_argument(
        "--first-token", choices=("auto", "never"),
        help="begin each document and each window with what the tokenizer puts before a text, such as <bos> (auto)",
    )


def add_search(parser: argparse.ArgumentParser) -> None:
    """The options of beam search for translations."""
    parser.add_argument("--beam", type=int, metavar="N",
                        help="width of the beam; 1 is greedy (default: the model's, or 5)")
    parser.add_argument(
        "--length-penalty", type=float, metavar="X", help="exponent of the length (default: the model's, or 1)"
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N",
        help="most tokens of a translation (default: the model's, or 2 x source + 10 and no more than 128)",
    )


GENERATION = "generation."  # the prefix of options that set fields of generation_config.json


def add_generation(parser: argparse.ArgumentParser) -> None:
    """``--generation.FIELD VALUE`` for every field of generation_config.json, and ``--ignore-generation-config``."""
    parser.epilog = (
        "Defaults are those of the model's generation_config.json. Every field of that file is an option too, as in\n"
        "--generation.repetition_penalty 1.2"
    )
    parser.add_argument(
        "--ignore-generation-config", action="store_true", help="do not read the model's generation_config.json"
    )
    parser.set_defaults(overrides=GENERATION)


def with_generation(lm: LM, args: argparse.Namespace) -> LM:
    """The model with the generation settings of the command line.

    Raises:
        UserError: when a setting does not exist or its value is not valid.
    """
    from jaxlm.inference.generation_config import GenerationConfig

    changes = parse_overrides(args.overrides)
    generation = GenerationConfig() if args.ignore_generation_config else lm.generation
    return lm.replace(
        generation=generation.override({name.removeprefix(GENERATION): value for name, value in changes.items()})
    )


def parse_overrides(words: list[str]) -> dict[str, str]:
    """``["--a.b", "1", "--c.d=2"]`` as ``{"a.b": "1", "c.d": "2"}``.

    Raises:
        UserError: when a word is not an option, or an option has no value.
    """
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


def load_experiment(path: str, overrides: list[str]) -> Experiment:
    """The ``config`` that a Python file defines, with fields replaced by ``--a.b VALUE``.

    Raises:
        UserError: when the file does not define an Experiment, or a field does not exist.
    """
    from jaxlm.core.config import load_config, override
    from jaxlm.training.config import Experiment

    config = load_config(path)
    if not isinstance(config, Experiment):
        raise UserError(f"{path}: config is of type {type(config).__name__}; it must be a jaxlm Experiment")
    changes = parse_overrides(overrides)
    of_model = {key: changes.pop(key) for key in list(changes) if key.startswith("model.")}
    config = override(config, changes)
    if of_model:  # they may change the model that init_from names
        from jaxlm.training.setup import with_model

        config = override(with_model(config), of_model)
    return config
