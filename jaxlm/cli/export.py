"""Writes a model in the format of another library.

    jaxlm export runs/quickstart/run --out exported

Without --format the model is written as the simplest family of transformers that can represent it: llama, gpt2, m2m_100
or marian, then any other; compressed weights are written as dense ones. --format compressed-tensors keeps them
compressed, for transformers and vLLM. --format gguf-f16, gguf-q8_0, gguf-q4_0 or gguf-q4_k writes a file for llama.cpp.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import format_bytes

if TYPE_CHECKING:
    from jaxlm.model import LM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the model directory, or FILE.gguf, to write")
    parser.add_argument("--format", metavar="NAME",
                        help="compressed-tensors, gguf-..., or a model_type of transformers, as llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of dense "
                        "weights (%(default)s)")


def run(args: argparse.Namespace) -> None:
    import jaxlm
    from jaxlm.hf.gguf.export import GGUF_PREFIX

    lm = jaxlm.load(args.model, expand=False)
    if args.format and args.format.startswith(GGUF_PREFIX):
        _gguf(args, lm)
    else:
        _directory(args, lm)


def _gguf(args: argparse.Namespace, lm: LM) -> None:
    from jaxlm.hf.gguf.export import GGUF_PREFIX, export_gguf

    kind, source = args.format.removeprefix(GGUF_PREFIX), lm.info.get("source")
    file, types = export_gguf(
        args.out, lm.config, lm.params, lm.tokenizer, kind, generation=lm.generation, source=source
    )
    found = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
    print(f"{file}: {format_bytes(file.stat().st_size)}; matrices: {found}")


def _directory(args: argparse.Namespace, lm: LM) -> None:
    from jaxlm.core.untrusted import read_json
    from jaxlm.hf.directory import weight_bytes

    out = lm.export(args.out, format=args.format, dtype=args.dtype)
    fields = read_json(out / "config.json")
    layout = fields.get("quantization_config", {})
    how = (layout.get("format") or layout["sparsity_config"]["format"]) if layout else args.dtype
    print(f"{out}: {fields['model_type']}, {format_bytes(weight_bytes(out))} of weights, {how}")
    groups = layout.get("config_groups", {}).values()
    if len(groups) > 1 and not all(group["weights"]["symmetric"] for group in groups):
        print("note: vLLM and jaxlm read this model; transformers 5 fails on zero points if there are several schemes")
    if how.startswith("sparse-"):
        print("note: compressed-tensors before 0.15 and jaxlm read this model; later releases have no sparse formats")
