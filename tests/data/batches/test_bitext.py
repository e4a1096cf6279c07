"""Bucketed batches of pairs: every pair once, in the right shape, nothing between the lines."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.core.errors import UserError
from jaxlm.data.batches.bitext import SentencePairs
from jaxlm.data.batches.buckets import BucketShapes, bucket_rows
from jaxlm.data.sources.types import Bitext
from jaxlm.data.tokenizers.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["abcdefghij"], "char")


def corpus(lengths: list[tuple[int, int]]) -> Bitext:
    """SentencePairs that can be told apart: the source spells the number of the pair, as far as it is long enough."""
    names = ("".join("abcdefghij"[int(digit)] for digit in f"{i:04d}"[::-1]) for i in range(len(lengths)))
    src = [name.ljust(s, "a")[:s] for name, (s, _) in zip(names, lengths, strict=True)]
    return Bitext("bitext:a,b", src, ["b" * t for _, t in lengths])


def pairs_in(batch: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """The pairs of a batch, decoded from what the model sees."""
    found = []
    for src, inputs, targets, weights in zip(*(batch[k] for k in ("src", "inputs", "targets", "weights")), strict=True):
        n, m = (src != 0).sum(), (targets != 0).sum()
        assert src[n - 1] == targets[m - 1] == 2 and not src[n:].any() and not targets[m:].any()
        assert inputs[0] == 1 and (inputs[1:m] == targets[:m - 1]).all() and not inputs[m:].any()
        if weights.any():
            assert weights.tolist() == [1.0] * m + [0.0] * (len(weights) - m)
            found.append((TOKENIZER.decode(src), TOKENIZER.decode(targets)))
        else:
            assert (n, m) == (1, 1), "rows without a pair hold an empty one"
    return found


LENGTHS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=60)


@settings(max_examples=50)
@given(LENGTHS, st.one_of(st.none(), st.integers(0, 5)), st.sampled_from([1, 2, 3]))
def test_an_epoch_holds_every_pair_exactly_once(lengths, seed, multiple):
    source = corpus(lengths)
    pairs = SentencePairs(source, TOKENIZER, BucketShapes((4, 8), 40, True, multiple))
    plan = pairs.plan(seed, 0)
    found = []
    for k in range(len(plan.bucket)):
        batch = pairs.batch(plan, k)
        assert batch["src"].shape == batch["inputs"].shape == batch["targets"].shape == batch["weights"].shape
        assert batch["src"].shape in pairs.shapes and batch["src"].shape[0] % multiple == 0
        assert batch["weights"].any()
        found += pairs_in(batch)
    assert sorted(found) == sorted(zip(source.src, source.tgt, strict=True))
    assert len(plan.starts) == len(plan.bucket) + 1 and plan.starts[-1] == len(pairs) == len(lengths)
    assert len(pairs.plan(seed, 1).bucket) == len(plan.bucket)


@given(LENGTHS)
def test_training_leaves_out_only_what_is_too_long_and_says_so(lengths):
    short = [pair for pair in lengths if max(pair) < 8]
    if not short:
        with pytest.raises(UserError, match="no pair of 'bitext:a,b' fits the longest bucket, 8 tokens; raise"):
            SentencePairs(corpus(lengths), TOKENIZER, BucketShapes((4, 8), 40, False))
        return
    pairs = SentencePairs(corpus(lengths), TOKENIZER, BucketShapes((8, 4), 40, False))
    report, left_out = pairs.report(), len(lengths) - len(short)
    assert (report["pairs"], report["too_long"]) == (len(short), left_out)
    assert report["longest"] == max(map(max, lengths)) + 1
    assert report["source_tokens"] == sum(s + 1 for s, _ in short)
    assert report["target_tokens"] == sum(t + 1 for _, t in short)
    note = (
        f"{left_out} of {len(lengths)} pairs are longer than 8 tokens (the longest: {report['longest']}) and are "
        "left out of training; raise data.buckets to keep them"
    )
    assert pairs.notes() == ([note] if left_out else [])


def test_a_pair_goes_to_the_smallest_bucket_that_holds_both_sides_and_eos():
    pairs = SentencePairs(corpus([(3, 3), (4, 0), (0, 4), (7, 7), (8, 0)]), TOKENIZER, BucketShapes((4, 8), 16, True))
    plan = pairs.plan(None, 0)
    shapes = {}
    for k in range(len(plan.bucket)):
        for src, tgt in pairs_in(batch := pairs.batch(plan, k)):
            shapes[len(src), len(tgt)] = batch["src"].shape[1]
    assert shapes == {(3, 3): 4, (4, 0): 8, (0, 4): 8, (7, 7): 8, (8, 0): 16}
    assert pairs.shapes == [(4, 4), (2, 8), (1, 16)]


def test_without_a_seed_pairs_keep_their_order_in_a_bucket():
    source = corpus([(9, i % 5) for i in range(40)])
    pairs = SentencePairs(source, TOKENIZER, BucketShapes((10,), 80, True))
    plan = pairs.plan(None, 0)
    found = sum((pairs_in(pairs.batch(plan, k)) for k in range(len(plan.bucket))), [])
    assert [src for src, _ in found] == source.src


def test_shuffling_mixes_buckets_and_differs_by_epoch_and_seed():
    pairs = SentencePairs(corpus([(i % 8, i % 8) for i in range(200)]), TOKENIZER, BucketShapes((2, 4, 8), 32, True))
    plans = [pairs.plan(seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    orders = [plan.order.tolist() for plan in plans]
    assert orders[0] == orders[3] and len(set(map(tuple, orders))) == 3
    assert 2 * len(np.flatnonzero(np.diff(plans[0].bucket))) > len(plans[0].bucket), "not one bucket after the other"
    partial = [np.diff(plan.starts).argmin() for plan in plans[:3]]
    assert len(set(partial)) > 1, "the partial batches are not always last"


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_are_its_rows(parts):
    pairs = SentencePairs(corpus([(i % 8, i % 8) for i in range(75)]), TOKENIZER, BucketShapes((4, 8), 32, True, 4))
    plan = pairs.plan(0, 0)
    for k in range(len(plan.bucket)):
        whole, slices = pairs.batch(plan, k), [pairs.batch(plan, k, part, parts) for part in range(parts)]
        for key in whole:
            assert (np.concatenate([part[key] for part in slices]) == whole[key]).all()


def test_rows_of_a_bucket():
    assert [bucket_rows(length, 4096, 1) for length in (12, 16, 24, 128)] == [336, 256, 168, 32]
    assert bucket_rows(16, 4096, 3) == 240, "a multiple of 8 and of 3"
    assert bucket_rows(16, 100, 1) == 6 and bucket_rows(16, 100, 4) == 4, "8 is too many"
    assert bucket_rows(128, 100, 4) == 4, "never less than one a device"


def test_mistakes():
    source = corpus([(3, 3)])
    with pytest.raises(UserError, match=r"data.buckets is \(1, 8\); give padded lengths of at least 2"):
        SentencePairs(source, TOKENIZER, BucketShapes((1, 8), 64, True))
    with pytest.raises(UserError, match="data.buckets is"):
        SentencePairs(source, TOKENIZER, BucketShapes((), 64, True))
    bare = Tokenizer.train(["abcdefghij"], "char")
    bare.pad_id = bare.eos_id = None
    with pytest.raises(UserError, match="the tokenizer has no pad or eos token, which translation needs; use another"):
        SentencePairs(source, bare, BucketShapes((8,), 64, True))
