"""The harness's model of us against its own model of transformers, and its command line on a task of our own."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxlm
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import write_model
from jaxlm.inference.decoding import generate_tokens
from jaxlm.nn.config import DecoderConfig, Seq2SeqConfig

pytest.importorskip("lm_eval", reason="lm_eval is not installed: there is nothing to plug into")

from lm_eval.api.registry import get_model  # noqa: E402

from jaxlm.harness import JaxLM  # noqa: E402
from tests.models import build

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = "the cat sat on the mat and the dog sat by the log while a bird sang to them all, so they say. "
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} /{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
PAIRS = [
    ("the cat sat on", " the mat"), ("the cat sat on ", "the log"), ("the cat", " sat"), ("the cat", " sang"),
    ("", "the dog sat"), (TEXT, " so they"), (TEXT * 3, " and the dog"), ("a bird", TEXT[:60]),
    ("<s>the cat", " sat on"),
]


def request(*args):
    return SimpleNamespace(args=args, task_name="")


@pytest.fixture(scope="module", params=["bare", "framed"])
def model(request, tmp_path_factory):
    """A small random Llama whose context is short; "framed" has a tokenizer that begins texts with <s>."""
    tokenizer = Tokenizer.train([TEXT], "bpe", 300)
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=32, heads=4, layers=2, ffn=48, max_positions=40, tie_embeddings=False
    )
    params = jax.tree.map(lambda x: jax.numpy.asarray(2 * np.asarray(x)), build(config)[1])
    path = write_model(tmp_path_factory.mktemp(request.param) / "model", config, params, tokenizer)
    if request.param == "framed":
        spec = json.loads((path / "tokenizer.json").read_text())
        bos = {"id": "<s>", "ids": [1], "tokens": ["<s>"]}
        frame = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        spec["post_processor"] = {
            "type": "TemplateProcessing", "single": frame, "pair": [*frame, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": bos},
        }
        (path / "tokenizer.json").write_text(json.dumps(spec))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def ours(model):
    return JaxLM(str(model), batch_size=4)


def theirs_of(path):
    pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    pytest.importorskip("accelerate", reason="accelerate is not installed: the harness's own model needs it")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def theirs(model):
    return theirs_of(model)


def agree(ours, theirs, pairs, texts):
    pairs, texts = [request(*pair) for pair in pairs], [request(text) for text in texts]
    found, expected = (each.loglikelihood(pairs, disable_tqdm=True) for each in (ours, theirs))
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in expected], rtol=1e-5, atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    found, expected = (each.loglikelihood_rolling(texts, disable_tqdm=True) for each in (ours, theirs))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def test_a_score_is_its_definition(ours):
    """Token by token, in float64."""
    (nats, greedy), *_ = ours.loglikelihood([request("the cat sat on", " the mat")], disable_tqdm=True)
    whole, context = ours.tok_encode("the cat sat on the mat"), ours.tok_encode("the cat sat on")
    logits = np.asarray(ours.lm(np.array([whole[:-1]])), np.float64)[0, len(context) - 1 :]
    targets = whole[len(context) :]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(nats, logp[np.arange(len(targets)), targets].sum(), rtol=1e-5)
    assert greedy == (logits.argmax(-1) == targets).all()


def test_what_greedy_decoding_says_is_greedy(ours):
    prompt = ours.tok_encode("the cat sat")
    (said,) = generate_tokens(ours.lm, [prompt], max_new_tokens=3)
    other = [*said[:-1], (said[-1] + 1) % 300]
    read = [(None, prompt, tokens) for tokens in (said, other)]
    (nats, greedy), (fewer, not_greedy) = ours._loglikelihood_tokens(read, disable_tqdm=True)
    assert greedy and not not_greedy and nats > fewer


def test_scores_are_those_of_the_harness_with_transformers(ours, theirs):
    greedy = theirs.generate_until([request("the cat sat", {"until": [], "max_gen_toks": 2})], disable_tqdm=True)[0]
    agree(ours, theirs, [*PAIRS, ("the cat sat", greedy)], ["the cat", TEXT, TEXT * 2, "a", "<s>the"])


def test_texts_are_those_of_the_harness_with_transformers(ours, theirs):
    plain = {"until": [], "max_gen_toks": 12, "do_sample": False}
    free = theirs.generate_until([request("the dog", plain)], disable_tqdm=True)[0]
    stop = free[len(free) // 2 :][:2]
    options = [plain, {"until": [stop], "max_gen_toks": 12}, {"until": stop, "max_new_tokens": 5, "temperature": 0.0}]
    requests = [request(text, each) for each in options for text in ("the dog", "the cat sat on the", TEXT * 2)]
    found, expected = (each.generate_until(requests, disable_tqdm=True) for each in (ours, theirs))
    assert found == expected
    assert stop in found[0] and stop not in found[3] and found[0].startswith(found[3])


def test_tokens_are_those_of_the_harness_with_transformers(ours, theirs):
    for text in ("the cat", "<s>the cat", "the</s> cat", " sat", "", "é"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)
    assert (ours.prefix_token_id, ours.eot_token_id) == (theirs.prefix_token_id, theirs.eot_token_id)
    assert ours.max_length == theirs.max_length == 40


def test_chats_are_those_of_the_harness_with_transformers(ours, theirs):
    user, begun = {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "the dog "}
    system = {"role": "system", "content": "sit"}
    for chat, prompt in [([user], True), ([user, begun], False), ([system, user], True), ([user, begun, user], True)]:
        assert ours.apply_chat_template(chat, prompt) == theirs.apply_chat_template(chat, prompt)
    assert ours.chat_template(True) == TEMPLATE and ours.chat_template(False) is None
    with pytest.raises(jaxlm.UserError, match="chat template 'tools' cannot be chosen"):
        ours.chat_template("tools")


def test_a_real_model_scores_as_with_transformers(shared):
    path = shared / "models" / "books-llama"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")
    theirs, ours = theirs_of(path), JaxLM(str(path), batch_size="auto", max_length=64)
    theirs._max_length = 64
    agree(ours, theirs, [*PAIRS[:5], ("Once upon a", " time")], [TEXT * 4, "It was a dark and stormy night."])
    greedy = {"until": ["."], "max_gen_toks": 16}
    requests = [request(text, greedy) for text in ("Once upon a time", "She looked at him and")]
    assert ours.generate_until(requests, disable_tqdm=True) == theirs.generate_until(requests, disable_tqdm=True)


def test_samples_differ_by_seed_alone(model):
    options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50}
    texts = [
        JaxLM(str(model), seed=seed).generate_until([request("the cat", options)], disable_tqdm=True)
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("model", ["bare"], indirect=True)
def test_what_cannot_be_is_said(model, ours, tmp_path):
    for options, message in [
        ({"num_beams": 3}, "num_beams is not an option of generation here"),
        ({"max_gen_toks": 40}, "40 new tokens leave no room in a model that reads 40"),
    ]:
        with pytest.raises(jaxlm.UserError, match=message):
            ours.generate_until([request("the cat", options)], disable_tqdm=True)
    with pytest.raises(jaxlm.UserError, match="a continuation of .* tokens cannot be scored by a model that reads 40"):
        ours.loglikelihood([request("the", TEXT * 3)], disable_tqdm=True)
    config = Seq2SeqConfig(vocab_size=300, width=16, heads=2, encoder_layers=1, decoder_layers=1)
    params = build(config)[1]
    path = write_model(tmp_path / "m", config, params, Tokenizer.train([TEXT], "bpe", 300))
    with pytest.raises(jaxlm.UserError, match="is a translation model"):
        JaxLM(str(path))


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path):
    """A directory with two tasks, one of which names us to lm_eval."""
    rows = [
        {"question": "the cat sat on the", "choices": [" mat", " say"], "answer": 0, "say": "mat"},
        {"question": "the dog sat by the", "choices": [" bird sang", " log"], "answer": 1, "say": "log"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\ndoc_to_text: '{{question}}'\n"
    )
    (tmp_path / "choice.yaml").write_text(
        f"task: our_choice\n{data}output_type: multiple_choice\ndoc_to_choice: '{{{{choices}}}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "say.yaml").write_text(
        f"task: our_say\n{data}output_type: generate_until\ndoc_to_target: '{{{{say}}}}'\n"
        "generation_kwargs: {until: ['.'], max_gen_toks: 6, do_sample: false}\nmetric_list: [{metric: exact_match}]\n"
        "metadata: {model: !function jaxlm.harness.JaxLM}\n"
    )
    return tmp_path


def results(out: Path):
    """(metrics, answers of the generating task) that lm_eval wrote."""
    (file,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_our_say_*.jsonl")
    found = json.loads(file.read_text())["results"]
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    return found["our_choice"]["acc,none"], found["our_say"]["exact_match,none"], answers


def expected(lm):
    pairs = [("the cat sat on the", " mat"), ("the cat sat on the", " say"), ("the dog sat by the", " bird sang"),
             ("the dog sat by the", " log")]
    a, b, c, d = (nats for nats, _ in lm.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True))
    options = {"until": ["."], "max_gen_toks": 6}
    prompts = [request(text, options) for text in ("the cat sat on the", "the dog sat by the")]
    return ((a > b) + (d > c)) / 2, 0.0, lm.generate_until(prompts, disable_tqdm=True)


def test_our_module_is_lm_eval_with_us(monkeypatch):
    called = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: called.append(get_model("jaxlm")))
    runpy.run_module("jaxlm.harness", run_name="__main__")
    assert called == [JaxLM] and get_model("dummy").__name__ == "DummyLM"  # and its own are still there


@pytest.mark.parametrize("model", ["bare"], indirect=True)
def test_the_plain_command_finds_us_through_a_file_of_tasks(ours, model, tasks, tmp_path):
    environment = os.environ | {
        "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "XLA_FLAGS": "",
    }
    words = [
        Path(sys.executable).with_name("lm_eval"), "--model", "jaxlm", "--model_args", f"path={model}",
        "--tasks", f"{tasks / 'say.yaml'},our_choice", "--include_path", tasks,
        "--output_path", tasks / "out", "--log_samples", "--batch_size", "4",
    ]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|our_choice|" in done.stdout.replace(" ", "")
    assert results(tasks / "out") == expected(ours)
