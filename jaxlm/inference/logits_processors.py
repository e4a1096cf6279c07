"""What may come next besides what the model finds likely: settings of ``GenerationConfig``, inside the compiled loop.

Scores, order and details are those of transformers' logits processors. A rule is an array, so its value is no part of
the program; a rule that is not set is None and no part of it either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxlm.core.errors import UserError
from jaxlm.inference.generation_config import FILE, GenerationConfig

__all__ = ["LogitsProcessors", "make_logits_processors"]

_NOTHING = -2  # matches no token


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitsProcessors:
    """Of a batch of B prompts. V is the vocabulary, also as the id of a token that the model does not have."""

    eos_E: Array  # int32, the tokens that end a text
    limit_B: Array  # int32, new tokens at most; 0: a row of padding
    prompt_BxP: Array | None = None  # int32, at the right edge; where a rule looks back
    start_B: Array | None = None  # int32, where each prompt begins
    repetition_penalty: Array | None = None  # float32
    ngram_size: Array | None = None  # int32
    bad_V: Array | None = None  # bool
    bad_WxL: Array | None = None  # int32, words of two tokens and more, at the right edge, the rest -1
    least_B: Array | None = None  # int32, new tokens before the end at least
    first_B: Array | None = None  # int32, the first new token, or -1
    last_V: Array | None = None  # bool, of which is the last token that there is room for
    suppressed_V: Array | None = None  # bool
    suppressed_first_V: Array | None = None  # bool, as the first token after a forced one
    renormalize: bool = field(default=False, metadata={"static": True})

    @property
    def active(self) -> bool:
        """Whether ``apply`` does anything."""
        rules = (self.prompt_BxP, self.bad_V, self.least_B, self.first_B, self.last_V, self.suppressed_V)
        return self.renormalize or any(rule is not None for rule in (*rules, self.suppressed_first_V))

    def take(self, rows_B: Array | np.ndarray) -> LogitsProcessors:
        """Those of some of the prompts."""
        names = ("limit_B", "prompt_BxP", "start_B", "least_B", "first_B")
        return replace(self, **jax.tree.map(lambda x: x[rows_B], {name: getattr(self, name) for name in names}))

    def ends(self, tokens: Array) -> Array:
        """Which tokens end their text: bool, of the same shape."""
        return (tokens[..., None] == self.eos_E).any(-1)

    def apply(self, scores_BxV: Array, tokens_BxN: Array, step: Array, before: Array | int = 0) -> Array:
        """Scores of the next token, -inf where it may not come: float32 ``[B, V]``.

        ``tokens`` holds ``step`` new ones, which came after ``before`` others that are now part of the prompt.
        """
        if not self.active:
            return scores_BxV
        vocabulary, number = scores_BxV.shape[1], before + step
        token_V = jnp.arange(vocabulary)
        if self.prompt_BxP is not None:
            scores_BxV = self._look_back(scores_BxV, tokens_BxN, step)
        if self.bad_V is not None:
            scores_BxV = jnp.where(self.bad_V, -jnp.inf, scores_BxV)
        if self.least_B is not None:
            early_B = number < self.least_B
            scores_BxV = jnp.where(early_B[:, None] & self.ends(token_V), -jnp.inf, scores_BxV)
        if self.first_B is not None:
            forced_BxV = jnp.where(token_V == self.first_B[:, None], 0.0, -jnp.inf)
            scores_BxV = jnp.where(((number == 0) & (self.first_B >= 0))[:, None], forced_BxV, scores_BxV)
        if self.last_V is not None:
            scores_BxV = jnp.where(
                (number == self.limit_B - 1)[:, None], jnp.where(self.last_V, 0.0, -jnp.inf), scores_BxV
            )
        if self.suppressed_V is not None:
            scores_BxV = jnp.where(self.suppressed_V, -jnp.inf, scores_BxV)
        if self.suppressed_first_V is not None:
            first_B = 0 if self.first_B is None else self.first_B >= 0
            now_B = jnp.broadcast_to(number == first_B, scores_BxV.shape[:1])
            scores_BxV = jnp.where(now_B[:, None] & self.suppressed_first_V, -jnp.inf, scores_BxV)
        return log_softmax(scores_BxV) if self.renormalize else scores_BxV

    def _look_back(self, scores_BxV: Array, tokens_BxN: Array, step: Array) -> Array:
        """The rules over what is there already: the prompt and the new tokens, H slots of which ``now`` are filled."""
        now, start_Bx1 = self.prompt_BxP.shape[1] + step, self.start_B[:, None]
        history_BxH = jnp.concatenate([self.prompt_BxP, tokens_BxN], axis=1)
        slot_H = jnp.arange(history_BxH.shape[1])
        real_BxH = (slot_H >= start_Bx1) & (slot_H < now)
        row_Bx1 = jnp.arange(scores_BxV.shape[0])[:, None]
        none_BxV = jnp.zeros(scores_BxV.shape, bool)
        if self.repetition_penalty is not None:
            seen_BxV = none_BxV.at[row_Bx1, history_BxH].max(real_BxH, mode="drop")
            penalty = self.repetition_penalty
            worse_BxV = jnp.where(scores_BxV < 0, scores_BxV * penalty, scores_BxV / penalty)
            scores_BxV = jnp.where(seen_BxV, worse_BxV, scores_BxV)
        if self.ngram_size is not None:

            def follows(back: Array, like_BxH: Array) -> Array:
                """Slots that also come after what is ``back + 1`` slots before the next token."""
                mine_B = lax.dynamic_index_in_dim(history_BxH, now - 1 - back, axis=1, keepdims=False)
                theirs_BxH = jnp.roll(history_BxH, back + 1, axis=1)
                there_BxH = (slot_H - 1 - back >= start_Bx1) & (now - 1 - back >= start_Bx1)
                return like_BxH & there_BxH & (theirs_BxH == mine_B[:, None])

            like_BxH = lax.fori_loop(0, self.ngram_size - 1, follows, real_BxH)
            repeats_BxV = none_BxV.at[row_Bx1, history_BxH].max(like_BxH, mode="drop")
            scores_BxV = jnp.where(repeats_BxV, -jnp.inf, scores_BxV)
        if self.bad_WxL is not None:
            length = self.bad_WxL.shape[1] - 1
            padded_BxH = jnp.pad(
                jnp.where(real_BxH, history_BxH, _NOTHING), ((0, 0), (length, 0)), constant_values=_NOTHING
            )
            tail_BxL = lax.dynamic_slice_in_dim(padded_BxH, now, length, axis=1)
            begins_WxL = self.bad_WxL[:, :-1]
            begun_BxW = ((tail_BxL[:, None] == begins_WxL) | (begins_WxL < 0)).all(-1)
            bad_BxV = none_BxV.at[:, self.bad_WxL[:, -1]].max(begun_BxW, mode="drop")
            scores_BxV = jnp.where(bad_BxV, -jnp.inf, scores_BxV)
        return scores_BxV


def log_softmax(scores_BxV: Array) -> Array:
    """Log-probabilities; a row in which nothing may come stays -inf."""
    norm_Bx1 = jax.nn.logsumexp(scores_BxV, axis=-1, keepdims=True)
    return scores_BxV - jnp.where(norm_Bx1 > -jnp.inf, norm_Bx1, 0.0)


def make_logits_processors(
    generation: GenerationConfig,
    config,
    lengths: Sequence[int],
    limits: Sequence[int],
    prompt_BxP: np.ndarray,
    start_B: np.ndarray,
) -> LogitsProcessors:
    """The rules for a batch.

    Args:
        generation: the settings.
        config: that of the model.
        lengths, limits: tokens of each prompt, and how many may follow it; the rest of the batch is padding.
        prompt_BxP, start_B: what comes before the first new token, at the right edge, from the slot ``start`` on.

    UserError where a token is named that the model does not have.
    """
    vocabulary, batch = config.vocab_size, len(prompt_BxP)
    length_B, limit_B = (np.array([*row, *[0] * (batch - len(row))], np.int32) for row in (lengths, limits))
    eos = generation.eos_token_id or (config.eos_id,)
    words = [word for word in generation.bad_words_ids if word not in {(token,) for token in eos}]
    forced = generation.forced_bos_token_id
    named = [("bad_words_ids", token) for word in words for token in word]
    named += [("forced_bos_token_id", forced)] if forced is not None else []
    named += [("forced_eos_token_id", token) for token in generation.forced_eos_token_id]
    for name, token in named:
        if not 0 <= token < vocabulary:
            raise UserError(f"{name} in {FILE} names token {token}, and the model has {vocabulary}")

    def mask(tokens: Sequence[int]) -> np.ndarray | None:
        return np.isin(np.arange(vocabulary), tokens) if tokens else None

    if generation.min_new_tokens:
        least_B = np.full_like(limit_B, generation.min_new_tokens)
    else:
        least_B = np.maximum(generation.min_length - length_B, 0) if generation.min_length else None
    long_words = [word for word in words if len(word) > 1]
    penalty, ngram_size = generation.repetition_penalty, generation.no_repeat_ngram_size
    looks_back = penalty != 1.0 or ngram_size > 0 or bool(long_words)
    return LogitsProcessors(
        eos_E=np.array([token if 0 <= token < vocabulary else vocabulary for token in eos], np.int32),
        limit_B=limit_B,
        prompt_BxP=prompt_BxP if looks_back else None,
        start_B=start_B if looks_back else None,
        repetition_penalty=np.float32(penalty) if penalty != 1.0 else None,
        ngram_size=np.int32(ngram_size) if ngram_size else None,
        bad_V=mask([word[0] for word in words if len(word) == 1]),
        bad_WxL=_at_the_right(long_words) if long_words else None,
        least_B=least_B,
        first_B=np.where(length_B == 1, forced, -1).astype(np.int32) if forced is not None else None,
        last_V=mask(generation.forced_eos_token_id),
        suppressed_V=mask(generation.suppress_tokens),
        suppressed_first_V=mask(generation.begin_suppress_tokens),
        renormalize=generation.renormalize_logits,
    )


def _at_the_right(words: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.full((len(words), max(map(len, words))), -1, np.int32)
    for row, word in zip(out, words, strict=True):
        row[-len(word) :] = word
    return out
