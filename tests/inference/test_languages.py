"""Text to text with the tokenizers of translation models: what the encoder reads, and the language that comes out."""

from __future__ import annotations

import json

import pytest
from safetensors.numpy import save_file

import jaxlm
from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.inference.translation import generation_for_language, translate_tokens
from tests.data.tokenizers.pieces import ENGLISH, GERMAN, family
from tests.hf.families import families

# A tokenizer and its kind of model; the language of the source and of the translation.
MODELS = {
    "NllbTokenizer": ("m2m_100", "deu_Latn", "spa_Latn"),
    "M2M100Tokenizer": ("m2m_100", "de", "es"),
    "MBartTokenizer": ("mbart", "de_DE", "es_XX"),
    "MBart50Tokenizer": ("mbart", "de_DE", "es_XX"),
    "MarianTokenizer": ("marian", None, None),
    "T5Tokenizer": ("t5", None, None),
}


@pytest.fixture
def model(request, tmp_path):
    """(directory of a random model with the tokenizer, its name)."""
    name = request.param
    family(name, tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    golden = json.loads((families.GOLDEN / f"{MODELS[name][0]}.json").read_text())
    rows = tokenizer.vocab_size
    config = golden["config"] | {"vocab_size": rows, "pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eos_id}
    config |= {"decoder_start_token_id": tokenizer.pad_id if MODELS[name][1] is None else tokenizer.eos_id}
    config.pop("decoder_vocab_size", None)
    shapes = {
        key: [rows if size == families.VOCABULARY else size for size in shape]
        for key, shape in golden["tensors"].items()
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({
        name: config[name] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")
    } | {"max_length": 16, "num_beams": 2, "no_repeat_ngram_size": 2}))
    save_file(families.weights(shapes), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path, name


@pytest.mark.parametrize("model", MODELS, indirect=True)
def test_translations_are_those_of_transformers(model):
    torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")
    directory, name = model
    kind, source, target = MODELS[name]
    lm = jaxlm.load(directory)
    tokenizer = getattr(transformers, name).from_pretrained(directory)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    options = {}
    if target:
        tokenizer.src_lang = source
        option = "decoder_start_token_id" if name == "MBartTokenizer" else "forced_bos_token_id"
        options[option] = lm.tokenizer.languages.id_of(target)
    said = []
    for text in GERMAN[:3]:
        with torch.no_grad():
            rows = theirs.generate(**tokenizer([text], return_tensors="pt", return_token_type_ids=False), **options)
        said += tokenizer.batch_decode(rows, skip_special_tokens=True)
    assert lm.translate(GERMAN[:3], source_language=source, target_language=target) == said
    assert len(set(said)) > 1


@pytest.mark.parametrize("model", ["NllbTokenizer", "MBartTokenizer"], indirect=True)
def test_the_language_is_the_first_token_or_the_start(model):
    directory, name = model
    lm, (_, source, target) = jaxlm.load(directory), MODELS[name]
    code = lm.tokenizer.languages.id_of(target)
    settings = generation_for_language(lm, target)
    if name == "MBartTokenizer":
        assert settings.decoder_start_token_id == code and settings.forced_bos_token_id is None
    else:
        rows, _ = translate_tokens(lm, lm.tokenizer.encode_source(ENGLISH, source), settings)
        assert [row[0] for row in rows] == [code] * len(ENGLISH)
    default = lm.tokenizer.languages.default_target
    assert generation_for_language(lm) == generation_for_language(lm, default), "tokenizer_config.json says it"


@pytest.mark.parametrize("model", ["NllbTokenizer", pytest.param("MBartTokenizer", marks=pytest.mark.slow)],
                         indirect=True)
def test_translations_and_scores_are_of_the_language(model):
    directory, name = model
    lm, (_, source, target) = jaxlm.load(directory), MODELS[name]
    assert lm.translate(ENGLISH, target_language=target) == lm.translate(
        ENGLISH, source_language=source, target_language=target
    ), "the source too"
    with pytest.raises(UserError, match="'klingon'"):
        lm.translate("a", target_language="klingon")
    scores = lm.evaluate(_bitext(directory), target_language=target)
    assert scores["tokens"] == sum(map(len, lm.tokenizer.encode_target(GERMAN, target))) and scores["beam"] == 2


def _bitext(directory) -> str:
    for name, lines in (("en", ENGLISH), ("de", GERMAN)):
        (directory / name).write_text("\n".join(lines) + "\n")
    return f"bitext:{directory / 'en'},{directory / 'de'}"


@pytest.mark.parametrize("model", ["T5Tokenizer"], indirect=True)
def test_a_model_without_languages_takes_none(model):
    lm = jaxlm.load(model[0])
    assert lm.evaluate(_bitext(model[0]), translations=False)["tokens"] > 0, "its tokenizer has no begin token"
    for side in ("source_language", "target_language"):
        with pytest.raises(UserError, match="'de'"):
            lm.translate("a", **{side: "de"})
