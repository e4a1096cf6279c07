"""``evaluate``: one model, one SPEC, every figure that fits the two."""

from __future__ import annotations

from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.core.progress import Progress
from jaxlm.data.config import FirstTokenOption, SpecialTokens
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Bitext, Dialogues
from jaxlm.evaluation.likelihood import bitext_perplexity, dialogue_perplexity, perplexity
from jaxlm.evaluation.speed import tokens_per_second
from jaxlm.inference.translation import beam_settings


def evaluate(
    lm,
    spec: str,
    *,
    context: int = 0,
    stride: int = 0,
    batch_size: int = 0,
    source_language: str | None = None,
    target_language: str | None = None,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    special_tokens: SpecialTokens = "text",
    prompt_special_tokens: SpecialTokens = "text",
    first_token: FirstTokenOption = "auto",
    sentences: int = 0,
    translations: bool = True,
    speed: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores a model on a SPEC (``jaxlm.data.sources.spec``; the test part of a builtin corpus).

    Args:
        lm: has ``config``, ``graphdef``, ``params`` and ``tokenizer``.
        spec: text or dialogues for a language model, ``bitext:`` or ``builtin:`` pairs for a translation model.
        context, stride: of the windows over text; see ``perplexity``.
        batch_size: rows at a time; 0 fits the vocabulary.
        source_language, target_language: of the pairs, for models with many; see ``translate``.
        beam, length_penalty, max_length: of the translations; see ``translate``.
        special_tokens, prompt_special_tokens: that the data spells; see ``open_source``.
        first_token: whether windows begin with what the tokenizer puts before a text; see ``open_source``.
        sentences: pairs to translate, the first ones; 0 is all. The loss is always over all.
        translations: False leaves out BLEU and chrF.
        speed: adds ``tokens_per_second`` of the forward pass.
        progress: called with what is going on, how much is done and how much there is.

    Returns:
        ``data``, the figures of ``perplexity``, and for pairs those of ``bleu`` with ``beam``, ``length_penalty`` and
        ``sentences``. Invented text is marked ``"synthetic": True`` with a ``note``. JSON-safe.
    """
    source = open_source(
        spec, "test", special_tokens=special_tokens, prompt_special_tokens=prompt_special_tokens,
        first_token=first_token,
    )
    pairs = isinstance(source, Bitext)
    if pairs != (lm.config.kind == "seq2seq"):
        wanted = "bitext:SRC,TGT or builtin:phrasebook" if not pairs else "text:, jsonl:, chat: or tokens:"
        raise UserError(f"{spec!r} does not fit a {lm.config.kind} model: give it {wanted}")

    languages = {"source_language": source_language, "target_language": target_language}
    out: dict[str, Any] = {"data": spec}
    if source.synthetic:
        out |= {"synthetic": True, "note": source.synthetic}
    if pairs:
        out |= bitext_perplexity(lm, source, batch_size=batch_size, progress=progress, **languages)
    elif isinstance(source, Dialogues):
        out |= dialogue_perplexity(lm, source, context=context, batch_size=batch_size, progress=progress)
    else:
        out |= perplexity(lm, source, context=context, stride=stride, batch_size=batch_size, progress=progress)
    if pairs and translations:
        from jaxlm.evaluation.translation_quality import bleu, translate_corpus  # sacrebleu, only where it is needed

        count = min(sentences, len(source.src)) or len(source.src)
        found = translate_corpus(
            lm, source, sentences=count, beam=beam, length_penalty=length_penalty, max_length=max_length,
            progress=None if progress is None else lambda done: progress("translating", done, count), **languages,
        )
        used = beam_settings(lm.generation, beam, length_penalty)
        out |= bleu(*found) | {"sentences": count, "beam": used.num_beams, "length_penalty": used.length_penalty}
    if speed:
        out["tokens_per_second"] = tokens_per_second({"": lm}, source, context=out.get("context", 0), **languages)[""]
    return out
