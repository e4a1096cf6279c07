"""Options of requests against ``generate``, NumPy and llguidance; and the errors of wrong options."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.inference.decoding import generate_tokens
from jaxlm.inference.engine.constraints import Constraint
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Request
from tests.inference.engine.serving import serve
from tests.inference.models import Handle, decoder, full_logits, random_params, with_config

PROMPT, OTHER = (5, 6, 9), (7, 7, 21, 4, 12)


@pytest.fixture(scope="module")
def lm():
    return with_config(decoder(), eos_id=2)


@pytest.fixture(scope="module")
def engine(lm):
    return Engine(lm, slots=4, context=64, page_size=4, prefill_chunk=16)


def answers(engine, *requests):
    return [answer for _, answer in sorted(serve(engine, requests).items())]


def test_samples_are_those_of_generate_whoever_is_near(lm, engine):
    options = {"temperature": 1.0, "top_p": 0.9}
    want = generate_tokens(lm, [PROMPT, PROMPT, OTHER], seed=3, max_new_tokens=10, **options)
    near = Request(OTHER, 20, temperature=2.0, seed=1, ignore_eos=True, repetition_penalty=1.5)
    for neighbours in ([], [near], [near] * 4):
        asked = [Request(PROMPT, 10, seed=3, n=2, **options), Request(OTHER, 10, seed=3, **options)]
        assert [answer.tokens for answer in answers(engine, *neighbours, *asked)][len(neighbours) :] == want
    free = answers(engine, *[Request(PROMPT, 10, ignore_eos=True, **options)] * 3)
    assert len({tuple(answer.tokens) for answer in free}) > 1


def test_texts_end_as_asked(lm, engine):
    free = answers(engine, Request(PROMPT, 30, ignore_eos=True))[0]
    assert free.finish == "length" and len(free.tokens) == 30
    stop = lm.tokenizer.decode(free.tokens)[9:12]
    token = next(token for token in free.tokens[5:] if token not in free.tokens[:5])
    cut, at_token, least = answers(
        engine, Request(PROMPT, 30, ignore_eos=True, stop=("never so", stop)),
        Request(PROMPT, 30, ignore_eos=True, stop_tokens=(token,)),
        Request(PROMPT, 30, min_new_tokens=12, logit_bias={2: 50.0}),
    )
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish == "stop"
    assert at_token.tokens == free.tokens[: free.tokens.index(token)] and at_token.finish == "stop"
    assert len(least.tokens) == 12 and 2 not in least.tokens and least.finish == "stop"


def test_penalties_and_biases_are_those_of_numpy(lm, engine):
    options = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3, "logit_bias": {8: -2.0}}
    found = answers(engine, Request(PROMPT, 16, ignore_eos=True, **options), Request(OTHER, 16, ignore_eos=True))
    tokens: list[int] = []
    for _ in range(16):
        logits = full_logits(lm, [*PROMPT, *tokens])[-1].astype(np.float64)
        seen = np.isin(np.arange(len(logits)), [*PROMPT, *tokens])
        logits = np.where(seen, np.where(logits < 0, logits * 1.3, logits / 1.3), logits)
        counts = np.bincount(tokens, minlength=len(logits))
        logits -= 0.7 * (counts > 0) + 0.4 * counts
        logits[8] -= 2.0
        tokens.append(int(logits.argmax()))
    plain = generate_tokens(decoder(), [OTHER], max_new_tokens=16)[0]
    assert [answer.tokens for answer in found] == [tokens, plain]


def test_log_probabilities_are_the_models(lm, engine):
    answer, silent = answers(
        engine, Request(PROMPT, 8, temperature=1.5, seed=1, ignore_eos=True, logprobs=3, presence_penalty=1.0),
        Request(PROMPT, 8, ignore_eos=True),
    )
    assert not silent.logprobs and [each.token for each in answer.logprobs] == answer.tokens
    logits = full_logits(lm, [*PROMPT, *answer.tokens])[len(PROMPT) - 1 : -1].astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row, each in zip(logp, answer.logprobs, strict=True):
        best = np.argsort(-row)[:3]
        assert [token for token, _ in each.top] == best.tolist()
        np.testing.assert_allclose([value for _, value in each.top], row[best], atol=1e-4)
        np.testing.assert_allclose(each.logprob, row[each.token], atol=1e-4)


def test_the_best_of_several_are_told_best_first(engine):
    options = {"temperature": 1.0, "seed": 4, "ignore_eos": True}
    every = answers(engine, Request(PROMPT, 6, n=5, logprobs=0, **options))
    every.sort(key=lambda answer: -sum(each.logprob for each in answer.logprobs))
    engine.submit(Request(PROMPT, 6, n=2, best_of=5, **options))
    told = [engine.step() for _ in range(4)]
    assert not any(told)
    best = [answer for _, answer in sorted(serve(engine).items())]
    assert [answer.tokens for answer in best] == [answer.tokens for answer in every[:2]]
    assert not best[0].logprobs


def test_json_keeps_to_its_schema():
    """The tokens of this model are bytes, so that they can spell JSON."""
    pytest.importorskip("llguidance")
    bpe = Tokenizer.train(['{"age": 12}'], vocab_size=264)
    config = nn.DecoderConfig(vocab_size=bpe.vocab_size, width=8, heads=2, ffn=8, layers=1)
    small = Handle(config, *random_params(config), bpe)
    schema = {
        "type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["age"],
        "additionalProperties": False,
    }
    options = {"temperature": 1.0, "n": 3, "seed": 1}
    asked = [Request((9,), 30, constraint=Constraint(json=form), **options) for form in (schema, json.dumps(schema))]
    for answer in answers(Engine(small, slots=3, context=64, page_size=4, prefill_chunk=16), *asked):
        assert answer.finish == "stop" and 0 <= json.loads(answer.text)["age"] <= 99
        assert answer.text.startswith('{"age":')


def test_constraints_are_kept(engine):
    pytest.importorskip("llguidance")
    options = {"temperature": 1.0, "seed": 2}
    chosen, matched, both = answers(
        engine, Request(PROMPT, 30, constraint=Constraint(choice=("the cat", "a dog.")), **options),
        Request(PROMPT, 30, constraint=Constraint(regex="[a-c]{3} (x|y)+z"), **options),
        Request(OTHER, 3, constraint=Constraint(regex="[a-c]{9}"), **options),
    )
    assert chosen.text in ("the cat", "a dog.") and re.fullmatch("[a-c]{3} (x|y)+z", matched.text)
    assert chosen.finish == matched.finish == "stop"
    assert re.fullmatch("[a-c]{3}", both.text) and both.finish == "length"


@pytest.mark.parametrize("constraint, named", [
    (Constraint(regex="["), "unclosed character class"), (Constraint(json="{"), "JSON schema"),
    (Constraint(json={"type": "nothing"}), "nothing"), (Constraint(), "exactly one"),
    (Constraint(regex="a", choice=("b",)), "exactly one"),
])  # fmt: skip
def test_constraints_that_are_none_are_refused(engine, constraint, named):
    pytest.importorskip("llguidance")
    with pytest.raises(UserError, match=named):
        engine.submit(Request(PROMPT, 5, constraint=constraint))
    assert not engine.busy


def test_what_is_cancelled_ends_and_leaves_nothing(engine):
    first = engine.submit(Request(PROMPT, 40, ignore_eos=True))
    second = engine.submit(Request(PROMPT, 40, ignore_eos=True, n=2, best_of=6, temperature=1.0))
    for _ in range(3):
        engine.step()
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(second + 17)
    events = engine.step()
    assert {(event.request_id, event.index, event.finish_reason) for event in events} == {
        (first, 0, "cancelled"), (second, 0, "cancelled"), (second, 1, "cancelled"),
    }
    assert not engine.busy and engine.step() == [] and engine.stats.pages_used == 0


@pytest.mark.parametrize("options, named", [
    ({"prompt": ()}, "the prompt is empty"), ({"prompt": (999,)}, "prompt has the token 999"),
    ({"prompt": (5,) * 64}, "room for 64"), ({"max_new_tokens": 62}, "lower max_new_tokens"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"),
    ({"n": 0}, "n is 0"), ({"n": 3, "best_of": 2}, "best_of is 2"), ({"stop": ("",)}, "empty stop string"),
    ({"logprobs": 21}, "logprobs is 21"), ({"logit_bias": {3: float("inf")}}, "finite"),
])  # fmt: skip
def test_mistakes_are_named_and_nothing_is_queued(engine, options, named):
    with pytest.raises(UserError, match=named):
        engine.submit(Request(**{"prompt": PROMPT, "max_new_tokens": 5} | options))
    assert not engine.busy


def test_models_and_options_that_are_of_no_use_are_refused():
    for lm, options, named in (
        (replace(decoder(), config=nn.LSTMConfig()), {}, "kind 'lstm'"), (decoder(), {"slots": 0}, "slots"),
        (decoder(), {"guesses": 2}, "num_draft_tokens"), (decoder(), {"slot": 2}, "slots"),
        (decoder(), {"num_pages": 3, "context": 64}, "3 pages"),
        (with_config(decoder(), positions="learned", max_positions=32), {"context": 64}, "give 2 to 32"),
    ):
        with pytest.raises(UserError, match=named):
            Engine(lm, **options)


def test_tokens_stand_for_bytes(lm):
    found = lm.tokenizer.vocabulary.token_bytes()
    assert found[:3] == [None] * 3
    assert b"".join(found[i] for i in lm.tokenizer.encode("the cat.")) == b"the cat."
