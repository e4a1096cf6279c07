"""A translator by jaxlm and by CTranslate2, in turn: sentences and words a second, and BLEU.

    python tests/benchmarks/inference/translate_ctranslate2.py RUN --data bitext:test.en.gz,test.de.gz \\
        [--rounds 5] [--json FILE]

ctranslate2 is needed. RUN is a training run of configs/multi30k.py, or any translation model of its kind (pre-norm,
sinusoidal positions). Both translate the tokens of all sentences of a file, sorted and batched as suits each best;
dense and with int8 weights and activations; greedily and with a beam of 5. The ratio of a row is the median over
rounds of jaxlm's time divided by CTranslate2's in the same round.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import ctranslate2
import jax.numpy as jnp
import numpy as np
from ctranslate2.specs import TransformerSpec
from ctranslate2.specs.common_spec import Activation

import jaxlm
from jaxlm.core.tree import flatten
from jaxlm.data.sources.spec import open_source
from jaxlm.evaluation.translation_quality import bleu
from jaxlm.inference.translation import encode_sources, translate_tokens
from jaxlm.nn.positions import sinusoids

LONGEST = 128  # tokens of a translation


def export(lm, directory: Path) -> None:
    """The model in CTranslate2's format."""
    config, params = lm.config, {path: np.asarray(leaf) for path, leaf in flatten(lm.params).items()}
    spec = TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers), config.heads, pre_norm=True,
        activation={"relu": Activation.RELU, "gelu": Activation.GELU}[config.activation],
    )
    table = params["embed/table"]
    positions = sinusoids(jnp.arange(config.position_offset, config.max_positions)[None], config)[0]

    def norm(into, path: str, layer=...) -> None:
        into.gamma, into.beta = params[f"{path}/scale"][layer], params[f"{path}/bias"][layer]

    def linear(into, path: str, names: str | tuple[str, ...], layer: int) -> None:
        into.weight = np.concatenate([params[f"{path}/{name}/kernel"][layer].T for name in names])
        into.bias = np.concatenate([params[f"{path}/{name}/bias"][layer] for name in names])

    for side, stack, count in (("encoder", spec.encoder, config.encoder_layers),
                               ("decoder", spec.decoder, config.decoder_layers)):
        for embeddings in stack.embeddings if side == "encoder" else [stack.embeddings]:
            embeddings.weight = table
        stack.scale_embeddings = config.embed_scale
        stack.position_encodings.encodings = np.asarray(positions)
        norm(stack.layer_norm, f"{side}/final_norm")
        at = f"{side}/layers/0"
        for i, layer in zip(range(count), stack.layer, strict=True):
            norm(layer.self_attention.layer_norm, f"{at}/attn_norm", i)
            for into, names in zip(layer.self_attention.linear, ("qkv", "o"), strict=True):
                linear(into, f"{at}/attn", names, i)
            if side == "decoder":
                norm(layer.attention.layer_norm, f"{at}/cross_norm", i)
                for into, names in zip(layer.attention.linear, ("q", "kv", "o"), strict=True):
                    linear(into, f"{at}/cross", names, i)
            norm(layer.ffn.layer_norm, f"{at}/mlp_norm", i)
            linear(layer.ffn.linear_0, f"{at}/mlp", ("up",), i)
            linear(layer.ffn.linear_1, f"{at}/mlp", ("down",), i)
    spec.decoder.projection.weight = table
    tokens = [str(i) for i in range(config.vocab_size)]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.bos_token = spec.config.decoder_start_token = str(config.bos_id)
    spec.config.eos_token, spec.config.unk_token = str(config.eos_id), str(config.pad_id)
    spec.validate()
    spec.optimize()
    directory.mkdir()
    spec.save(directory)


def ctranslate(directory: Path, kind: str, beam: int, threads: int) -> Callable[[list[list[int]]], list[list[int]]]:
    translator = ctranslate2.Translator(str(directory), compute_type=kind, inter_threads=1, intra_threads=threads)

    def run(sources: list[list[int]]) -> list[list[int]]:
        found = translator.translate_batch(
            [[str(token) for token in row] for row in sources], beam_size=beam, max_batch_size=64,
            max_decoding_length=LONGEST, length_penalty=1.0,
        )
        return [[int(token) for token in each.hypotheses[0]] for each in found]

    return run


def ours(lm, beam: int) -> Callable[[list[list[int]]], list[list[int]]]:
    return lambda sources: translate_tokens(
        lm, sources, lm.generation, beam=beam, length_penalty=1.0, max_length=LONGEST
    )[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--data", required=True, metavar="SPEC")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of CTranslate2")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    lm = jaxlm.load(args.run)
    data = open_source(args.data)
    sources = encode_sources(lm, data.src)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        export(lm, Path(scratch) / "model")
        small = jaxlm.compress(lm, "w8a8-dynamic")
        for beam in (1, 5):
            ways = {
                "CTranslate2 float32": ctranslate(Path(scratch) / "model", "float32", beam, args.threads),
                "CTranslate2 int8": ctranslate(Path(scratch) / "model", "int8", beam, args.threads),
                "jaxlm float32": ours(lm, beam),
                "jaxlm w8a8-dynamic": ours(small, beam),
            }
            said = {name: way(sources) for name, way in ways.items()}  # and everything is compiled
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(args.rounds):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    way(sources)
                    times[name].append(time.perf_counter() - begin)
            for name in ways:
                peer = "CTranslate2 int8" if "8" in name.split()[1] else "CTranslate2 float32"
                ratio = median(a / b for a, b in zip(times[name], times[peer], strict=True))
                score = bleu([lm.tokenizer.decode(row) for row in said[name]], data.tgt)
                words = sum(map(len, said[name]))
                same = np.mean([a == b for a, b in zip(said[name], said["CTranslate2 float32"], strict=True)])
                seconds = median(times[name])
                rows.append({"beam": beam, "name": name, "seconds": seconds, "tokens": words, "ratio": ratio,
                             "bleu": score["bleu"], "same": float(same)})
                print(f"beam {beam}  {name:22} {seconds:7.2f} s  {len(sources) / seconds:7.0f} sentences/s  "
                      f"{words / seconds:8.0f} tokens/s  {ratio:5.2f} times {peer}'s  BLEU {score['bleu']:.2f}  "
                      f"{same:.1%} as CTranslate2 float32 says it", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
