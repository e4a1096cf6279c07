"""Text from a language model: continuations of texts and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxlm.core.errors import UserError
from jaxlm.inference.decoding import beam_tokens, generate_tokens
from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.inference.protocol import InferenceModel

if TYPE_CHECKING:
    from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["Conversation", "ending_at", "generate"]

Conversation = Sequence[Mapping[str, Any]]  # messages, each with a "role" and a "content"


def generate(
    lm: InferenceModel,
    prompts: str | Conversation | Sequence[str | Conversation],
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    stop: str | Sequence[str] | None = None,
    beam: int | None = None,
    length_penalty: float | None = None,
    batch_size: int = 16,
) -> list[str]:
    """The continuation of each prompt: the new text only.

    A prompt is a text, in which special tokens that it spells are recognised, or a conversation, which the chat
    template of the tokenizer turns into one and whose messages have no special tokens:
    ``[{"role": "user", "content": "Hello"}]``. A continuation ends before the first of the ``stop`` strings, at an end
    token, or after ``max_new_tokens``.

    An option that is not given has the value of ``lm.generation``, which was read from generation_config.json; where
    that says nothing, there are 64 new tokens, chosen greedily. To change other settings, use
    ``lm.replace(generation=...)``.

    Args:
        lm: a language model with a tokenizer.
        prompts: one prompt, or several.
        max_new_tokens: tokens of a continuation at most.
        temperature: 0 is greedy; see ``Sampling`` for this and the next three.
        top_k: sample among this many most likely tokens.
        top_p: sample among the most likely tokens that together have this probability.
        min_p: sample among tokens at least this fraction as likely as the likeliest.
        seed: of the samples.
        stop: strings before which a text ends; they may be special tokens.
        beam: beams of a beam search; above 1 it takes the place of sampling.
        length_penalty: of the beam search; see ``jaxlm.inference.beam``.
        batch_size: prompts in a batch.

    Raises:
        UserError: when an option is outside its range, the model does not generate text, or a setting of the model is
            not supported.
    """
    one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], Mapping))
    prompts = [prompts] if one else list(prompts)
    _check(lm, max_new_tokens, temperature, beam)
    generation = lm.generation.given(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, beam=beam,
        length_penalty=length_penalty,
    )
    stop = generation.stop_strings if stop is None else [stop] if isinstance(stop, str) else list(stop)
    if "" in stop:
        raise UserError("an empty stop string would end every text at once: leave it out")
    searches = (generation.num_beams or 1) > 1
    if searches and generation.do_sample:
        raise UserError("beam search does not sample: give either beam or temperature")
    tokenizer, generation = lm.tokenizer, ending_at(lm, generation, stop)
    first = next((i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None), lm.config.bos_id)
    ids = [_encode(tokenizer, prompt) or [first] for prompt in prompts]
    heads = [tokenizer.decode(tokens) for tokens in ids]

    def text_of(i: int, tokens: list[int]) -> str:
        """The new text, decoded together with the prompt: some tokenizers drop the space before a first word."""
        whole = tokenizer.decode(ids[i] + tokens)
        return whole[len(heads[i]) :] if whole.startswith(heads[i]) else tokenizer.decode(tokens)

    if searches:
        found = beam_tokens(lm, ids, generation, batch_size=batch_size)
    else:
        found = generate_tokens(
            lm, ids, generation, seed=seed, batch_size=batch_size,
            finished=(lambda i, tokens: _first_stop(text_of(i, tokens), stop) >= 0) if stop else None,
        )
    texts = [text_of(i, tokens) for i, tokens in enumerate(found)]
    cuts = [_first_stop(text, stop) for text in texts]
    return [text if cut < 0 else text[:cut] for text, cut in zip(texts, cuts, strict=True)]


def ending_at(lm: InferenceModel, generation: GenerationConfig, stop: Sequence[str]) -> GenerationConfig:
    """The settings with the stop strings that are special tokens as end tokens too: decoded texts do not show them."""
    special = lm.tokenizer.backend.special_tokens
    stop_tokens = [special[text] for text in stop if text in special]
    if not stop_tokens:
        return generation
    ends = generation.eos_token_id or (lm.config.eos_id,)
    return replace(generation, eos_token_id=tuple(dict.fromkeys((*ends, *stop_tokens))))


def _first_stop(text: str, stop: Sequence[str]) -> int:
    """Where the earliest stop string begins; -1 if the text has none."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(found, default=-1)


def _encode(tokenizer: Tokenizer, prompt: str | Conversation) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer.encode_prompt(prompt)
    return tokenizer.encode_chat(prompt)


def _check(lm: InferenceModel, max_new_tokens: int | None, temperature: float | None, beam: int | None) -> None:
    if lm.config.kind == "seq2seq":
        raise UserError("this is a translation model: use translate instead of generate")
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    if max_new_tokens is not None and max_new_tokens < 0:
        raise UserError(f"max_new_tokens is {max_new_tokens}: give 0 or more")
    if temperature is not None and temperature < 0:
        raise UserError(f"temperature is {temperature}: give 0 (greedy) or more")
    if beam is not None and beam < 1:
        raise UserError(f"beam is {beam}: give 1 (no search) or more")
