"""lm-evaluation-harness over the server: its figures are those over the model itself."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("tenacity")
pytest.importorskip("aiohttp")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.openai_completions import LocalCompletionsAPI  # noqa: E402


def test_log_likelihoods_are_those_of_the_model_itself(server, lms, tmp_path):
    from jaxlm.evaluation.insight import score_tokens

    lm = lms["plain"]
    lm.tokenizer.save(tmp_path)
    api = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="plain", tokenizer=str(tmp_path), max_length=96, batch_size=1,
        num_concurrent=1, max_retries=1,
    )
    encode = lm.tokenizer.encode
    pairs = [("the cat", " on"), ("what is", " it")]
    requests = [(pair, encode(pair[0]), encode(pair[1])) for pair in pairs]
    found = api._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (total, greedy) in zip(requests, found, strict=True):
        scored = score_tokens(lm, [*context, *continuation], top=1)
        count = len(continuation)
        assert total == pytest.approx(sum(scored.logprobs[-count:]), abs=1e-4)
        assert greedy == all(
            best[0][0] == token for best, token in zip(scored.top[-count:], continuation, strict=True)
        )
    asked = Instance("generate_until", {}, ("the cat", {"until": ["z"], "max_gen_toks": 6, "temperature": 0}), 0)
    assert api.generate_until([asked], disable_tqdm=True) == [lm.generate("the cat", max_new_tokens=6, stop=["z"])[0]]
