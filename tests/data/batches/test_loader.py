"""Loaders: a batch is a pure function of (seed, index), whoever asks, wherever they resume, however many share it."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.batches.loader import make_loader
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.dialogues import Completion
from jaxlm.data.sources.types import Bitext, Dialogues, Documents, Mixture, Preferences
from jaxlm.data.tokenizers.tokenizer import Tokenizer


class Lines(list):
    """Rows that are here already."""

    def numbered(self):
        return enumerate(self, 1)


WORDS = [f"w{i}" + "x" * (i % 23) for i in range(150)]
TOKENIZER = Tokenizer.train(WORDS, "char")
CONFIG = DataConfig(seq_len=16, batch_size=12, batch_tokens=128, buckets=(8, 16, 32), seed=7)
CASES = {
    "stream": (CONFIG, Documents("text:x", [" ".join(WORDS).replace(" ", "x")], append_eos=False)),
    "documents": (dataclasses.replace(CONFIG, packing="documents"), Documents("jsonl:x", WORDS, append_eos=True)),
    "pairs": (CONFIG, Bitext("bitext:a,b", WORDS, WORDS[::-1])),
}
MIXED = (
    Documents("text:x", ["x".join(WORDS[:60])], append_eos=False), Documents("jsonl:x", WORDS[60:], append_eos=True)
)
CASES |= {
    "mixture": (CONFIG, Mixture("mix:x", MIXED, (2.0, 1.0), shares=False)),
    "shares": (
        dataclasses.replace(CONFIG, packing="documents"), Mixture("mix:x", MIXED, (0.3, 0.7), shares=True)
    ),
    "dialogues": (CONFIG, Dialogues("instruct:x", Lines([Completion(word[:3], word[3:] or "x") for word in WORDS]))),
    "preferences": (
        CONFIG, Preferences("preference:x", Lines([(Completion("w", a), Completion("w", a + "x")) for a in WORDS]))
    ),
}
ALL = pytest.mark.parametrize("kind", CASES)
KINDS = pytest.mark.parametrize("kind", [kind for kind in CASES if kind != "preferences"])  # one row an example
FIXED = ("documents", "pairs", "dialogues", "preferences")  # the same examples every epoch


def loader(kind: str, train: bool = True, **options):
    config, source = CASES[kind]
    changes = {key: options.pop(key) for key in list(options) if hasattr(config, key)}
    return make_loader(dataclasses.replace(config, **changes), source, TOKENIZER, train=train, **options)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and np.array_equal(a[key], b[key]) for key in a
    )


def joined(slices) -> dict[str, np.ndarray]:
    return {key: np.concatenate([part[key] for part in slices]) for key in slices[0]}


def examples(batches) -> list[tuple]:
    """Every example with weight in some batches, as something that can be compared and sorted."""
    return sorted(
        tuple(tuple(np.trim_zeros(values[row].tolist(), "b")) for values in batch.values())
        for batch in batches for row, weights in enumerate(batch.get("weights", batch.get("chosen_weights")))
        if weights.any()
    )


@ALL
def test_the_same_seed_and_index_give_the_same_batch(kind):
    one, two = loader(kind), loader(kind)
    order = np.random.default_rng(0).permutation(3 * one.batches_per_epoch)
    batches = {i: one.batch(int(i)) for i in order}
    assert all(same(two.batch(i), batches[i]) for i in range(len(order)))
    assert not all(same(loader(kind, seed=8).batch(i), batches[i]) for i in range(len(order)))


@ALL
def test_epochs_hold_the_same_examples_in_another_order(kind):
    """Windows of a stream move; that each target comes once an epoch is proven with them."""
    one = loader(kind, batch_size=1)
    n = one.batches_per_epoch
    first, second = ([one.batch(i) for i in range(epoch * n, epoch * n + n)] for epoch in (0, 1))
    assert not all(map(same, first, second))
    if kind in FIXED:
        assert examples(first) == examples(second)
    assert len(examples(first)) == one.examples_per_epoch


@pytest.mark.parametrize("kind", ["stream", "documents", "mixture", "dialogues"])
def test_training_batches_run_on_across_epochs(kind):
    one, single = loader(kind), loader(kind, batch_size=1)
    size, n = CONFIG.batch_size, one.examples_per_epoch
    assert n % size, "an epoch ends inside a batch"
    for index in range(2 * n // size + 1):
        batch = one.batch(index)
        assert batch["weights"].any(axis=1).all()
        for row in range(size):
            alone = single.batch(index * size + row)
            assert all((batch[key][row] == alone[key][0]).all() for key in batch)


@KINDS
def test_evaluation_is_one_ordered_pass_over_everything(kind):
    whole, batches = loader(kind, train=False), list(loader(kind, train=False).iterate())
    assert len(batches) == whole.batches_per_epoch
    assert len(examples(batches)) == whole.examples_per_epoch
    assert {batch["weights"].shape for batch in batches} == set(whole.shapes)
    counted = sum(batch["weights"].sum() for batch in batches)
    report = whole.report()
    if kind == "stream":
        assert counted == report["tokens"] - 1
    elif kind == "dialogues":
        assert counted == report["learned"]
    elif kind == "documents":
        assert counted == report["tokens"] - report["documents"]
    elif kind == "pairs":
        assert counted == report["target_tokens"] and report["pairs"] == len(WORDS) and report["too_long"] == 0
    assert all(map(same, batches, whole.iterate()))


@KINDS
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("count", [2, 4])
def test_one_process_is_the_concatenation_of_several(kind, train, count):
    whole = loader(kind, train, row_multiple=4)
    parts = [loader(kind, train, process_index=i, process_count=count, row_multiple=4) for i in range(count)]
    for index in range(whole.batches_per_epoch):
        slices = [part.batch(index) for part in parts]
        assert len({len(part["weights"]) for part in slices}) == 1
        assert same(whole.batch(index), joined(slices))
    assert all(part.shapes == whole.shapes for part in parts)


@ALL
def test_resuming_equals_going_on_whatever_the_number_of_processes(kind):
    def batches(count: int, start: int, n: int) -> list[dict[str, np.ndarray]]:
        parts = [
            itertools.islice(loader(kind, process_index=i, process_count=count, row_multiple=4).iterate(start), n)
            for i in range(count)
        ]
        return [joined(slices) for slices in zip(*parts, strict=True)]

    whole = loader(kind, row_multiple=4)
    n = 2 * whole.batches_per_epoch + 3
    uninterrupted = batches(1, 0, n)
    stops = (0, 1, whole.batches_per_epoch - 1, whole.batches_per_epoch, n - 2)
    for stop, (before, after) in zip(stops, [(1, 1), (1, 4), (4, 2), (1, 4), (4, 2)], strict=True):
        state = loader(kind, process_count=before, row_multiple=4).state(stop)
        start = loader(kind, process_count=after, row_multiple=4).batch_at_examples(**state)
        assert start == stop
        assert all(map(same, batches(after, start, 2), uninterrupted[stop:]))


@pytest.mark.parametrize("kind", FIXED)
def test_the_rest_of_an_epoch_is_what_is_left_of_it(kind):
    """Stopped in the middle with four processes and resumed with two: none twice, none lost."""
    def taken(count: int, start: int, stop: int) -> list[tuple]:
        parts = [loader(kind, process_index=i, process_count=count, row_multiple=4, batch_size=4) for i in range(count)]
        return [one for index in range(start, stop) for part in parts for one in examples([part.batch(index)])]

    whole = loader(kind, row_multiple=4, batch_size=4)
    n, rest = divmod(whole.examples_per_epoch, 4)
    stop = whole.batches_per_epoch if kind in ("pairs", "preferences") or not rest else n
    expected = examples([whole.batch(index) for index in range(stop)])
    assert len(expected) == (whole.examples_per_epoch if stop != n else n * 4)
    half = loader(kind, process_count=4, row_multiple=4, batch_size=4).state(stop // 2)
    start = loader(kind, process_count=2, row_multiple=4, batch_size=4).batch_at_examples(**half)
    assert sorted(taken(4, 0, stop // 2) + taken(2, start, stop)) == expected


@KINDS
def test_the_state_counts_examples(kind):
    one = loader(kind)
    seen = 0
    for index in range(one.batches_per_epoch):
        assert one.state(index) == {"examples": seen}
        seen += int(one.batch(index)["weights"].any(axis=1).sum())
    with pytest.raises(UserError, match="no batch starts after 1 examples, where training stopped; keep its data and"):
        one.batch_at_examples(1)


@ALL
@pytest.mark.parametrize("prefetch", [0, 5])
def test_iterating_is_indexing(kind, prefetch):
    one = loader(kind, prefetch=prefetch)
    for start in (0, one.batches_per_epoch - 1):
        batches = one.iterate(start)
        assert all(same(batch, one.batch(start + i)) for i, batch in enumerate(itertools.islice(batches, 4)))
        batches.close()


def test_rows_of_pairs_are_a_multiple():
    for multiple, count in ((1, 1), (3, 1), (3, 2), (1, 5)):
        for rows, _ in loader("pairs", row_multiple=multiple, process_count=count).shapes:
            assert rows % multiple == 0 and rows % count == 0


def test_too_long_pairs_are_left_out_of_training_only():
    training, evaluation = (loader("pairs", train, buckets=(8, 16)) for train in (True, False))
    assert 0 < training.report()["too_long"] == len(WORDS) - training.examples_per_epoch
    assert "are left out of training; raise data.buckets to keep them" in training.notes()[0]
    assert evaluation.examples_per_epoch == len(WORDS) and evaluation.notes() == []
    assert evaluation.shapes[-1][1] == 32


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"batch_size": 4}, {"process_count": 2, "row_multiple": 3}, "data.batch_size 4 cannot be shared evenly by 6 "
         "devices, micro-batches or processes; make it a multiple"),
        ({"batch_size": 0}, {}, "data.seq_len 16 and data.batch_size 0 must both be positive"),
        ({"seq_len": -1}, {}, "data.seq_len -1 and data.batch_size 12 must both be positive"),
        ({"seed": -1}, {}, "data.seed is -1; it must not be negative"),
    ],
)
def test_mistakes(changes, options, message):
    with pytest.raises(UserError) as caught:
        loader("stream", **changes, **options)
    assert str(caught.value) == message


ENDINGS = {
    "exit": ("pass", None, 0),
    "exception": ("raise KeyError", None, 1),
    "SIGTERM": ("while True: next(kept)", signal.SIGTERM, 0),
}
ENDS = f"""
import os, signal, sys
import jaxlm.data.batches.bitext, jaxlm.data.batches.packing, jaxlm.data.sources.spec, jaxlm.data.tokenizers.from_config
print("grain" in sys.modules or "jax" in sys.modules, flush=True)
from jaxlm.data.config import DataConfig
from jaxlm.data.batches.loader import make_loader
from jaxlm.data.sources.types import Documents
from jaxlm.data.tokenizers.tokenizer import Tokenizer

def prefetching(ending):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    source = Documents("text:x", ["abc" * 9999], append_eos=False)
    loader = make_loader(DataConfig(prefetch=8), source, Tokenizer.train(source.texts, "char"), train=True)
    dropped, kept = loader.iterate(), loader.iterate()
    next(dropped), next(kept)
    del dropped
    print(os.getpid(), flush=True)
    exec({ {name: last for name, (last, _, _) in ENDINGS.items()} }[ending])

for ending in {list(ENDINGS)}:  # grain, imported once, has started no thread yet
    child = os.fork()
    if not child:
        prefetching(ending)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_program_ends_while_batches_are_being_prefetched():
    """In any way. And only the loader costs the import of grain."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", ENDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as run:
        try:
            assert run.stdout.readline() == b"False\n", "grain or jax is imported without the loader"
            for ending, (_, sent, status) in ENDINGS.items():
                child = int(run.stdout.readline())
                if sent:
                    os.kill(child, sent)
                ended = threading.Timer(60, run.kill)
                ended.start()
                assert run.stdout.readline() == f"{status}\n".encode(), ending
                ended.cancel()
            assert run.wait(timeout=60) == 0
        finally:
            run.kill()
