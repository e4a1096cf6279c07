"""Models whose rotations depend on the length of the text: a text is the same alone, among others, and decoded."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.evaluation.insight import score_tokens
from jaxlm.evaluation.likelihood import StreamWindows, row_nll
from jaxlm.inference.beam import BeamScorer, finish_search, search_decoder
from jaxlm.inference.decoding import beam_tokens, generate_tokens
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Request
from jaxlm.inference.generation_config import PLAIN
from jaxlm.inference.logits_processors import make_logits_processors
from jaxlm.nn.config import RopeScaling
from tests.inference.engine.serving import serve
from tests.inference.models import decoder

ORIGINAL, LENGTH = 12, 40
LONGROPE = {"max_positions": 64, "rope_scaling": RopeScaling(
    "longrope", original_positions=ORIGINAL, attention_factor=1.1, short_factor=(1.0, 1.0, 1.5, 1.0),
    long_factor=(1.0, 3.0, 9.0, 27.0))}
DYNAMIC = {"max_positions": ORIGINAL, "rope_scaling": RopeScaling("dynamic", factor=4.0)}
METHODS = {"longrope": LONGROPE, "dynamic": DYNAMIC}
CLOSE = dict(rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module", params=METHODS)
def lm(request):
    return decoder(**METHODS[request.param])


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, params, tokens_BxT, **named):
    return nnx.merge(graphdef, params)(tokens_BxT, **named)


def text(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 31, length).tolist()


def padded(rows: list[list[int]]) -> np.ndarray:
    return np.array([[*row, *[0] * (LENGTH - len(row))] for row in rows], np.int32)


def logits_alone(lm, tokens: list[int]) -> np.ndarray:
    """Those after each token, of a pass over this text and nothing else."""
    found = _logits(lm.graphdef, lm.params, padded([tokens]), length_B=np.array([len(tokens)], np.int32))
    return np.asarray(found)[0, : len(tokens)]


def greedy_alone(lm, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_alone(lm, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def test_padding_is_no_part_of_the_length(lm):
    """``logits_alone``, with which all others compare, gives what the text gives without padding."""
    for tokens in (text(7), text(20)):
        whole = _logits(lm.graphdef, lm.params, np.array([tokens], np.int32))[0]
        np.testing.assert_allclose(logits_alone(lm, tokens), whole, **CLOSE)
    assert np.abs(logits_alone(lm, text(20))[:7] - logits_alone(lm, text(20)[:7])).max() > 0.1, "nothing to find"


def test_rows_and_packed_documents_are_what_they_are_alone(lm):
    rows = [text(7), text(20, 1), text(13, 2), text(12, 3)]
    lengths_B = np.array([len(row) for row in rows], np.int32)
    together = np.asarray(_logits(lm.graphdef, lm.params, padded(rows), length_B=lengths_B))
    joined = sum(rows[1:3], rows[0])
    segments = np.repeat(np.arange(4), [7, 20, 13, 0])
    positions = np.concatenate([np.arange(len(row)) for row in rows[:3]])
    packed = np.asarray(_logits(
        lm.graphdef, lm.params, np.array([joined], np.int32), segment_ids_BxT=segments[None].astype(np.int32),
        positions_BxT=positions[None].astype(np.int32)))
    begin = 0
    for r, row in enumerate(rows):
        alone = logits_alone(lm, row)
        np.testing.assert_allclose(together[r, : len(row)], alone, **CLOSE)
        if r < 3:
            np.testing.assert_allclose(packed[0, begin : begin + len(row)], alone, **CLOSE)
            begin += len(row)


@pytest.mark.parametrize("kv_cache", ["full", pytest.param("int8", marks=pytest.mark.slow)])
def test_decoding_is_reading_the_whole_text_at_every_token(lm, kv_cache):
    """Two rows, padded at the left, which pass the original length at different steps."""
    lm = decoder(**{"rope_scaling": lm.config.rope_scaling, "max_positions": lm.config.max_positions},
                 kv_cache=kv_cache)
    rows, start_B = [text(20), text(17, 1)], np.array([0, 3], np.int32)
    tokens_BxT = np.stack([rows[0], np.pad(rows[1], (3, 0))]).astype(np.int32)

    @partial(jax.jit, donate_argnums=2)
    def decode(params, tokens_BxT, cache):
        return nnx.merge(lm.graphdef, params).decode(tokens_BxT, cache)

    cache = nnx.merge(lm.graphdef, lm.params).init_cache(2, 24).replace(start=start_B)
    _, cache = decode(lm.params, tokens_BxT[:, :6], cache)
    for t in range(6, 20):
        logits_Bx1xV, cache = decode(lm.params, tokens_BxT[:, t : t + 1], cache)
        for row, begin, logits_1xV in zip(rows, start_B, logits_Bx1xV, strict=True):
            np.testing.assert_allclose(logits_1xV[0], logits_alone(lm, row[: t + 1 - begin])[-1], **CLOSE)


PROMPTS = [text(5), text(10, 1), text(14, 2), text(12, 3)]


def test_generate_is_that_without_a_cache(lm):
    found = generate_tokens(lm, PROMPTS, max_new_tokens=12)
    assert found == [greedy_alone(lm, prompt, 12) for prompt in PROMPTS]


def test_a_beam_is_scored_as_without_a_cache(lm):
    prompts_BxP = np.array([[0] * (14 - len(prompt)) + prompt for prompt in PROMPTS[:3]], np.int32)
    start_B = np.array([14 - len(prompt) for prompt in PROMPTS[:3]], np.int32)
    limits = [10, 9, 10]
    generation = PLAIN.replace(num_beams=3)
    processors = make_logits_processors(generation, lm.config, [5, 10, 14], limits, prompts_BxP, start_B)
    scorer = BeamScorer.of(generation)
    state = search_decoder(
        lm.graphdef, lm.params, prompts_BxP, start_B, processors, scorer, beams=3, size=10)
    found = finish_search(lm.graphdef, lm.params, state, processors, scorer).ranked(processors)
    for prompt, hypotheses in zip(PROMPTS, found, strict=False):
        for tokens, score in hypotheses:
            logp = 0.0
            for i, token in enumerate(tokens):
                logp += float(jax.nn.log_softmax(jnp.asarray(logits_alone(lm, prompt + tokens[:i])[-1]))[token])
            assert score == pytest.approx(logp / len(tokens), rel=1e-3, abs=1e-3)
    together = beam_tokens(lm, PROMPTS[:3], max_new_tokens=9, beam=3)
    assert together == [beam_tokens(lm, [prompt], max_new_tokens=9, beam=3)[0] for prompt in PROMPTS[:3]]


@pytest.mark.parametrize("drafted", [False, True])
def test_the_engine_serves_the_long_context_with_shared_pages(lm, drafted):
    """The prompts begin alike, so that a page of a short text would be found for a long one."""
    shared = text(9, 5)
    rows = [shared, shared + text(2, 6), shared + text(7, 7), shared + text(7, 7)[:6], text(12, 8), shared + text(2, 9)]
    engine = Engine(
        lm, slots=3, context=LENGTH, page_size=4, prefill_chunk=8, num_pages=24, draft=lm if drafted else None,
        num_draft_tokens=2)
    numbers = [engine.submit(Request(tuple(row), 10)) for row in rows]
    answers = serve(engine)
    numbers += [engine.submit(Request(tuple(row), 10)) for row in rows]  # most pages are cached now
    answers |= serve(engine)
    for number, want in zip(numbers, 2 * generate_tokens(lm, rows, max_new_tokens=10), strict=True):
        assert answers[number, 0].tokens == want
    stats = engine.stats
    assert stats.cached_tokens and stats.pages_used == stats.running == stats.waiting == 0
    assert not drafted or stats.accepted_tokens


def test_likelihoods_are_those_of_each_text(lm):
    """Of windows, of which the last is shorter, and of a text that is padded to one of a few sizes."""
    ids, context = np.array(text(26, 4)), 18
    (batch,) = StreamWindows(EncodedDocuments(ids, np.array([len(ids)])), context).batches(rows=2)
    found = np.asarray(row_nll(lm.graphdef, lm.params, batch))
    for nll, window in zip(found, (ids[:18], ids[18:]), strict=True):
        logp_TxV = jax.nn.log_softmax(jnp.asarray(logits_alone(lm, window[:-1].tolist())))
        assert nll == pytest.approx(-float(logp_TxV[np.arange(len(window) - 1), window[1:]].sum()), rel=1e-3)
    row = text(7)
    scores = score_tokens(lm, row)
    logp_TxV = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_alone(lm, row[:-1]))))
    np.testing.assert_allclose(scores.logprobs, logp_TxV[np.arange(6), row[1:]], **CLOSE)


def test_rows_of_the_harness_are_what_they_are_alone(lm):
    harness = pytest.importorskip("jaxlm.harness", reason="lm_eval is not installed", exc_type=ImportError)
    rows = [text(7), text(20, 1)]
    known, _, last = harness._read(lm.graphdef, lm.params, padded(rows), np.array([7, 20], np.int32))
    for r, row in enumerate(rows):
        logp_TxV = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_alone(lm, row))))
        np.testing.assert_allclose(known[r, : len(row) - 1], logp_TxV[np.arange(len(row) - 1), row[1:]], **CLOSE)
        np.testing.assert_allclose(last[r], logp_TxV[-1], **CLOSE)
