"""Translates lines, from standard input to standard output unless files are given. A blank line stays blank.

    echo "Where is the station?" | jaxlm translate runs/quickstart/run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jaxlm.cli.arguments import add_generation, add_kv_cache, add_languages, add_model, add_search, with_generation
from jaxlm.cli.output import ProgressBar, print_notes, write_text
from jaxlm.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser, adapter=True)
    add_kv_cache(parser)
    parser.add_argument("--input", metavar="FILE", type=Path,
                        help="a UTF-8 file, one sentence per line (standard input)")
    parser.add_argument("--output", metavar="FILE", type=Path, help="the file to write (standard output)")
    add_languages(parser)
    add_search(parser)
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sentences at a time (64)")
    add_generation(parser)


def run(args: argparse.Namespace) -> None:
    import jaxlm

    if args.input and not args.input.is_file():
        raise UserError(f"{args.input} does not exist; give a text file with one sentence per line")
    if args.output and not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: its directory does not exist")
    lm = with_generation(jaxlm.load(args.model, adapter=args.adapter, kv_cache=args.kv_cache), args)
    print_notes(lm)
    options = dict(
        source_language=args.source_language, target_language=args.target_language, beam=args.beam,
        length_penalty=args.length_penalty, max_length=args.max_length, batch_size=args.batch_size,
    )
    if args.input is None and args.output is None and sys.stdin.isatty():
        for line in sys.stdin:  # on a terminal each line is translated at once
            print(*lm.translate([line.rstrip("\n")], **options), flush=True)
        return
    lines = _lines(sys.stdin.buffer.read() if args.input is None else args.input.read_bytes(), args.input)
    progress = ProgressBar()
    out = lm.translate(lines, **options, progress=lambda done: progress("translating", done, len(lines)))
    text = "".join(f"{' '.join(line.split())}\n" for line in out)
    if args.output is None:
        sys.stdout.write(text)
    else:
        write_text(args.output, text)


def _lines(data: bytes, path: Path | None) -> list[str]:
    """The lines of a text, split at newlines only.

    Raises:
        UserError: when a line is not UTF-8; the message has its number.
    """
    lines = data.split(b"\n")
    try:
        return [line.decode("utf-8").rstrip("\r") for line in (lines[:-1] if lines[-1] == b"" else lines)]
    except UnicodeDecodeError as error:
        number = 1 + next(i for i, line in enumerate(lines) if line == error.object)
        raise UserError(f"{path or 'standard input'} line {number} is not UTF-8") from None
