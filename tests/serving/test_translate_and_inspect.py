"""/v1/translate beside the library's translate, and /v1/inspect beside its insight."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from jaxlm.evaluation.insight import inspect_tokens

SENTENCES = ["the cat", "", "on and on"]


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body, timeout=120)


def test_translations_are_those_of_the_library(server, lms):
    answer = post(server, "/v1/translate", model="words", text=SENTENCES, beam=2, max_length=8, alternatives=1).json()
    assert [each["text"] for each in answer["translations"]] == lms["words"].translate(SENTENCES, beam=2, max_length=8)
    for text, each in zip(SENTENCES, answer["translations"], strict=True):
        assert [other["text"] for other in each["alternatives"]] != [each["text"]]
        assert all(other["score"] <= each["score"] for other in each["alternatives"])
        assert (each["score"] is None) == (text == "")
    assert answer["usage"]["prompt_tokens"] == len("the cat") + len("on and on") + 2


def test_what_arrives_together_is_translated_together(server, models, lms):
    worker = next(served.worker for served in models if served.name == "words")
    sizes, search = [], worker._search
    worker._search = lambda settings, rows: sizes.append(len(rows)) or search(settings, rows)
    try:
        with ThreadPoolExecutor(4) as pool:
            ask = lambda text: post(server, "/v1/translate", model="words", text=text, beam=2, max_length=8)  # noqa: E731
            answers = list(pool.map(ask, ["a", "b", "c", "d"]))
    finally:
        del worker._search
    assert [each.json()["translations"][0]["text"] for each in answers] == lms["words"].translate(
        ["a", "b", "c", "d"], beam=2, max_length=8
    )
    assert sum(sizes) == 4


def test_a_mistake_in_a_translation_is_told(server):
    for body, said in (
        ({"target_language": "deu"}, "no languages"), ({"text": "a" * 3000}, "split it"), ({"beam": 99}, "beam"),
        ({"model": "tiny"}, "/v1/completions"),
    ):
        answer = post(server, "/v1/translate", **{"model": "words", "text": "a"} | body)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize("model", ["words", pytest.param("tiny", marks=pytest.mark.slow)])
def test_an_inspection_is_that_of_the_library(server, lms, model):
    body = {"model": model, "text": "the cat", "method": "gradient_x_input", "top": 3, "layer": 0}
    inputs = [lms[model].tokenizer.encode("the cat")]
    if model == "words":
        body["target"] = "on"
        config, tokenizer = lms[model].config, lms[model].tokenizer
        inputs = [tokenizer.encode_source(["the cat"])[0], [config.bos_id, *tokenizer.encode("on")]]
    found = post(server, "/v1/inspect", **body).json()
    wanted = inspect_tokens(lms[model], inputs, method="gradient_x_input", top=3)
    assert [each["id"] for each in found["next"]] == [i for i, _ in wanted.next]
    assert found["attribution"]["scores"] == pytest.approx(
        [float(x) for part in wanted.scores for x in part], abs=1e-4
    )
    for each in found["attention"]:
        weights = wanted.attention[each["kind"]][0]
        assert (len(each["rows"]), len(each["columns"])) == weights.shape[1:]
        assert each["weights"][0][-1] == pytest.approx(weights[0, -1].tolist(), abs=1e-4)


def test_what_cannot_be_inspected_is_told(server):
    for body, said in (
        ({"layer": 7}, "layer"), ({"token": 10**6}, "token"), ({"target": "a"}, "does not translate"),
        ({"text": "a" * 400}, "shorten it"),
    ):
        answer = post(server, "/v1/inspect", **{"model": "tiny", "text": "a"} | body)
        assert answer.status_code == 400 and said in answer.json()["error"]["message"], answer.text
