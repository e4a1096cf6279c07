"""Batches of dialogues and preferences: packed equals unpacked, in loss and gradients, and nothing lost on the way."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.loader import make_loader
from jaxlm.data.batches.packing import PackedDocuments
from jaxlm.data.batches.preferences import PreferencePairs
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Bitext
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.training.objectives.loss import lm_loss
from tests.models import build

TOKENIZER = Tokenizer.train(["abcdefghij <>/s"], "char")


def texts(count: int, longest: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return ["".join(random.choice(list("abcdefghij"), n)) for n in random.integers(1, longest, count)]


ROWS = list(zip(texts(30, 9, 0), texts(30, 9, 1), strict=True))


@pytest.fixture
def instruct(tmp_path) -> str:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in ROWS))
    return f"instruct:{path}"


@pytest.fixture
def preference(tmp_path) -> str:
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": p, "chosen": c, "rejected": "j" + r} for (p, c), r in zip(ROWS, texts(30, 20, 2), strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"preference:{path}"


def ids(prompt: str, reply: str) -> list[int]:
    return [*TOKENIZER.encode(prompt), *TOKENIZER.encode(reply), TOKENIZER.eos_id]


@pytest.fixture(scope="module")
def gradient():
    config = nn.DecoderConfig(vocab_size=TOKENIZER.vocab_size, width=16, layers=1, heads=2, ffn=32)
    graphdef, params = build(config)
    params = jax.tree.map(lambda x: jax.numpy.asarray(3 * np.asarray(x)), params)  # so that attention matters

    @jax.jit
    def of(batch):
        (_, sums), grads = jax.value_and_grad(lambda p: lm_loss(nnx.merge(graphdef, p), batch), has_aux=True)(params)
        return sums, flatten(grads)

    return of


def test_packed_equals_unpacked_in_loss_and_gradients(instruct, gradient):
    loader = make_loader(
        DataConfig(seq_len=40, batch_size=1), open_source(instruct), TOKENIZER, train=False
    )
    packed = {}
    for batch in loader.iterate():
        for name, values in batch.items():
            packed.setdefault(name, []).append(values)
    packed = {name: np.concatenate(values) for name, values in packed.items()}
    assert packed["segment_ids"].max() > 2
    apart = {name: np.zeros((len(ROWS), 20), np.int32) for name in ("inputs", "targets", "weights")}
    for row, (prompt, reply) in enumerate(ROWS):
        n = len(ids(prompt, reply)) - 1
        apart["inputs"][row, :n], apart["targets"][row, :n] = ids(prompt, reply)[:-1], ids(prompt, reply)[1:]
        apart["weights"][row, len(prompt) - 1 : n] = 1
    (got, got_grads), (want, want_grads) = gradient(packed), gradient(apart)
    assert got["weight"] == want["weight"] == sum(len(reply) + 1 for _, reply in ROWS)
    np.testing.assert_allclose(got["nll"], want["nll"], rtol=1e-5)
    for path, grad in want_grads.items():
        np.testing.assert_allclose(got_grads[path], grad, rtol=2e-4, atol=2e-5, err_msg=path)
    # and it can fail: with attention across documents it is another loss
    blurred = gradient(packed | {"segment_ids": (packed["segment_ids"] > 0).astype(np.int32)})[0]
    assert abs(float(blurred["nll"] - want["nll"])) > 1e-3 * float(want["nll"])


def test_every_reply_is_learned_once_an_epoch(instruct):
    loader = make_loader(DataConfig(seq_len=24, batch_size=4, seed=3), open_source(instruct), TOKENIZER, train=True)
    found = []
    for index in range(loader.batches_per_epoch):
        batch = loader.batch(index)
        for row in range(4 if index < loader.batches_per_epoch - 1 else loader.examples_per_epoch % 4 or 4):
            learned = batch["weights"][row] > 0
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                found.append(batch["targets"][row][learned & (batch["segment_ids"][row] == segment)].tolist())
    assert sorted(found) == sorted([*TOKENIZER.encode(reply), TOKENIZER.eos_id] for _, reply in ROWS)
    report = loader.report()
    assert report["learned"] == sum(map(len, found)) and report["cut"] == report["split"] == report["empty"] == 0


def test_long_dialogues_are_truncated_and_those_without_a_reply_left_out():
    lengths = np.array([5, 12, 9, 1])
    learned = np.zeros(27, bool)
    learned[3:5] = learned[7:17] = learned[25:26] = True  # of the third only the last token
    packed = PackedDocuments(EncodedDocuments(np.arange(27), lengths, learned), 6, 99)
    batch = packed.take(0, np.arange(len(packed)))
    assert sorted(batch["targets"][batch["weights"] > 0].tolist()) == [3, 4, 7, 8, 9, 10, 11]
    assert packed.report() == {
        "documents": 4, "empty": 2, "split": 0, "tokens": 27, "cut": 1, "learned": 7, "rows": 2,
        "efficiency": 10 / 12,
    }
    left_out, truncated = packed.notes()
    assert left_out.startswith("2 of 4 documents") and "6 tokens" in left_out
    assert truncated.startswith("1 of 4 dialogues") and "data.seq_len" in truncated
    with pytest.raises(UserError, match="2 tokens; raise data.seq_len"):
        PackedDocuments(EncodedDocuments(np.arange(27), lengths, learned & (np.arange(27) > 8)), 2, 99)


def test_preferences_come_side_by_side(preference):
    source = open_source(preference)
    loader = make_loader(DataConfig(seq_len=16, batch_size=4), source, TOKENIZER, train=True)
    rows = {}
    for line in source.rows:
        both = [(ids(d.prompt, d.reply), len(d.prompt)) for d in line]
        if all(start < 17 for _, start in both):
            rows[tuple(tuple(whole[:17]) for whole, _ in both)] = both
    seen = []
    for index in range(loader.batches_per_epoch):
        batch = loader.batch(index)
        for row in range(4):
            key = []
            for side in ("chosen", "rejected"):
                inputs, targets, weights = (batch[f"{side}_{name}"][row] for name in ("inputs", "targets", "weights"))
                if not weights.any():
                    continue
                n = int(np.flatnonzero(weights)[-1]) + 1
                assert not inputs[n:].any() and not targets[n:].any() and (inputs[1:n] == targets[: n - 1]).all()
                key.append((*inputs[:1].tolist(), *targets[:n].tolist()))
                assert weights[: n].tolist() == [0.0] * (n - weights.sum().astype(int)) + [1.0] * int(weights.sum())
            if key:
                (_, start), _ = rows[tuple(key)]
                assert batch["chosen_weights"][row].argmax() == start - 1
                seen.append(tuple(key))
    assert sorted(seen) == sorted(rows) and len(seen) == loader.examples_per_epoch == len(ROWS)
    assert {loader.batch(i)["chosen_inputs"].shape for i in range(loader.batches_per_epoch)} == set(loader.shapes)
    assert len(loader.shapes) > 1 and set(loader.shapes) <= {(4, 2), (4, 4), (4, 8), (4, 16)}
    cut = sum(max(len(whole) for whole, _ in both) > 17 for both in rows.values())
    assert loader.report()["cut"] == cut > 0 and loader.report()["unlearnable"] == 0


def test_pairs_without_a_reply_in_reach_are_left_out():
    learned = np.array([0, 1, 0, 1, 0, 0, 0, 1, 0, 1], bool)
    pairs = PreferencePairs(EncodedDocuments(np.arange(10), np.array([2, 2, 4, 2]), learned), 2, 1, 0)
    assert len(pairs) == 1 and pairs.report()["unlearnable"] == 1
    assert len(pairs.notes()) == 1 and pairs.notes()[0].startswith("1 of 2 pairs") and "2 tokens" in pairs.notes()[0]
    with pytest.raises(UserError, match="2 tokens; raise data.seq_len"):
        PreferencePairs(EncodedDocuments(np.arange(6), np.array([4, 2]), learned[4:]), 2, 1, 0)


def test_a_real_distribution_packs_tightly():
    """Lengths of a log-normal, as those of chats are, in rows of 2,048: no more than a twentieth is padding."""
    lengths = np.clip(np.random.default_rng(1).lognormal(5.5, 0.9, 4000).astype(int), 8, 5000)
    learned = np.ones(lengths.sum(), bool)
    packed = PackedDocuments(EncodedDocuments(np.zeros(lengths.sum(), np.uint16), lengths, learned), 2048, 0)
    assert packed.report()["efficiency"] > 0.99


def test_dialogues_are_no_stream_and_train_no_tokenizer(instruct):
    from jaxlm.data.batches.packing import token_stream
    from jaxlm.data.tokenizers.from_config import tokenizer_from_config

    source = open_source(instruct)
    with pytest.raises(UserError, match="instruct:.*text:, jsonl: or tokens:"):
        token_stream(source, TOKENIZER)
    with pytest.raises(UserError, match="instruct:.*data.tokenizer"):
        tokenizer_from_config(DataConfig(), source)
    with pytest.raises(UserError, match="bitext:a,b.*sentence pairs"):
        encode_documents(Bitext("bitext:a,b", ["a"], ["b"]), TOKENIZER)
