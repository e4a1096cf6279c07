"""Changes to the logits of the next token that ``GenerationConfig`` asks for, applied inside the compiled loops.

Scores, order and details are those of the logits processors of transformers. A setting is an array, so its value is not
part of the compiled program; a setting that is off is None and costs nothing.
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
from jaxlm.nn.config import ModelConfig

__all__ = ["LogitsProcessors", "log_softmax", "make_logits_processors"]

_NO_TOKEN = -2  # equals no token id, nor the -1 that pads words


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitsProcessors:
    """The logits processors of a batch of B prompts, and the conditions that end a row.

    V is the size of the vocabulary; as a token id it stands for a token that the model does not have.
    """

    eos_E: Array  # int32, the tokens that end a text
    max_new_tokens_B: Array  # int32; 0 for a row of padding
    prompt_BxP: Array | None = None  # int32, right-aligned; only where a processor looks at earlier tokens
    prompt_start_B: Array | None = None  # int32, the column in which each prompt begins
    repetition_penalty: Array | None = None  # float32
    ngram_size: Array | None = None  # int32, n-grams of this size do not come twice
    bad_tokens_V: Array | None = None  # bool
    bad_words_WxL: Array | None = None  # int32, words of two tokens or more, right-aligned and padded with -1
    min_new_tokens_B: Array | None = None  # int32, new tokens before an end token may come
    forced_first_B: Array | None = None  # int32, the first new token, or -1
    forced_last_V: Array | None = None  # bool, tokens allowed at the last position of a row
    suppressed_V: Array | None = None  # bool
    suppressed_first_V: Array | None = None  # bool, suppressed as the first token that is not forced
    renormalize: bool = field(default=False, metadata={"static": True})

    @property
    def active(self) -> bool:
        """Whether ``apply`` changes anything."""
        arrays = (
            self.prompt_BxP, self.bad_tokens_V, self.min_new_tokens_B, self.forced_first_B, self.forced_last_V,
            self.suppressed_V, self.suppressed_first_V,
        )
        return self.renormalize or any(array is not None for array in arrays)

    def select(self, rows_B: Array | np.ndarray) -> LogitsProcessors:
        """The processors of the given rows."""
        names = ("max_new_tokens_B", "prompt_BxP", "prompt_start_B", "min_new_tokens_B", "forced_first_B")
        return replace(self, **jax.tree.map(lambda x: x[rows_B], {name: getattr(self, name) for name in names}))

    def is_eos(self, tokens: Array) -> Array:
        """Which tokens end their text: bool, of the same shape."""
        return (tokens[..., None] == self.eos_E).any(-1)

    def apply(self, scores_BxV: Array, tokens_BxN: Array, step: Array, num_before: Array | int = 0) -> Array:
        """Scores of the next token, -inf for tokens that may not come: float32 ``[B, V]``.

        Args:
            scores_BxV: logits or log-probabilities.
            tokens_BxN: new tokens; the first ``step`` columns are filled.
            step: new tokens so far.
            num_before: new tokens that came still earlier and are now part of the prompt.
        """
        if not self.active:
            return scores_BxV
        token_V, position = jnp.arange(scores_BxV.shape[1]), num_before + step
        if self.prompt_BxP is not None:
            scores_BxV = self._apply_history(scores_BxV, _History.of(self, tokens_BxN, step))
        if self.bad_tokens_V is not None:
            scores_BxV = jnp.where(self.bad_tokens_V, -jnp.inf, scores_BxV)
        if self.min_new_tokens_B is not None:
            early_B = position < self.min_new_tokens_B
            scores_BxV = jnp.where(early_B[:, None] & self.is_eos(token_V), -jnp.inf, scores_BxV)
        if self.forced_first_B is not None:
            forced_BxV = jnp.where(token_V == self.forced_first_B[:, None], 0.0, -jnp.inf)
            scores_BxV = jnp.where(((position == 0) & (self.forced_first_B >= 0))[:, None], forced_BxV, scores_BxV)
        if self.forced_last_V is not None:
            forced_V = jnp.where(self.forced_last_V, 0.0, -jnp.inf)
            scores_BxV = jnp.where((position == self.max_new_tokens_B - 1)[:, None], forced_V, scores_BxV)
        if self.suppressed_V is not None:
            scores_BxV = jnp.where(self.suppressed_V, -jnp.inf, scores_BxV)
        if self.suppressed_first_V is not None:
            first_free_B = 0 if self.forced_first_B is None else self.forced_first_B >= 0
            now_B = jnp.broadcast_to(position == first_free_B, scores_BxV.shape[:1])
            scores_BxV = jnp.where(now_B[:, None] & self.suppressed_first_V, -jnp.inf, scores_BxV)
        return log_softmax(scores_BxV) if self.renormalize else scores_BxV

    def _apply_history(self, scores_BxV: Array, history: _History) -> Array:
        """The processors that depend on the prompt and the new tokens so far."""
        if self.repetition_penalty is not None:
            seen_BxV = history.mark(history.real_BxH, scores_BxV.shape[1])
            penalized_BxV = jnp.where(
                scores_BxV < 0, scores_BxV * self.repetition_penalty, scores_BxV / self.repetition_penalty
            )
            scores_BxV = jnp.where(seen_BxV, penalized_BxV, scores_BxV)
        if self.ngram_size is not None:
            repeats_BxH = history.completes_ngram(self.ngram_size)
            scores_BxV = jnp.where(history.mark(repeats_BxH, scores_BxV.shape[1]), -jnp.inf, scores_BxV)
        if self.bad_words_WxL is not None:
            begun_BxW = history.ends_with(self.bad_words_WxL[:, :-1])
            none_BxV = jnp.zeros(scores_BxV.shape, bool)
            bad_BxV = none_BxV.at[:, self.bad_words_WxL[:, -1]].max(begun_BxW, mode="drop")
            scores_BxV = jnp.where(bad_BxV, -jnp.inf, scores_BxV)
        return scores_BxV


@dataclass(frozen=True)
class _History:
    """The prompt and the new tokens of each row, in H columns; the first ``length`` are filled."""

    tokens_BxH: Array
    start_Bx1: Array  # the column in which each prompt begins
    length: Array

    @classmethod
    def of(cls, processors: LogitsProcessors, tokens_BxN: Array, step: Array) -> _History:
        tokens_BxH = jnp.concatenate([processors.prompt_BxP, tokens_BxN], axis=1)
        return cls(tokens_BxH, processors.prompt_start_B[:, None], processors.prompt_BxP.shape[1] + step)

    @property
    def column_H(self) -> Array:
        return jnp.arange(self.tokens_BxH.shape[1])

    @property
    def real_BxH(self) -> Array:
        """Columns that hold a token."""
        return (self.column_H >= self.start_Bx1) & (self.column_H < self.length)

    def mark(self, where_BxH: Array, vocab_size: int) -> Array:
        """The tokens that the chosen columns hold: bool ``[B, V]``."""
        batch = self.tokens_BxH.shape[0]
        none_BxV = jnp.zeros((batch, vocab_size), bool)
        return none_BxV.at[jnp.arange(batch)[:, None], self.tokens_BxH].max(where_BxH, mode="drop")

    def completes_ngram(self, size: Array) -> Array:
        """Columns whose token follows the same ``size - 1`` tokens that the next token will follow: bool ``[B, H]``."""

        def also_matches(back: Array, matches_BxH: Array) -> Array:
            """Columns that match further back too: ``back + 1`` columns before them is the same token."""
            last_B = lax.dynamic_index_in_dim(self.tokens_BxH, self.length - 1 - back, axis=1, keepdims=False)
            earlier_BxH = jnp.roll(self.tokens_BxH, back + 1, axis=1)
            exists_BxH = (self.column_H - 1 - back >= self.start_Bx1) & (self.length - 1 - back >= self.start_Bx1)
            return matches_BxH & exists_BxH & (earlier_BxH == last_B[:, None])

        return lax.fori_loop(0, size - 1, also_matches, self.real_BxH)

    def ends_with(self, words_WxL: Array) -> Array:
        """Whether the row ends with each word, padded on the left with -1: bool ``[B, W]``."""
        length = words_WxL.shape[1]
        padded_BxH = jnp.pad(
            jnp.where(self.real_BxH, self.tokens_BxH, _NO_TOKEN), ((0, 0), (length, 0)), constant_values=_NO_TOKEN
        )
        tail_BxL = lax.dynamic_slice_in_dim(padded_BxH, self.length, length, axis=1)
        return ((tail_BxL[:, None] == words_WxL) | (words_WxL < 0)).all(-1)


def log_softmax(scores_BxV: Array) -> Array:
    """Log-probabilities; a row in which every token is -inf stays so."""
    norm_Bx1 = jax.nn.logsumexp(scores_BxV, axis=-1, keepdims=True)
    return scores_BxV - jnp.where(norm_Bx1 > -jnp.inf, norm_Bx1, 0.0)


def make_logits_processors(
    generation: GenerationConfig,
    config: ModelConfig,
    lengths: Sequence[int],
    limits: Sequence[int],
    prompt_BxP: np.ndarray,
    start_B: np.ndarray,
) -> LogitsProcessors:
    """The logits processors of a batch.

    Args:
        generation: the settings.
        config: the configuration of the model.
        lengths: tokens of each prompt; the remaining rows of the batch are padding.
        limits: new tokens that each prompt may get.
        prompt_BxP: the tokens before the first new one, right-aligned.
        start_B: the column in which each prompt begins.

    Raises:
        UserError: when a setting names a token that the model does not have.
    """
    vocabulary, batch = config.vocab_size, len(prompt_BxP)
    length_B, max_new_tokens_B = (
        np.array([*row, *[0] * (batch - len(row))], np.int32) for row in (lengths, limits)
    )
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
        min_new_tokens_B = np.full_like(max_new_tokens_B, generation.min_new_tokens)
    else:
        min_new_tokens_B = np.maximum(generation.min_length - length_B, 0) if generation.min_length else None
    long_words = [word for word in words if len(word) > 1]
    penalty, ngram_size = generation.repetition_penalty, generation.no_repeat_ngram_size
    uses_history = penalty != 1.0 or ngram_size > 0 or bool(long_words)
    return LogitsProcessors(
        eos_E=np.array([token if 0 <= token < vocabulary else vocabulary for token in eos], np.int32),
        max_new_tokens_B=max_new_tokens_B,
        prompt_BxP=prompt_BxP if uses_history else None,
        prompt_start_B=start_B if uses_history else None,
        repetition_penalty=np.float32(penalty) if penalty != 1.0 else None,
        ngram_size=np.int32(ngram_size) if ngram_size else None,
        bad_tokens_V=mask([word[0] for word in words if len(word) == 1]),
        bad_words_WxL=_right_aligned(long_words) if long_words else None,
        min_new_tokens_B=min_new_tokens_B,
        forced_first_B=np.where(length_B == 1, forced, -1).astype(np.int32) if forced is not None else None,
        forced_last_V=mask(generation.forced_eos_token_id),
        suppressed_V=mask(generation.suppress_tokens),
        suppressed_first_V=mask(generation.begin_suppress_tokens),
        renormalize=generation.renormalize_logits,
    )


def _right_aligned(words: Sequence[Sequence[int]]) -> np.ndarray:
    out = np.full((len(words), max(map(len, words))), -1, np.int32)
    for row, word in zip(out, words, strict=True):
        row[-len(word) :] = word
    return out
