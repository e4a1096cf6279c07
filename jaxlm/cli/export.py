"""Writes a model as others load it.

    jaxlm export runs/quickstart/run --out exported

Without --format it is the plainest family of transformers that can be the model: llama, gpt2, m2m_100 or marian, then
any other; compressed weights are written as what they stand for. --format compressed-tensors keeps them compressed, for
transformers and vLLM. --format gguf-f16, gguf-q8_0, gguf-q4_0 or gguf-q4_k writes a file for llama.cpp.
"""

from __future__ import annotations

from jaxlm.cli.arguments import add_model
from jaxlm.cli.output import size


def add_arguments(parser) -> None:
    add_model(parser)
    parser.add_argument("--out", metavar="DIR", required=True, help="the model directory, or FILE.gguf, to write")
    parser.add_argument("--format", metavar="NAME", help="see above; or a model_type of transformers, such as llama")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of dense ones")


def run(args) -> None:
    import jaxlm
    from jaxlm.hf.gguf.export import GGUF_PREFIX

    lm = jaxlm.load(args.model, expand=False)
    if args.format and args.format.startswith(GGUF_PREFIX):
        _gguf(args, lm)
    else:
        _directory(args, lm)


def _gguf(args, lm) -> None:
    from jaxlm.hf.gguf.export import GGUF_PREFIX, export_gguf

    file, types = export_gguf(args.out, lm.config, lm.params, lm.tokenizer, args.format.removeprefix(GGUF_PREFIX))
    found = ", ".join(f"{count} {kind}" for kind, count in types.most_common())
    print(f"{file}: {size(file.stat().st_size)}; matrices: {found}")


def _directory(args, lm) -> None:
    from jaxlm.hf.directory import read_json, weight_bytes

    out = lm.export(args.out, format=args.format, dtype=args.dtype)
    fields = read_json(out / "config.json")
    layout = fields.get("quantization_config", {})
    how = (layout.get("format") or layout["sparsity_config"]["format"]) if layout else args.dtype
    print(f"{out}: {fields['model_type']}, {size(weight_bytes(out))} of weights, {how}")
    groups = layout.get("config_groups", {}).values()
    if len(groups) > 1 and not all(group["weights"]["symmetric"] for group in groups):
        print("note: vLLM and jaxlm read it; transformers 5 fails on zero points where there are several schemes")
    if how.startswith("sparse-"):
        print("note: compressed-tensors before 0.15 and jaxlm read it; later ones have no sparse formats")
