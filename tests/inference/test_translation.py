"""Translation: against full forward passes, against each sentence alone, and against transformers' Marian."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxlm import nn
from jaxlm.core.errors import UserError
from jaxlm.core.tree import flatten, unflatten
from jaxlm.inference import beam
from jaxlm.inference.beam import BeamScorer, finish_search, search_seq2seq
from jaxlm.inference.generation_config import PLAIN
from jaxlm.inference.logits_processors import LogitsProcessors
from jaxlm.inference.translation import encode_sources, translate, translate_tokens
from tests.inference.models import NEVER, Handle, decoder, greedy_by_full_forward, seq2seq, total_logp, with_config

SENTENCES = ["the cat sat.", "a", "what is it that you said to the other one of them.", "on and on and on"]


def test_greedy_translation_is_what_full_forward_passes_say():
    lm = seq2seq()
    sources = encode_sources(lm, SENTENCES)
    found, scores = translate_tokens(lm, sources, beam=1, max_length=24)
    assert len({tuple(tokens) for tokens in found}) > 1
    for source, tokens, score in zip(sources, found, scores, strict=True):
        limit = 24
        wanted = greedy_by_full_forward(lm, [lm.config.bos_id], limit, source)
        assert tokens == wanted
        said = tokens if len(tokens) == limit else [*tokens, lm.config.eos_id]
        assert score == pytest.approx(total_logp(lm, [lm.config.bos_id], said, source) / len(said), abs=1e-4)


def test_batch_mates_and_order_change_nothing():
    lm = seq2seq()
    together = translate(lm, SENTENCES, beam=3, max_length=24)
    assert together == translate(lm, SENTENCES, beam=3, max_length=24, batch_size=3)
    assert together[::-1] == translate(lm, SENTENCES[::-1], beam=3, max_length=24)
    assert len(set(together)) > 1


@pytest.mark.parametrize("kv_cache", ["full", pytest.param("int4", marks=pytest.mark.slow)])
def test_the_sentences_that_are_still_open_go_on_among_themselves(kv_cache, monkeypatch):
    """Most texts end before the loop stops for the first time, and some before it stops again. The reference is a loop
    that does not stop."""
    lm = seq2seq(eos_id=NEVER, kv_cache=kv_cache, decoder_layers=1)
    limits = [20, 130, 32, 60, 33, 7, 120, 32, 9]
    sources = [[3 + i, 5, 6 + i, 2] for i in range(len(limits))]
    limit_B, batch = np.array(limits, np.int32), len(limits)
    processors = LogitsProcessors(np.array([NEVER]), limit_B, min_new_tokens_B=np.ones(batch, np.int32))
    first_B, scorer = np.full(batch, lm.config.bos_id, np.int32), BeamScorer()
    arguments = lm.graphdef, lm.params, np.array(sources, np.int32), first_B, processors, scorer
    state = search_seq2seq(*arguments, beams=3, size=132)
    assert [bool(x) for x in state.active_B] == [limit > 32 for limit in limits]
    found = finish_search(lm.graphdef, lm.params, state, processors, scorer)
    monkeypatch.setattr(beam, "_cache_sizes", lambda size: [size])
    graphdef, *arrays = arguments
    whole = jax.jit(lambda *arrays: search_seq2seq.__wrapped__(graphdef, *arrays, beams=3, size=132))(*arrays)
    assert not whole.active_B.any()
    assert found.length.tolist() == [[limit] * 3 for limit in limits]
    np.testing.assert_array_equal(found.tokens, whole.finished.tokens)
    np.testing.assert_allclose(found.score, whole.finished.score, rtol=1e-5 if kv_cache == "full" else 1e-2)


def test_blank_sentences_stay_blank_and_length_is_bounded():
    lm = with_config(seq2seq(), eos_id=NEVER)
    found = translate(lm, ["", "abc", "  "], beam=2, max_length=7)
    assert found[0] == found[2] == ""
    tokens, _ = translate_tokens(lm, [[5, 6, 2]], beam=2, max_length=7)
    assert len(tokens[0]) == 7
    assert translate(lm, []) == []
    done = []
    translate(lm, ["abc", "b"], beam=2, max_length=7, batch_size=1, progress=done.append)
    assert done == [1, 2]


def test_who_asks_for_a_length_gets_it(caplog):
    """The bound by the length of the source is for those who do not ask, and they are told."""
    lm, source = with_config(seq2seq(), eos_id=NEVER), [[5, 2]]
    for generation, option, length in (
        (PLAIN, 40, 40), (PLAIN.replace(max_new_tokens=40), None, 40), (PLAIN.replace(max_length=41), None, 40),
        (PLAIN, None, 14), (PLAIN.replace(min_new_tokens=20), None, 20),
    ):
        (tokens,), _ = translate_tokens(lm, source, generation, beam=1, max_length=option)
        assert len(tokens) == length
        said = "1 of 1 translations were cut off at 2 x source + 10 tokens" in caplog.text
        assert said == (length < 40), caplog.text
        caplog.clear()


def test_mistakes_are_named():
    lm = seq2seq()
    with pytest.raises(UserError, match="generate"):
        translate(decoder(), ["a"])
    with pytest.raises(UserError, match="tokenizer"):
        translate(replace(lm, tokenizer=None), ["a"])
    with pytest.raises(UserError, match="beam"):
        translate(lm, ["a"], beam=0)
    with pytest.raises(UserError, match="sentence 2 has 20 tokens"):
        translate(with_config(lm, positions="learned", max_positions=16), ["a", "b" * 19])


# --- transformers

_BLOCK = {
    "attn": "self_attn", "cross": "encoder_attn", "attn_norm": "self_attn_layer_norm",
    "cross_norm": "encoder_attn_layer_norm", "mlp_norm": "final_layer_norm", "up": "fc1", "down": "fc2", "q": "q_proj",
    "k": "k_proj", "v": "v_proj", "o": "out_proj", "kernel": "weight", "scale": "weight",
}  # fmt: skip


def marian(seed: int):
    """A random Marian of transformers with large weights, and the same model here."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    theirs = transformers.MarianMTModel(transformers.MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, activation_function="relu",
        scale_embedding=True, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=None, init_std=0.6,
    )).eval()  # fmt: skip
    config = nn.Seq2SeqConfig(
        vocab_size=40, width=16, heads=2, ffn=24, encoder_layers=1, decoder_layers=2, norm="layernorm",
        norm_position="post", activation="relu", positions="sinusoidal", embed_scale=True, qkv_bias=True,
        out_bias=True, mlp_bias=True,
    )  # fmt: skip
    graphdef, like = nn.abstract(config)
    weights = {name: value.numpy() for name, value in theirs.state_dict().items()}

    def of(path: str, shape) -> np.ndarray:
        if path == "embed/table":
            return weights["model.shared.weight"]
        side, _, _, *rest = path.split("/")
        name = ".".join(_BLOCK.get(part, part) for part in rest if part != "mlp")
        layers = [weights[f"model.{side}.layers.{i}.{name}"] for i in range(shape[0])]
        return np.stack([layer.T if path.endswith("kernel") else layer for layer in layers])

    params = unflatten(like, {path: of(path, leaf.shape) for path, leaf in flatten(like).items()})
    return theirs, Handle(config, graphdef, jax.tree.map(jax.numpy.asarray, params), None)


