"""Sentences through an encoder-decoder: sorted by length, batched, beam search."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.inference.batching import batches_by_length, bucket, pad_rows, power_of_two
from jaxlm.inference.beam import Hypothesis, State, Stopping, finish, search_seq2seq
from jaxlm.inference.generation_config import PLAIN, GenerationConfig
from jaxlm.inference.logits_processors import LogitsProcessors, make_logits_processors

_BEAM, _LENGTH = 5, 128  # where nothing says how many


def translate_tokens(
    lm,
    sources: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[list[int]], np.ndarray]:
    """The best translation of each row, and its score: the first that ``search_translations`` finds."""
    found = search_translations(
        lm, sources, generation, beam=beam, length_penalty=length_penalty, max_length=max_length, batch_size=batch_size,
        progress=progress,
    )
    return [best.tokens for best, *_ in found], np.array([best.score for best, *_ in found], np.float32)


def search_translations(
    lm,
    sources: Sequence[Sequence[int]],
    generation: GenerationConfig = PLAIN,
    *,
    beam: int | None = None,
    length_penalty: float | None = None,
    max_length: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[list[Hypothesis]]:
    """Translations of token rows that end with the end token: those that a beam finds of each, best first, at most as
    many as the beam is wide. They do not have the end token.

    The options take the place of what ``generation`` says. A translation has at most ``max_length`` tokens, the end
    token included; where that is not given, as many as ``generation`` allows (128, if it does not say) and at most
    ``2 * len(source) + 10``. ``progress`` is called with the number of sentences done so far.
    """
    config, generation = lm.config, beam_settings(generation, beam, length_penalty)
    start = decoder_start_token(config, generation)
    allowed = max_length or min(generation.limits([1], _LENGTH))
    if config.positions == "learned":
        allowed = min(allowed, config.max_positions)
    stopping = Stopping.of(generation)
    least = max(generation.min_new_tokens, generation.min_length)

    def limit(length: int) -> int:
        return allowed if max_length else min(allowed, max(2 * length + 10, least))

    out: list[list[Hypothesis]] = [[] for _ in sources]
    done = 0

    def read(rows: list[int], state: State, rules: LogitsProcessors) -> None:
        nonlocal done
        found = finish(lm.graphdef, lm.params, state, rules, stopping)
        for i, hypotheses in zip(rows, found.ranked(rules), strict=False):
            out[i] = hypotheses
        done += len(rows)
        if progress is not None:
            progress(done)

    running: deque[tuple[list[int], State, LogitsProcessors]] = deque()  # the next batch is under way before one is read
    for rows in batches_by_length([len(source) for source in sources], batch_size):
        length = bucket(len(sources[rows[0]]))
        batch = power_of_two(len(rows))
        src_BxS = pad_rows([sources[i] for i in rows], (batch, length), config.pad_id)
        first_B = np.full(batch, start, np.int32)
        rules = make_logits_processors(
            generation, config, [1] * len(rows), [limit(len(sources[i])) for i in rows], first_B[:, None],
            np.zeros(batch, np.int32),
        )
        state = search_seq2seq(
            lm.graphdef, lm.params, src_BxS, first_B, rules, stopping, beams=generation.num_beams,
            size=bucket(limit(length)),
        )
        running.append((rows, state, rules))
        if len(running) > 1:
            read(*running.popleft())
    for batch in running:
        read(*batch)
    return out


def decoder_start_token(config, generation: GenerationConfig) -> int:
    """What the decoder reads first."""
    return config.bos_id if generation.decoder_start_token_id is None else generation.decoder_start_token_id


def beam_settings(
    generation: GenerationConfig, beam: int | None = None, length_penalty: float | None = None
) -> GenerationConfig:
    """The settings of a search for translations, with ``num_beams`` told. UserError where they ask for something else
    or what is not supported."""
    generation = generation.given(beam=beam, length_penalty=length_penalty)
    generation.check()
    for name in ("do_sample", "stop_strings"):
        if value := getattr(generation, name):
            raise UserError(f"{name} = {value!r}, as the model's generation_config.json has it, is not for translation")
    return generation.replace(num_beams=generation.num_beams or _BEAM)


def encode_sources(lm, sentences: Sequence[str], language: str | None = None) -> list[list[int]]:
    """What the encoder reads; UserError where a sentence does not fit a model with learned positions, or the model has
    no such language."""
    rows = lm.tokenizer.encode_source(sentences, language)
    if lm.config.positions == "learned":
        for number, row in enumerate(rows, 1):
            if len(row) > lm.config.max_positions:
                raise UserError(
                    f"sentence {number} has {len(row)} tokens and the model reads {lm.config.max_positions}: split it"
                )
    return rows


def target_language(lm, language: str | None = None) -> str | None:
    """The language to translate into, as given, or as generation_config.json or tokenizer_config.json has it; None
    where nothing says so."""
    tokenizer, generation = lm.tokenizer, lm.generation
    said = generation.forced_bos_token_id
    if tokenizer.languages.decoder_starts_with_code:
        said = decoder_start_token(lm.config, generation)
    codes = {index: code for code, index in tokenizer.languages.items()}
    return language or codes.get(said) or tokenizer.languages.default_target


def generation_for_language(lm, language: str | None = None) -> GenerationConfig:
    """The model's settings for translations into a language: the token that they start with or say first. UserError
    for a language that the model lacks, and where it has several and nothing says which."""
    tokenizer, language = lm.tokenizer, target_language(lm, language)
    if language is None and not tokenizer.languages:
        return lm.generation
    code = tokenizer.languages.id_of(language)
    if tokenizer.languages.decoder_starts_with_code:
        return lm.generation.replace(decoder_start_token_id=code)
    return lm.generation.replace(forced_bos_token_id=code)


def translate(
    lm,
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
    """One translation a sentence, in order; a blank sentence gives an empty one.

    Languages are codes of the tokenizer (``lm.tokenizer.languages``), for models with many; those that are not given
    are what tokenizer_config.json or generation_config.json says. Other options that are not given are those of
    ``lm.generation``, what generation_config.json says; where it says nothing, a beam of 5. ``beam`` 1 is greedy. See
    ``translate_tokens``. Other settings are changed there: ``lm.replace(generation=...)``.

    ``lm`` has ``config``, ``graphdef``, ``params``, ``tokenizer`` and ``generation``. UserError on options that mean
    nothing, and on a setting of the model's that is not supported.
    """
    sentences = [sentences] if isinstance(sentences, str) else list(sentences)
    if lm.config.kind != "seq2seq":
        raise UserError("this is a language model, not a translation model: use generate instead of translate")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    if min(1 if option is None else option for option in (beam, max_length, batch_size)) < 1:
        raise UserError("beam, max_length and batch_size must be at least 1")
    told = [i for i, sentence in enumerate(sentences) if sentence.strip()]
    sources = encode_sources(lm, sentences, source_language)
    found, _ = translate_tokens(
        lm, [sources[i] for i in told], generation_for_language(lm, target_language), beam=beam, length_penalty=length_penalty,
        max_length=max_length, batch_size=batch_size, progress=progress,
    )
    out = [""] * len(sentences)
    for i, tokens in zip(told, found, strict=True):
        out[i] = lm.tokenizer.decode(tokens)
    return out
