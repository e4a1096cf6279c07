"""Measures a model on data: loss and perplexity per token, word and byte; for a translation model also BLEU and chrF.

    jaxlm evaluate runs/quickstart/run --data builtin:phrasebook:test

SPEC is text:PATH, jsonl:PATH, chat:PATH, instruct:PATH, tokens:PATH.npy, bitext:SRC,TGT, wmt14:FOLDER/en-de:test,
tfds:NAME/CONFIG:SPLIT or builtin:phrasebook. The default for a training run is the data.test of its experiment.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxlm.cli.arguments import (
    add_first_token,
    add_generation,
    add_kv_cache,
    add_languages,
    add_model,
    add_search,
    add_special_tokens,
    with_generation,
)
from jaxlm.cli.output import ProgressBar, add_json, check_writable, print_fields, write_json
from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import read_sealed_json
from jaxlm.data.config import DataConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, adapter=True)
    add_kv_cache(parser)
    parser.add_argument("--data", metavar="SPEC", help="the data")
    parser.add_argument("--context", type=int, default=0, metavar="N", help="tokens in a window; 0: what fits (0)")
    parser.add_argument("--stride", type=int, default=0, metavar="N",
                        help="tokens between the starts of windows; 0: the context (0)")
    parser.add_argument("--batch-size", type=int, default=0, metavar="N", help="rows at a time; 0: what fits (0)")
    add_special_tokens(parser, prompts=True)
    add_first_token(parser)
    add_languages(parser)
    add_search(parser)
    parser.add_argument("--sentences", type=int, default=0, metavar="N", help="translate only the first N; 0: all (0)")
    parser.add_argument("--no-translations", action="store_true", help="do not translate: no BLEU and chrF")
    parser.add_argument("--speed", action="store_true", help="also measure tokens per second")
    add_json(parser)
    add_generation(parser)


def run(args: argparse.Namespace) -> None:
    check_writable(args.json)
    data = DataConfig(test=args.data) if args.data else _test_data(Path(args.model))
    import jaxlm

    lm = with_generation(jaxlm.load(args.model, adapter=args.adapter, kv_cache=args.kv_cache), args)
    for note in lm.info["notes"]:
        print(f"note: {note}")
    scores = lm.evaluate(
        data.test, context=args.context, stride=args.stride, batch_size=args.batch_size,
        source_language=args.source_language, target_language=args.target_language, beam=args.beam,
        length_penalty=args.length_penalty, max_length=args.max_length, sentences=args.sentences,
        special_tokens=args.special_tokens or data.special_tokens,
        prompt_special_tokens=args.prompt_special_tokens or data.prompt_special_tokens,
        first_token=args.first_token or data.first_token,
        translations=not args.no_translations, speed=args.speed, progress=ProgressBar(),
    )
    print_fields(scores)
    write_json(args.json, scores)


def _test_data(run: Path) -> DataConfig:
    """The data of a training run's experiment.

    Raises:
        UserError: when it has no ``data.test``.
    """
    path = run / "experiment.json"
    if path.is_file():
        from jaxlm.core.config import from_dict
        from jaxlm.training.config import Experiment

        data = from_dict(Experiment, read_sealed_json(path), stored=True).data
        if data.test:
            return data
    raise UserError(f"{run} has no experiment with data.test; give --data SPEC")
