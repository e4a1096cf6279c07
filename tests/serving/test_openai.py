"""The server by OpenAI's own client: what it says is what the library says, in one piece and in many."""

from __future__ import annotations

import json

import numpy as np
import pytest

openai = pytest.importorskip("openai")

PROMPT = "the cat"


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_a_greedy_completion_is_what_generate_gives(client, lms):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    wanted = lms["tiny"].generate(PROMPT, max_new_tokens=12)[0]
    assert answer.choices[0].text == wanted
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (7, 12, 19)


def test_several_prompts_are_answered_in_order_whether_texts_or_tokens(client, lms):
    prompts = [PROMPT, "on and on"]
    ids = [lms["tiny"].tokenizer.encode(prompt) for prompt in prompts]
    wanted = lms["tiny"].generate(prompts, max_new_tokens=6)
    for given in (prompts, ids):
        answer = client.completions.create(model="tiny", prompt=given, max_tokens=6, temperature=0)
        assert [choice.text for choice in answer.choices] == wanted
        assert [choice.index for choice in answer.choices] == [0, 1]


def test_a_stream_adds_up_to_the_whole(client):
    options = dict(model="tiny", prompt=PROMPT, max_tokens=9, temperature=1, seed=3)
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert len(chunks) > 3
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_a_conversation_is_what_generate_makes_of_it(client, lms):
    messages = [{"role": "user", "content": "the cat"}]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    wanted = lms["tiny"].generate(messages, max_new_tokens=8)[0]
    assert answer.choices[0].message.content == wanted
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    stream = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_completion_tokens=8, temperature=0, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted
    assert all(chunk.choices for chunk in chunks)


def test_log_probabilities_of_an_echoed_prompt_are_those_of_the_model(client, lms):
    lm = lms["tiny"]
    ids = lm.tokenizer.encode(PROMPT)
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    found = answer.choices[0].logprobs
    logits = np.asarray(lm(np.array([ids])), np.float64)[0]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True
    )
    assert answer.choices[0].text == PROMPT and "".join(found.tokens) == PROMPT
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    np.testing.assert_allclose(found.token_logprobs[1:], logp[np.arange(6), ids[1:]], atol=1e-4)
    best = [lm.tokenizer.decode([i], skip_special=False) for i in logp[:-1].argmax(-1)]
    assert [max(top, key=top.get) for top in found.top_logprobs[1:]] == best
    assert found.text_offset == list(range(7))


def test_log_probabilities_of_an_answer_are_those_of_the_model(client, lms):
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "the cat"}], max_tokens=5, temperature=0, logprobs=True,
        top_logprobs=3,
    )
    content = answer.choices[0].logprobs.content
    assert "".join(each.token for each in content) == answer.choices[0].message.content
    for each in content:
        assert each.top_logprobs[0].token == each.token and each.top_logprobs[0].logprob == each.logprob
        assert len(each.top_logprobs) == 3 and bytes(each.bytes).decode() == each.token
    echoed = client.completions.create(
        model="tiny", prompt="the cat. " + answer.choices[0].message.content, max_tokens=0, echo=True, logprobs=0
    )
    assert echoed.choices[0].logprobs.token_logprobs[-5:] == pytest.approx(
        [each.logprob for each in content], abs=1e-3
    )


def test_a_schema_is_kept_to(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "properties": {"cat": {"enum": ["old", "young"]}}, "required": ["cat"],
        "additionalProperties": False,
    }
    described = {"type": "json_schema", "json_schema": {"name": "cat", "schema": schema}}
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "which?"}], max_tokens=60, temperature=0,
        response_format=described,
    )
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content)["cat"] in ("old", "young")
    with pytest.raises(openai.BadRequestError):
        client.completions.create(
            model="tiny", prompt="a", extra_body={"response_format": {
                "type": "json_schema", "json_schema": {"name": "no", "schema": {"type": "nothing"}}
            }},
        )


def test_choices_are_as_many_as_asked_for_and_seeds_repeat_them(client):
    options = dict(model="tiny", prompt=PROMPT, max_tokens=8, temperature=1, n=3)
    first, again, other = (client.completions.create(**options, seed=seed) for seed in (1, 1, 2))
    texts = [[choice.text for choice in answer.choices] for answer in (first, again, other)]
    assert texts[0] == texts[1] != texts[2] and len(set(texts[0])) > 1
    assert first.usage.completion_tokens == 24


def test_stops_penalties_and_biases_have_their_effect(client, lms):
    free = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0).choices[0]
    stopped = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, stop=free.text[4:6])
    assert stopped.choices[0].text == free.text[: free.text.index(free.text[4:6])]
    assert stopped.choices[0].finish_reason == "stop"
    token = lms["tiny"].tokenizer.encode("q")[0]
    biased = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(token): 5}
    )
    assert biased.choices[0].text == "qqqq"
    moved = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=4, temperature=0, logit_bias={str(token): 5}, presence_penalty=2,
        frequency_penalty=2, extra_body={"repetition_penalty": 100.0},
    )
    assert moved.choices[0].text != "qqqq"


def test_models_are_listed_and_told(client):
    listed = {model.id: model for model in client.models.list()}
    assert list(listed) == ["tiny", "plain", "words"]
    assert (listed["tiny"].chat, listed["plain"].chat) == (True, False)
    assert listed["words"].kind == "seq2seq"
    assert client.models.retrieve("tiny").context == 96


@pytest.mark.parametrize(("fields", "named"), [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"temperature": 3}, "temperature"),
    ({"max_tokens": 500}, "max_tokens"),
    ({"extra_body": {"mirostat": 2}}, "mirostat"),
    ({"top_logprobs": 2}, "top_logprobs"),
])
def test_what_is_not_understood_is_refused_by_name(client, fields, named):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}], **fields)
    assert caught.value.param == named and named in caught.value.body["message"]


def test_what_changes_nothing_is_taken(client):
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=1, user="me")


def test_mistakes_have_their_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="tiny, plain, words"):
        client.completions.create(model="large", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="/v1/translate"):
        client.completions.create(model="words", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="plain", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="does not know 'É'"):
        client.completions.create(model="tiny", prompt="É")
    with pytest.raises(openai.BadRequestError, match="96.*97"):
        client.completions.create(model="tiny", prompt="a" * 97)
