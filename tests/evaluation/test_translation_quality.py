"""Scores against sacreBLEU's own functions and hand-made cases; the signature says what was done."""

from __future__ import annotations

import pytest
import sacrebleu

from jaxlm.data.sources.types import Bitext
from jaxlm.evaluation.translation_quality import bleu, translate_corpus
from jaxlm.inference.translation import translate
from tests.inference.models import seq2seq

REFERENCES = ["Ein Mann mit einem Hut steht am See.", "Zwei Hunde spielen im Schnee.", "Eine Frau liest ein Buch."]


def test_scores_are_sacrebleus_and_signed():
    hypotheses = ["Ein mann mit einem Hut sitzt am See.", "Zwei Hunde spielen im schnee .", "Eine Frau liest Bücher."]
    found = bleu(hypotheses, REFERENCES)
    assert found["bleu"] == sacrebleu.corpus_bleu(hypotheses, [REFERENCES]).score
    assert found["bleu_lowercase"] == sacrebleu.corpus_bleu(hypotheses, [REFERENCES], lowercase=True).score
    assert found["chrf"] == sacrebleu.corpus_chrf(hypotheses, [REFERENCES]).score
    assert 0 < found["bleu"] < found["bleu_lowercase"] < 100
    assert "case:mixed|eff:no|tok:13a" in found["signature"]
    assert "case:lc|eff:no|tok:13a" in found["signature_lowercase"]
    assert "nc:6|nw:0" in found["signature_chrf"]


def test_the_truth_scores_a_hundred():
    found = bleu(REFERENCES, REFERENCES)
    assert found["bleu"] == pytest.approx(100) and found["chrf"] == pytest.approx(100)


def test_a_corpus_is_translated_in_order_up_to_the_count():
    lm = seq2seq()
    source = Bitext("bitext:a,b", ["a cat", "on the mat", "it"], ["x", "y", "z"])
    found, references = translate_corpus(lm, source, sentences=2, beam=2, max_length=8)
    assert found == translate(lm, source.src[:2], beam=2, max_length=8)
    assert references == ["x", "y"]
    assert len(translate_corpus(lm, source, beam=2, max_length=8)[0]) == 3
