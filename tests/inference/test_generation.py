"""Cached generation against full forward passes and against each row alone; stop strings, seeds, contexts, errors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import read_model
from jaxlm.inference.batching import batches_by_length, bucket, pad_rows
from jaxlm.inference.decoding import beam_tokens, generate_tokens
from jaxlm.inference.generation import generate
from jaxlm.inference.generation_config import PLAIN
from tests.inference.models import (
    Handle,
    decoder,
    greedy_by_full_forward,
    lstm,
    total_logp,
    with_config,
    with_special_token,
)

PROMPTS = ["the cat", "a", "what is it that you said to the other one of them.", "on and on"]
MODELS = {
    "rotary": lambda: decoder(),
    "learned": lambda: decoder(positions="learned", max_positions=128),
    "relative": lambda: decoder(positions="relative"),
    "window": lambda: decoder(windows=(4, 0)),
    "sinusoidal": lambda: decoder(positions="sinusoidal", norm="layernorm"),
    "lstm": lstm,
}
MORE_MODELS = ["learned", "relative", "window", "sinusoidal"]  # tests/nn shows that each decodes as it reads


def ids(lm, prompts=PROMPTS):
    return [lm.tokenizer.encode(prompt) for prompt in prompts]


@pytest.mark.parametrize(
    "name", ["rotary", "lstm", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MODELS)]
)
def test_a_ragged_batch_continues_each_prompt_as_the_full_forward_pass_does(name):
    lm = MODELS[name]()
    found = generate_tokens(lm, ids(lm), max_new_tokens=20)
    assert len({tuple(tokens) for tokens in found}) > 1
    for prompt, tokens in zip(ids(lm), found, strict=True):
        assert tokens == greedy_by_full_forward(lm, prompt, 20)


def test_the_end_token_ends_a_row_and_only_that_row():
    lm = decoder()
    free = generate_tokens(lm, ids(lm), max_new_tokens=20)
    eos = free[0][3]
    ending = generate_tokens(with_config(lm, eos_id=eos), ids(lm), max_new_tokens=20)
    for before, after in zip(free, ending, strict=True):
        assert after == (before[: before.index(eos)] if eos in before else before)


def test_sampling_depends_on_seed_and_prompt_alone():
    lm = decoder()
    options = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95}
    first = generate(lm, PROMPTS, seed=1, **options)
    assert first == generate(lm, PROMPTS, seed=1, **options)
    assert first != generate(lm, PROMPTS, seed=2, **options)
    assert first[::-1] == generate(lm, PROMPTS[::-1], seed=1, **options)
    assert first == generate(lm, PROMPTS, seed=1, batch_size=3, **options)
    assert first == generate(lm, PROMPTS, seed=1, stop=["never there"], **options)
    copies = generate(lm, [PROMPTS[2]] * 4, seed=1, **options)
    assert len(set(copies)) == 4 and copies[0] == first[2]


def test_a_text_ends_before_the_first_stop_string():
    lm = decoder()
    full = generate(lm, PROMPTS, max_new_tokens=70)
    stops = [full[0][40:43], full[2][5:8]]
    cut = generate(lm, PROMPTS, max_new_tokens=70, stop=stops)
    for text, short in zip(full, cut, strict=True):
        found = [at for at in map(text.find, stops) if at >= 0]
        assert short == (text[: min(found)] if found else text)


def test_a_text_ends_at_a_special_token_that_is_a_stop_string():
    plain = decoder()
    full = generate(plain, "the cat", max_new_tokens=70)[0]
    lm = with_special_token(plain, full[9])
    assert generate(lm, "the cat", max_new_tokens=70)[0] == full.replace(full[9], "")
    assert generate(lm, ["the cat"] * 2, max_new_tokens=70, stop=["never", full[9]])[0] == full[: full.index(full[9])]
    assert generate(lm, "the cat", max_new_tokens=70, stop=full[9], beam=2)[0].count(full[9]) == 0


def test_a_prompt_has_the_special_tokens_that_it_spells():
    lm = decoder()
    found = generate_tokens(lm, [[1, *lm.tokenizer.encode("the cat"), 2]], max_new_tokens=9)[0]
    assert generate(lm, "<s>the cat</s>", max_new_tokens=9) == [lm.tokenizer.decode(found)]


def test_long_texts_come_in_pieces_without_a_seam():
    lm = decoder()
    whole = generate_tokens(lm, ids(lm), max_new_tokens=70)
    looked = []
    pieces = generate_tokens(
        lm, ids(lm), max_new_tokens=70, finished=lambda i, tokens: bool(looked.append((i, len(tokens))))
    )
    assert pieces == whole
    assert {n for _, n in looked} == {32, 64, 70}


def test_learned_positions_go_on_from_the_last_half_of_the_context():
    lm = decoder(positions="learned", max_positions=16)
    found = generate_tokens(lm, ids(lm), max_new_tokens=40)
    for prompt, tokens in zip(ids(lm), found, strict=True):
        wanted: list[int] = []
        while len(wanted) < 40:
            seen = prompt + wanted
            seen = seen if len(seen) < 16 else seen[-8:]
            wanted += greedy_by_full_forward(lm, seen, min(16 - len(seen), 40 - len(wanted)))
        assert tokens == wanted


@pytest.mark.parametrize("make", [decoder, pytest.param(lstm, marks=pytest.mark.slow)])
def test_one_beam_is_greedy_and_more_beams_do_not_score_less(make):
    lm = make()
    greedy = generate_tokens(lm, ids(lm), max_new_tokens=20)
    assert beam_tokens(lm, ids(lm), max_new_tokens=20, beam=1) == greedy
    wide = beam_tokens(lm, ids(lm), max_new_tokens=20, beam=6)
    assert wide != greedy
    scores = [sum(map(partial(total_logp, lm), ids(lm), found)) for found in (greedy, wide)]
    assert scores[1] > scores[0]


@pytest.mark.parametrize("make", [decoder, pytest.param(lstm, marks=pytest.mark.slow)])
def test_beams_of_long_texts_go_on_without_those_of_short_ones(make):
    lm, settings = make(), PLAIN.replace(max_length=52, num_beams=3)  # so the prompts have room for 1 to 51 tokens
    together = beam_tokens(lm, ids(lm), settings)
    assert min(map(len, together)) < 32 < max(map(len, together))
    assert beam_tokens(lm, ids(lm)[:1], settings) == together[:1]


def test_nothing_asked_and_nothing_to_go_on():
    lm = decoder()
    assert generate(lm, []) == []
    assert generate(lm, PROMPTS, max_new_tokens=0) == [""] * 4
    assert len(generate(lm, ["", *PROMPTS[1:]], max_new_tokens=20)) == 4


@pytest.mark.parametrize(
    "options, named",
    [
        ({"max_new_tokens": -1}, "max_new_tokens"), ({"stop": [""]}, "stop"), ({"beam": 0}, "beam"),
        ({"beam": 2, "temperature": 1.0}, "beam"), ({"temperature": -1.0}, "temperature"), ({"top_p": 2.0}, "top_p"),
    ],
)  # fmt: skip
def test_mistakes_are_named(options, named):
    with pytest.raises(UserError, match=named):
        generate(decoder(), ["a"], **options)


def test_the_settings_of_the_model_are_the_defaults():
    lm = decoder()
    longer = generate(lm, PROMPTS, max_new_tokens=70)
    stop = longer[0][5:7]
    own = replace(lm, generation=PLAIN.replace(max_new_tokens=70, stop_strings=(stop,), no_repeat_ngram_size=0))
    assert generate(own, PROMPTS) == generate(lm, PROMPTS, max_new_tokens=70, stop=stop)
    assert generate(own, PROMPTS, stop=()) == longer
    total = replace(lm, generation=PLAIN.replace(max_length=70))  # the prompt included
    tokens = zip(ids(lm), generate_tokens(lm, ids(lm), max_new_tokens=70), strict=True)
    assert generate(total, PROMPTS) == [lm.tokenizer.decode(found[: 70 - len(prompt)]) for prompt, found in tokens]
    refused = replace(lm, generation=PLAIN.replace(others={"penalty_alpha": 0.6}))
    with pytest.raises(UserError, match="penalty_alpha"):
        generate(refused, ["a"])
    both = replace(lm, generation=PLAIN.replace(do_sample=True, num_beams=2))
    with pytest.raises(UserError, match="beam"):
        generate(both, ["a"])
    assert generate(both, ["a"], temperature=0.0, beam=1, max_new_tokens=0) == [""]


def test_a_conversation_is_what_the_chat_template_makes_of_it():
    lm, template = decoder(), "{% for message in messages %}{{ message.content }}{% endfor %}<s>"
    tokenizer = Tokenizer(lm.tokenizer.backend, lm.tokenizer.config | {"chat_template": template})
    chat = [{"role": "system", "content": "the "}, {"role": "user", "content": "cat"}]
    wanted = generate_tokens(lm, [[*lm.tokenizer.encode("the cat"), lm.tokenizer.bos_id]], max_new_tokens=9)
    said = generate(replace(lm, tokenizer=tokenizer), chat, max_new_tokens=9)
    assert said == [lm.tokenizer.decode(wanted[0])]
    assert generate(replace(lm, tokenizer=tokenizer), [chat, chat], max_new_tokens=9) == said * 2
    with pytest.raises(UserError, match="no chat template"):
        generate(lm, chat)


def test_the_wrong_kind_of_model_is_named():
    with pytest.raises(UserError, match="17 tokens, and the model reads 16"):
        generate(with_config(decoder(), positions="learned", max_positions=16), ["abc"], beam=2, max_new_tokens=14)
    with pytest.raises(UserError, match="translate"):
        generate(replace(decoder(), config=nn.preset("tiny")), ["a"])
    with pytest.raises(UserError, match="tokenizer"):
        generate(replace(decoder(), tokenizer=None), ["a"])


def test_shapes_are_few_and_rows_keep_their_place():
    assert [bucket(n) for n in (0, 16, 17, 25, 33, 49, 65, 97)] == [16, 16, 24, 32, 48, 64, 96, 128]
    np.testing.assert_array_equal(pad_rows([[5, 6], [], [7]], (4, 3), 0), [[5, 6, 0], [0] * 3, [7, 0, 0], [0] * 3])
    np.testing.assert_array_equal(pad_rows([[5, 6]], (1, 3), 9, left=True), [[9, 5, 6]])
    assert batches_by_length([3, 9, 9, 1], 2) == [[1, 2], [0, 3]]


# --- transformers


def test_transformers_continues_alike(tmp_path):
    """Greedy and beam, ragged prompts, against a random Llama with large weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.6, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    config, params, _, _ = read_model(tmp_path)
    ours = Handle(config, nn.abstract(config)[0], params, None)
    rng = np.random.default_rng(0)
    prompts = [[1, *rng.integers(3, 50, n).tolist()] for n in (3, 8, 1)]
    for beam, length_penalty in ((1, 1.0), (4, 0.5)):
        if beam == 1:
            found = generate_tokens(ours, prompts, max_new_tokens=20)
        else:
            found = beam_tokens(ours, prompts, max_new_tokens=20, beam=beam, length_penalty=length_penalty)
        for prompt, tokens in zip(prompts, found, strict=True):
            said = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=20, num_beams=beam, length_penalty=length_penalty,
                do_sample=False, early_stopping=False,
            )[0, len(prompt) :].tolist()  # fmt: skip
            assert tokens == (said[: said.index(2)] if 2 in said else said)