@pytest.mark.parametrize("beam, length_penalty", [(1, 1.0), (4, 1.0), (5, 0.3)])
def test_transformers_finds_the_same_translations(beam, length_penalty):
    torch = pytest.importorskip("torch")
    GenerationConfig = pytest.importorskip("transformers").GenerationConfig

    theirs, lm = marian(seed=beam)
    rng = np.random.default_rng(0)
    sources = [[*rng.integers(3, 40, n).tolist(), 2] for n in (9, 4, 6, 1, 12, 3, 7, 7)]
    found, scores = translate_tokens(lm, sources, beam=beam, length_penalty=length_penalty, max_length=12)
    for source, tokens, score in zip(sources, found, scores, strict=True):
        with torch.no_grad():
            wanted = theirs.generate(torch.tensor([source]), generation_config=GenerationConfig(
                num_beams=beam, length_penalty=length_penalty, max_new_tokens=12, early_stopping=False, do_sample=False,
                return_dict_in_generate=True, output_scores=True, pad_token_id=0, eos_token_id=2,
                decoder_start_token_id=1,
            ))  # fmt: skip
        ids = wanted.sequences[0, 1:].tolist()
        assert tokens == (ids[: ids.index(2)] if 2 in ids else ids)
        if beam > 1:
            assert score == pytest.approx(float(wanted.sequences_scores[0]), abs=1e-4)
