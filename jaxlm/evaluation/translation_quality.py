"""Translation quality by sacreBLEU (Post, arXiv:1804.08771), each score with the signature that says how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sacrebleu.metrics import BLEU, CHRF

from jaxlm.data.sources.types import Bitext
from jaxlm.inference.translation import translate


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """Corpus scores against one reference each, 0 to 100.

    ``bleu`` is cased with 13a tokenisation, ``bleu_lowercase`` the same in lower case, ``chrf`` is chrF2;
    ``signature``, ``signature_lowercase`` and ``signature_chrf`` belong to them.
    """
    out: dict[str, float | str] = {}
    for name, suffix, metric in (
        ("bleu", "", BLEU()),
        ("bleu_lowercase", "_lowercase", BLEU(lowercase=True)),
        ("chrf", "_chrf", CHRF()),
    ):
        out[name] = metric.corpus_score(list(hypotheses), [list(references)]).score
        out[f"signature{suffix}"] = str(metric.get_signature())
    return out


def translate_corpus(
    lm,
    source: Bitext,
    *,
    sentences: int = 0,
    **options: Any,
) -> tuple[list[str], list[str]]:
    """Translations and references of the first ``sentences`` pairs (0: all). Options as in ``translate``."""
    count = sentences or len(source.src)
    hypotheses = translate(lm, source.src[:count], **options)
    return hypotheses, list(source.tgt[:count])
