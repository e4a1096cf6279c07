"""The speed at which batches are made, beside the speed at which training takes them; and the padding in packed rows.

    python tests/benchmarks/training/input_pipeline.py --text books.txt.xz --bitext train.en.gz,train.de.gz \\
        [--seconds 3]

The text is read as one stream, with each paragraph as a document, and as conversations of two paragraphs; each is
tokenized, stored in a cache and read from it, and batched by one thread. Training is the step of a small model ("nano",
and "tiny" for sentence pairs) on batches that are in memory already. Batches and steps take turns, so that the ratio
holds while the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from jaxlm import nn
from jaxlm.data.batches.loader import Loader, make_loader
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.spec import open_source
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.training.config import OptimConfig
from jaxlm.training.objectives.loss import make_loss
from jaxlm.training.optimizers.optimizer import make_optimizer
from jaxlm.training.state import init_state
from jaxlm.training.step import make_step

ROUNDS = 2
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def tokens_in(batch: dict[str, np.ndarray]) -> int:
    """What training counts as a batch's work: positions of the target side, padding too."""
    return batch["inputs"].size


def batches_per_second(loader: Loader, seconds: float) -> tuple[float, list[dict[str, np.ndarray]]]:
    """Tokens a second of a loader alone, and some of its batches."""
    iterator, kept, tokens = loader.iterate(), [], 0
    kept += itertools.islice(iterator, 2)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        tokens += tokens_in(next(iterator))
    rate = tokens / (time.perf_counter() - begin)
    iterator.close()
    return rate, kept


class Training:
    """Steps on batches that are there already."""

    def __init__(self, preset: str, vocab_size: int):
        config = nn.preset(preset, vocab_size=vocab_size)
        if config.kind == "decoder":
            config = nn.preset(preset, vocab_size=vocab_size, positions="rope")
        graphdef, like = nn.abstract(config)
        tx = make_optimizer(OptimConfig(), 1000)
        self._state = init_state(lambda: nn.initializer(config)[1](jax.random.key(0)), tx, 0)
        self._step = make_step(graphdef, like, make_loss(config), tx)

    def tokens_per_second(self, batches: list[dict[str, np.ndarray]], seconds: float) -> float:
        for batch in batches:  # compiles
            self._state, _ = self._step(self._state, batch)
        jax.block_until_ready(self._state)
        begin, tokens = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for batch in batches:
                self._state, _ = self._step(self._state, batch)
                tokens += tokens_in(batch)
            jax.block_until_ready(self._state)
        return tokens / (time.perf_counter() - begin)


def write_rows(text: str, directory: Path) -> None:
    paragraphs = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    with open(directory / "documents.jsonl", "w") as file:
        file.writelines(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs)
    with open(directory / "chat.jsonl", "w") as file:
        for asked, said in zip(paragraphs[::2], paragraphs[1::2], strict=False):
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a file with paragraphs")
    parser.add_argument("--bitext", help="two files, SRC,TGT")
    parser.add_argument("--characters", type=int, default=4_000_000, help="of the text that are used")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a measurement")
    parser.add_argument("--seq-len", type=int, default=256)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (text,) = open_source(f"text:{args.text}[:{args.characters}]").texts
        write_rows(text, directory)
        made = Tokenizer.train([text], vocab_size=4096)
        made.save(directory)
        file = directory / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}))
        tokenizer = Tokenizer.load(directory)
        cases = {
            "stream": (f"text:{args.text}[:{args.characters}]", "stream", "nano"),
            "documents": (f"jsonl:{directory}/documents.jsonl", "documents", "nano"),
            "chat": (f"chat:{directory}/chat.jsonl", "documents", "nano"),
        }
        if args.bitext:
            cases["bitext"] = (f"bitext:{args.bitext}", "stream", "tiny")
        print(f"{'':<10}{'tokenized':>12}{'from cache':>12}{'batches':>14}{'training':>12}{'ratio':>8}{'full':>8}")
        for kind, (spec, packing, preset) in cases.items():
            config = DataConfig(seq_len=args.seq_len, packing=packing, cache=str(directory / "cache"))
            seconds = []
            for _ in range(2):
                begin = time.perf_counter()
                loader = make_loader(config, open_source(spec), tokenizer, train=True)
                seconds.append(time.perf_counter() - begin)
            report, training = loader.report(), Training(preset, tokenizer.vocab_size)
            made, taken = [], []
            for _ in range(ROUNDS):
                rate, batches = batches_per_second(loader, args.seconds)
                made.append(rate)
                taken.append(training.tokens_per_second(batches, args.seconds))
            full = report.get("efficiency", 1.0)
            print(f"{kind:<10}{seconds[0]:>10.1f} s{seconds[1]:>10.1f} s{max(made):>10,.0f}/s{max(taken):>10,.0f}/s"
                  f"{max(made) / max(taken):>8.0f}{full:>8.1%}", flush=True)


if __name__ == "__main__":
    main()
