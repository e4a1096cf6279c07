"""POST /v1/translate: translates sentences."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from jaxlm.core.errors import UserError
from jaxlm.inference.translation import encode_sources
from jaxlm.model import LM
from jaxlm.serving.models import ServedModel
from jaxlm.serving.protocol.requests import TranslationRequest
from jaxlm.serving.protocol.responses import ScoredText, Translation, TranslationList, Usage
from jaxlm.serving.translation_worker import TranslationJob
from jaxlm.serving.worker import Caller

__all__ = ["encode_sentences", "source_tokens", "translate"]


def _sentences(body: TranslationRequest) -> list[str]:
    return [body.text] if isinstance(body.text, str) else body.text


async def encode_sentences(served: ServedModel, body: TranslationRequest) -> list[list[int]]:
    """The token ids of every sentence that is not blank, by a thread.

    Raises:
        UserError: when a sentence is too long or the model does not know the language.
    """
    sentences = [text for text in _sentences(body) if text.strip()]
    return await asyncio.to_thread(source_tokens, served.lm, sentences, body.source_language, served.context)


async def translate(
    served: ServedModel, body: TranslationRequest, rows: Sequence[Sequence[int]], caller: Caller
) -> TranslationList:
    """Translates the sentences of ``encode_sentences``.

    Raises:
        UserError: when the model does not know the language to translate into.
    """
    lm, texts = served.lm, _sentences(body)
    not_blank = [i for i, text in enumerate(texts) if text.strip()]
    beam = body.beam
    if body.alternatives:
        beam = max(beam or lm.generation.num_beams or 5, body.alternatives + 1)
    job = TranslationJob(rows, body.target_language, beam, body.length_penalty, body.max_length)
    found = await served.worker.translate(job, caller.client) if rows else []
    translations, written = [Translation(text="", score=None, alternatives=[]) for _ in texts], 0
    for i, hypotheses in zip(not_blank, found, strict=True):
        best, *others = (ScoredText(text=lm.tokenizer.decode(each.tokens), score=each.score) for each in hypotheses)
        alternatives = _different_texts(best, others)[: body.alternatives]
        translations[i] = Translation(text=best.text, score=best.score, alternatives=alternatives)
        written += len(hypotheses[0].tokens) + 1  # with the end token
    return TranslationList(
        model=served.name, translations=translations, usage=Usage.of(sum(map(len, rows)), written)
    )


def _different_texts(best: ScoredText, others: Sequence[ScoredText]) -> list[ScoredText]:
    """Without repetitions: different tokens may spell the same text."""
    seen, found = {best.text}, []
    for each in others:
        if each.text not in seen:
            found.append(each)
        seen.add(each.text)
    return found


def source_tokens(lm: LM, sentences: Sequence[str], language: str | None, limit: int) -> list[list[int]]:
    """The token ids that the encoder reads for each sentence.

    Raises:
        UserError: when a sentence has more than ``limit`` tokens.
    """
    rows = encode_sources(lm, sentences, language)
    for number, row in enumerate(rows, 1):
        if len(row) > limit:
            raise UserError(f"sentence {number} has {len(row)} tokens, and the most is {limit}: split it")
    return rows
