"""Pieces of text are final, make up the whole text together, and end before a stop string."""

from __future__ import annotations

import numpy as np
import pytest

from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.inference.detokenizer import Detokenizer

WORDS = "the quick brown fox née über 日本語 🙂👍🏽 stops here. And here, too"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([WORDS], vocab_size=300)


def pieces(stream: Detokenizer, tokens) -> list[str]:
    out = []
    for token in tokens:
        out.append(stream.push(token))
        if stream.stopped:
            break
    return [*out, stream.finish()]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_make_the_whole_and_are_cut_between_characters(tokenizer, seed):
    rng = np.random.default_rng(seed)
    tokens = tokenizer.encode(" ".join(rng.permutation(WORDS.split())))
    at = int(rng.integers(len(tokens)))
    head = tokenizer.decode(tokens[:at])
    found = pieces(Detokenizer(tokenizer, tokens[:at]), tokens[at:])
    whole = tokenizer.decode(tokens)
    if whole.startswith(head):
        assert "".join(found) == whole[len(head) :]
        assert "\ufffd" not in "".join(found)
    assert max(map(len, found)) < 12


@pytest.mark.parametrize("seed", range(20))
def test_bytes_that_are_no_text_come_too(tokenizer, seed):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 259, 30).tolist()
    found = "".join(pieces(Detokenizer(tokenizer, []), tokens))
    assert found.replace("\ufffd", "") == tokenizer.decode(tokens).replace("\ufffd", "")


@pytest.mark.parametrize("stop", [("fox",), ("s he", "brown"), ("🙂👍",), ("zzz", "here, toot"), ("here.", "e. A")])
def test_the_text_ends_before_the_first_stop_string(tokenizer, stop):
    tokens = tokenizer.encode(WORDS)
    stream = Detokenizer(tokenizer, [], stop)
    found = pieces(stream, tokens)
    at = min((at for at in map(WORDS.find, stop) if at >= 0), default=len(WORDS))
    assert "".join(found) == WORDS[:at]
    assert stream.stopped == (at < len(WORDS))
    for count in range(len(found)):  # nothing is told too early
        assert WORDS[:at].startswith("".join(found[:count]))
