"""Translation by an encoder-decoder: sentences sorted by length, batched, and searched with a beam."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.inference.batching import batches_by_length, bucket, pad_rows, power_of_two
from jaxlm.inference.beam import BeamScorer, Hypothesis, finish_search, search_seq2seq
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.inference.logits_processors import make_logits_processors
from jaxlm.inference.protocol import InferenceModel
from jaxlm.nn.config import Seq2SeqConfig

__all__ = [
    "beam_settings", "decoder_start_token", "encode_sources", "generation_for_language", "search_translations",
    "target_language", "translate", "translate_tokens",
]

log = logging.getLogger(__name__)

_BEAM, _MAX_LENGTH = 5, 128  # where neither the caller nor the model says how many


def translate_tokens(
    lm: InferenceModel,
    sources: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[int]], np.ndarray]:
    """The best translation of each source, and its score (float32): the first that ``search_translations`` finds."""
    found = search_translations(
        lm, sources, generation, beam=beam, length_penalty=length_penalty, max_length=max_length, batch_size=batch_size,
        progress=progress,
    )
    return [best.tokens for best, *_ in found], np.array([best.score for best, *_ in found], np.float32)


def search_translations(
    lm: InferenceModel,
    sources: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[list[Hypothesis]]:
    """The translations that a beam search finds of each source, best first, without the end token.

    A source has no more translations than the search has beams. Options that are given replace what ``generation``
    says.

    Args:
        lm: a translation model; its tokenizer and its own generation settings are not used.
        sources: tokens, each row with its end token.
        generation: the settings; where they do not say how many beams, there are 5.
        beam: beams of the search.
        length_penalty: see ``jaxlm.inference.beam``.
        max_length: tokens of a translation at most, the end token included. Default: what ``generation`` allows; where
            it does not say, ``2 * len(source) + 10`` and at most 128. The log tells of translations that end there.
        batch_size: sources in a batch.
        progress: called with the number of sources that are done.

    Raises:
        UserError: when a setting is not supported, or not for translation.
    """
    generation = beam_settings(generation, beam, length_penalty)
    out: list[list[Hypothesis]] = [[] for _ in sources]
    done = cut = 0
    limit, default = _length_limit(lm.config, generation, max_length)
    for rows, found in _search_batches(lm, sources, generation, limit, batch_size):
        for i, hypotheses in zip(rows, found, strict=False):
            out[i] = hypotheses
            ends_itself = len(hypotheses[0].tokens) + bool(generation.forced_eos_token_id) < limit(len(sources[i]))
            cut += not ends_itself
        done += len(rows)
        if progress is not None:
            progress(done)
    if cut and default:
        log.warning("%d of %d translations were cut off at %s; %s", cut, len(sources), *default)
    return out


def _length_limit(
    config: Seq2SeqConfig, generation: GenerationConfig, max_length: int | None
) -> tuple[Callable[[int], int], tuple[str, str] | None]:
    """A function from the length of a source to the most tokens that its translation may have; where nobody asked for
    that number, what it is and what to do."""
    asked = max_length or generation.max_new_tokens or generation.max_length
    allowed, most = max_length or min(generation.limits([1], _MAX_LENGTH)), config.position_limit
    if most is not None and allowed > most:
        return lambda length: most, (f"the {most} positions of the model", "split their sentences")
    if asked:
        return lambda length: allowed, None
    least = max(generation.min_new_tokens, generation.min_length)
    what = f"2 x source + 10 tokens, at most {_MAX_LENGTH}", "set max_length (--max-length) for longer ones"
    return lambda length: min(allowed, max(2 * length + 10, least)), what


def _search_batches(
    lm: InferenceModel, sources: Sequence[Sequence[int]], generation: GenerationConfig, limit: Callable[[int], int],
    batch_size: int,
) -> Iterator[tuple[list[int], list[list[Hypothesis]]]]:
    """Batches of sources (their indices) and what was found for each. The search of the next batch has been started
    before a batch is read, so the device does not wait."""
    config, scorer = lm.config, BeamScorer.of(generation)

    def start(rows: list[int]):
        length, batch = bucket(len(sources[rows[0]])), power_of_two(len(rows))
        src_BxS = pad_rows([sources[i] for i in rows], (batch, length), config.pad_id)
        first_B = np.full(batch, decoder_start_token(config, generation), np.int32)
        processors = make_logits_processors(
            generation, config, [1] * len(rows), [limit(len(sources[i])) for i in rows], first_B[:, None],
            np.zeros(batch, np.int32),
        )
        state = search_seq2seq(
            lm.graphdef, lm.params, src_BxS, first_B, processors, scorer, beams=generation.num_beams,
            size=bucket(limit(length)),
        )
        return rows, state, processors

    def finish(rows: list[int], state, processors):
        return rows, finish_search(lm.graphdef, lm.params, state, processors, scorer).ranked(processors)

    running = None
    for rows in batches_by_length([len(source) for source in sources], batch_size):
        started = start(rows)
        if running is not None:
            yield finish(*running)
        running = started
    if running is not None:
        yield finish(*running)


def decoder_start_token(config: Seq2SeqConfig, generation: GenerationConfig) -> int:
    """The token that the decoder reads first."""
    return config.bos_id if generation.decoder_start_token_id is None else generation.decoder_start_token_id


def beam_settings(
    generation: GenerationConfig, beam: int | None = None, length_penalty: float | None = None
) -> GenerationConfig:
    """The settings of a search for translations, with the number of beams filled in.

    Raises:
        UserError: when a setting is not supported, or not for translation.
    """
    generation = generation.given(beam=beam, length_penalty=length_penalty)
    generation.check()
    for name in ("do_sample", "stop_strings"):
        if value := getattr(generation, name):
            raise UserError(f"{name} = {value!r} in the model's generation_config.json is not for translation")
    return generation.replace(num_beams=generation.num_beams or _BEAM)


def encode_sources(lm: InferenceModel, sentences: Sequence[str], language: str | None = None) -> list[list[int]]:
    """The tokens of each sentence that the encoder reads.

    Raises:
        UserError: when a sentence does not fit a model with learned positions, or the model lacks the language.
    """
    rows = lm.tokenizer.encode_source(sentences, language)
    if (limit := lm.config.position_limit) is not None:
        for number, row in enumerate(rows, 1):
            if len(row) > limit:
                raise UserError(f"sentence {number} has {len(row)} tokens, and the model reads {limit}: split it")
    return rows


def target_language(lm: InferenceModel, language: str | None = None) -> str | None:
    """The language to translate into: the given one, or that of generation_config.json or tokenizer_config.json; None
    if none of them names one."""
    tokenizer, generation = lm.tokenizer, lm.generation
    token = generation.forced_bos_token_id
    if tokenizer.languages.decoder_starts_with_code:
        token = decoder_start_token(lm.config, generation)
    codes = {index: code for code, index in tokenizer.languages.items()}
    return language or codes.get(token) or tokenizer.languages.default_target


def generation_for_language(lm: InferenceModel, language: str | None = None) -> GenerationConfig:
    """The model's settings for translations into a language: its token comes first, or starts the decoder.

    Raises:
        UserError: when the model lacks the language, or has several and nothing says which.
    """
    tokenizer, language = lm.tokenizer, target_language(lm, language)
    if language is None and not tokenizer.languages:
        return lm.generation
    code = tokenizer.languages.id_of(language)
    if tokenizer.languages.decoder_starts_with_code:
        return lm.generation.replace(decoder_start_token_id=code)
    return lm.generation.replace(forced_bos_token_id=code)


def translate(
    lm: InferenceModel,
    sentences: str | Sequence[str],
    *,
    source_language: str | None = None,
    target_language: str | None = None,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The translation of each sentence, in order; a blank sentence gives an empty one.

    An option that is not given has the value of ``lm.generation``, which was read from generation_config.json; where
    that says nothing, the beam is 5. To change other settings, use ``lm.replace(generation=...)``.

    Args:
        lm: a translation model with a tokenizer.
        sentences: one sentence, or several.
        source_language: a code of ``lm.tokenizer.languages``, for models of many languages. Default: what
            tokenizer_config.json says.
        target_language: the same for the translations. Default: what generation_config.json or tokenizer_config.json
            says.
        beam: beams of the search; 1 is greedy.
        length_penalty: see ``jaxlm.inference.beam``.
        max_length: tokens of a translation at most; see ``search_translations``.
        batch_size: sentences in a batch.
        progress: called with the number of sentences that are done.

    Raises:
        UserError: when an option is outside its range, the model does not translate, lacks the language, or a setting
            of it is not supported.
    """
    sentences = [sentences] if isinstance(sentences, str) else list(sentences)
    if lm.config.kind != "seq2seq":
        raise UserError("this is a language model, not a translation model: use generate instead of translate")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    if min(1 if option is None else option for option in (beam, max_length, batch_size)) < 1:
        raise UserError("beam, max_length and batch_size must be at least 1")
    kept = [i for i, sentence in enumerate(sentences) if sentence.strip()]
    sources = encode_sources(lm, sentences, source_language)
    found, _ = translate_tokens(
        lm, [sources[i] for i in kept], generation_for_language(lm, target_language), beam=beam,
        length_penalty=length_penalty, max_length=max_length, batch_size=batch_size, progress=progress,
    )
    out = [""] * len(sentences)
    for i, tokens in zip(kept, found, strict=True):
        out[i] = lm.tokenizer.decode(tokens)
    return out
