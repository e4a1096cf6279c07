"""Attention against transformers', attributions against finite differences and what they must add up to."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx

from jaxlm import nn
from jaxlm.evaluation import insight
from jaxlm.evaluation.insight import attention, attributions, inspect_tokens, score_tokens
from tests.inference.models import decoder, full_logits, handle

TOKENS = [5, 9, 12, 7, 7, 20, 3, 11]
SIZES = {"width": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
MODELS = {
    "sandwich": (
        nn.DecoderConfig(**SIZES, layers=2, windows=(3, 0), norm_position="sandwich", qk_norm="head"), (TOKENS,)
    ),
    "learned": (
        nn.DecoderConfig(**SIZES, layers=1, positions="learned", max_positions=12, norm="layernorm"), (TOKENS,)
    ),
    "seq2seq": (nn.Seq2SeqConfig(**SIZES, encoder_layers=1, decoder_layers=1), ([4, 8, 15, 16, 2], [1, 9, 7])),
}


SLOW = ("learned",)  # its embeddings are all that is different


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS], scope="module"
)
def case(request):
    config, inputs = MODELS[request.param]
    return handle(config, sharpen=1.5), inputs


def arrays(inputs):
    return tuple(np.array(row, np.int32) for row in inputs), tuple(np.int32(len(row)) for row in inputs)


def test_an_insight_adds_up_and_padding_has_no_part_in_it(case, monkeypatch):
    lm, inputs = case
    found = inspect_tokens(lm, inputs, steps=256)
    assert abs(found.total) > 0.05
    assert sum(float(each.sum()) for each in found.scores) == pytest.approx(found.total, rel=0.01, abs=1e-3)
    assert [len(each) for each in found.scores] == [len(row) for row in inputs]
    logits_V = full_logits(lm, inputs[-1], *inputs[:-1])[-1].astype(np.float64)
    p_V = np.exp(logits_V) / np.exp(logits_V).sum()
    assert found.token == found.next[0][0] == int(p_V.argmax())
    assert found.probability == found.next[0][1] == pytest.approx(float(p_V.max()), abs=1e-5)
    for weights in found.attention.values():
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)

    padded = insight._padded
    monkeypatch.setattr(insight, "_padded", lambda config, row: np.r_[row, padded(config, row)[len(row) :] + 5])
    again = inspect_tokens(lm, inputs, steps=256)
    for name, weights in found.attention.items():
        np.testing.assert_allclose(again.attention[name], weights, atol=1e-6)
    for a, b in zip(again.scores, found.scores, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_gradient_x_input_is_the_slope_of_scaling_a_token(case):
    """The derivative of the log-probability as one token's embedding grows in proportion."""
    lm, inputs = case
    tokens, lengths = arrays(inputs)
    scores, _ = attributions(lm.graphdef, lm.params, tokens, lengths, 6, method="gradient_x_input")
    model = nnx.merge(lm.graphdef, lm.params)
    embeddings = insight._embeddings(model, tokens)
    logp = jax.jit(lambda inputs: insight._last_logp(model, inputs, tokens, lengths)[6])
    for which, place in ((0, 1), (0, 3), (len(inputs) - 1, 2)):
        slope = 0.0
        for by, weight in ((1e-2, 8), (-1e-2, -8), (2e-2, -1), (-2e-2, 1)):
            grown = np.array(embeddings[which])
            grown[place] *= 1 + by
            slope += weight * float(logp((*embeddings[:which], grown, *embeddings[which + 1 :]))) / 0.12
        assert float(scores[which][place]) == pytest.approx(slope, rel=0.02, abs=2e-3)


@pytest.mark.parametrize("tokens_in_a_slice", [128, 3])
def test_scores_are_the_log_probabilities_of_the_full_forward_pass(monkeypatch, tokens_in_a_slice):
    monkeypatch.setattr(insight, "_SLICE", tokens_in_a_slice)
    lm = decoder()
    logits = full_logits(lm, TOKENS).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scored = score_tokens(lm, TOKENS, top=3)
    np.testing.assert_allclose(scored.logprobs, logp[np.arange(7), TOKENS[1:]], atol=1e-5)
    assert [each[0][0] for each in scored.top] == np.argmax(logp[:-1], -1).tolist()
    assert {len(each) for each in scored.top} == {3}
    assert score_tokens(lm, TOKENS[:1], top=3).logprobs == []


def test_attention_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import jaxlm

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.5, attn_implementation="eager",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "llama", attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor([TOKENS]), output_attentions=True).attentions
    lm = jaxlm.load(tmp_path / "llama")
    found = attention(lm.graphdef, lm.params, *arrays((TOKENS,)))["self"]
    np.testing.assert_allclose(found, np.concatenate([x.numpy() for x in wanted]), atol=1e-5)


def test_attention_of_a_translator_is_that_of_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import jaxlm

    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=2.0,
        decoder_start_token_id=0,
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    kind = transformers.T5ForConditionalGeneration
    theirs = kind.from_pretrained(tmp_path / "t5", attn_implementation="eager").eval()
    source, target = [4, 8, 15, 16, 1], [0, 9, 7]
    with torch.no_grad():
        out = theirs(
            input_ids=torch.tensor([source]), decoder_input_ids=torch.tensor([target]), output_attentions=True
        )
    lm = jaxlm.load(tmp_path / "t5")
    found = attention(lm.graphdef, lm.params, *arrays((source, target)))
    for name, wanted in (
        ("encoder", out.encoder_attentions), ("self", out.decoder_attentions), ("cross", out.cross_attentions)
    ):
        np.testing.assert_allclose(found[name], np.concatenate([x.numpy() for x in wanted]), atol=1e-5)
