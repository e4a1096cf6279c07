"""Beam search against enumeration, against a search written with lists, and against greedy decoding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.inference.beam import BeamScorer, init_search, run_search
from jaxlm.inference.logits_processors import LogitsProcessors
from tests.inference import toys

EOS = 2


@partial(jax.jit, static_argnames=("beams", "size"))
def _search(table, first_B, limit_B, alpha, exact, *, beams, size):
    processors = LogitsProcessors(jnp.array([EOS]), limit_B)
    state = init_search(toys.empty(len(table)), first_B, processors, beams=beams, size=size)
    return run_search(partial(toys.decode, table), state, processors, BeamScorer(alpha, exact), capacity=size).finished


def run(table, first, limits, *, beams, alpha=1.0, exact=False, size=None):
    arrays = (table, np.asarray(first, np.int32), np.asarray(limits, np.int32), np.float32(alpha), exact)
    return jax.tree.map(np.asarray, _search(*arrays, beams=beams, size=size or max(limits)))


def hypothesis(found, b, k):
    return tuple(found.tokens[b, k, : found.length[b, k]].tolist())


@pytest.mark.parametrize("alpha", [0.0, 1.0, 0.6, -0.5])
def test_a_beam_as_wide_as_the_tree_finds_the_best_hypotheses_there_are(alpha):
    """27 live prefixes of three tokens exist at most, so 30 beams drop none; ``exact`` then misses nothing."""
    table, limits, first = toys.table(3, 4, seed=0), [4, 3, 2], [1, 0, 3]
    found = run(table, first, limits, beams=30, alpha=alpha, exact=True)
    for b, limit in enumerate(limits):
        every = [
            (toys.total(table[b], first[b], tokens) / len(tokens) ** alpha, tokens)
            for tokens in toys.all_hypotheses(4, limit, EOS)
        ]
        for k, (score, tokens) in enumerate(sorted(every, reverse=True)[:5]):
            assert found.score[b, k] == pytest.approx(score, abs=1e-5)
            assert hypothesis(found, b, k) == tokens


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_a_narrow_beam_follows_the_written_rules(beams):
    table = toys.table(6, 150, seed=beams)  # more than two blocks of the blocked top-k
    table[:, :, EOS] += 3.0
    first, limits = [0, 1, 3, 4, 5, 6], [12, 7, 1, 9, 12, 5]
    for alpha in (0.0, 1.0, 2.0, -1.0):
        for exact in (False, True):
            found = run(table, first, limits, beams=beams, alpha=alpha, exact=exact)
            for b, limit in enumerate(limits):
                wanted = toys.beam_search_by_hand(
                    table[b], first[b], beams=beams, limit=limit, eos=EOS, alpha=alpha, exact=exact
                )
                filled = found.score[b] > -np.inf
                assert filled.sum() == len(wanted)
                np.testing.assert_allclose(found.score[b, filled], [score for score, _ in wanted], rtol=1e-5, atol=1e-5)
                assert [hypothesis(found, b, k) for k in range(len(wanted))] == [tokens for _, tokens in wanted]
                assert (found.length[b, ~filled] == 0).all()


def test_one_beam_is_greedy():
    table = toys.table(8, 20, seed=3)
    found = run(table, range(8), [15] * 8, beams=1)
    for b in range(8):
        tokens = [b]
        while len(tokens) <= 15 and (len(tokens) == 1 or tokens[-1] != EOS):
            tokens.append(int(toys.logp(table[b], tokens).argmax()))
        assert hypothesis(found, b, 0) == tuple(tokens[1:])


def test_batch_mates_and_spare_room_change_nothing():
    table, first, limits = toys.table(4, 10, seed=4), [1, 3, 4, 5], [9, 2, 6, 9]
    together = run(table, first, limits, beams=4, size=16)
    for b in range(4):
        alone = run(table[b : b + 1], first[b : b + 1], limits[b : b + 1], beams=4, size=9)
        np.testing.assert_array_equal(together.score[b], alone.score[0])
        assert [hypothesis(together, b, k) for k in range(4)] == [hypothesis(alone, 0, k) for k in range(4)]


def test_a_sentence_without_room_yields_nothing():
    found = run(toys.table(2, 5, seed=0), [1, 1], [0, 3], beams=2)
    assert (found.length[0] == 0).all() and found.length[1, 0] > 0
