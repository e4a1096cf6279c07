"""How well a model predicts text: the loss of a token, and the perplexity of a token, a word and a byte.

Words are runs of non-white-space and bytes are UTF-8, both of the raw text, so that figures over them compare across
tokenizers; figures over tokens do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from jaxlm.core.errors import UserError
from jaxlm.core.progress import Progress
from jaxlm.data.batches.batch import Batch
from jaxlm.data.batches.bitext import SentencePairs
from jaxlm.data.batches.buckets import BucketShapes
from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
from jaxlm.data.batches.first_token import FirstToken
from jaxlm.data.batches.packing import PackedDocuments, begin_rows, token_stream
from jaxlm.data.sources.text_chunks import count_words_and_bytes
from jaxlm.data.sources.types import Bitext, Dialogues, Documents, Tokens
from jaxlm.inference.translation import decoder_start_token, generation_for_language
from jaxlm.inference.translation import target_language as language_into
from jaxlm.nn.models import batch_arguments

_LOGITS = 1 << 26  # logits of one batch, 256 MiB
_BUCKETS = (16, 32, 64, 128)
_LONGEST_CONTEXT = 2048  # unless the caller asks for more


@partial(jax.jit, static_argnames=("graphdef",))
def row_nll(graphdef, params, batch: Batch) -> Array:
    """Summed negative log-likelihood of each row's weighted targets, ``[B]`` float32 in nats.

    ``batch`` holds ``inputs``, ``targets`` and ``weights`` ``[B, T]``; where documents are packed also ``segment_ids``
    and ``positions``, and for a translation model ``src`` ``[B, S]``.
    """
    model = nnx.merge(graphdef, params)
    inputs, named = batch_arguments(model.config, batch)
    logits_BxTxV = model(*inputs, **named).astype(jnp.float32)
    target_BxT = jnp.take_along_axis(logits_BxTxV, batch["targets"][..., None], axis=-1)[..., 0]
    nll_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - target_BxT
    return jnp.where(batch["weights"] > 0, nll_BxT * batch["weights"], 0.0).sum(-1)


def stream(lm, source: Documents | Tokens) -> EncodedDocuments:
    """A source as the model's token ids, documents end to end.

    Raises:
        UserError: the model has no tokenizer for the text, or the source has ids that the model does not know.
    """
    if lm.tokenizer is not None:
        found = token_stream(source, lm.tokenizer)
    elif isinstance(source, Tokens):
        found = EncodedDocuments(source.ids, np.array([len(source.ids)]))
    else:
        raise UserError("the model has no tokenizer: give it tokens:PATH.npy")
    if len(found.ids) and int(found.ids.max()) >= lm.config.vocab_size:
        raise UserError(
            f"{source.spec!r} holds the id {int(found.ids.max())} and the model knows {lm.config.vocab_size}: "
            "use the tokenizer the model was trained with"
        )
    return found


def windows(n: int, context: int, stride: int, first_token: bool = False) -> list[tuple[int, int, int]]:
    """``(begin, end, first)`` of each window over ``n`` tokens: it reads ``begin..end`` and scores ``first..end``.

    Window i begins at ``i * stride``, reads ``context`` tokens (the last one what is left) and scores those that no
    earlier window scored, but its first only behind a ``first_token``. With one, or with ``stride`` below ``context``,
    every token is scored exactly once, the very first only behind a first token; without one and with ``stride ==
    context`` the first token of each window has nothing before it and is not scored.
    """
    out, scored = [], 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        first = max(scored, begin + (not first_token))
        if first < end:
            out.append((begin, end, first))
        scored = end
        if end == n:
            break
    return out


class StreamWindows:
    """The windows over a stream of text (see ``windows``), each behind the first token.

    Attributes:
        first: the first token; ``context`` counts it, and nothing scores it.
        stride: tokens from one window to the next, at most what a window has behind the first token.
        spans: the windows, in positions of the stream.
    """

    def __init__(self, text: EncodedDocuments, context: int, stride: int = 0):
        """
        Args:
            text: documents end to end.
            context: tokens in a window.
            stride: 0: the most.
        """
        self.ids, self.context = text.ids, context
        self.first = first = FirstToken(text.first_token, text.ids, text.lengths)
        begin, length = first.leading, context - len(first)
        self.stride = min(stride or length, length)
        spans = windows(len(self.ids) - begin, length, self.stride, len(first) > 0)
        self.spans = [tuple(begin + place for place in span) for span in spans]

    @property
    def num_tokens(self) -> int:
        """Tokens of the text, first tokens not counted."""
        return len(self.ids) - self.first.count()

    def batches(self, rows: int) -> Iterator[Batch]:
        """Batches of one shape ``[rows, context - 1]``; what pads, and first tokens, have weight 0."""
        lead = max(len(self.first) - 1, 0)
        shape, before = (rows, self.context - 1 - lead), len(self.first) == 0
        for at in range(0, len(self.spans), rows):
            inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            weights = np.zeros(shape, np.float32)
            for r, (begin, end, scored) in enumerate(self.spans[at : at + rows]):
                begin = int(self.first.skip(np.array(begin)))
                place = np.arange(begin + before, end)
                inputs[r, : len(place)] = self.ids[np.maximum(place - 1, 0)]
                targets[r, : len(place)] = self.ids[place]
                weights[r, : len(place)] = (place >= scored) & ~self.first.holds(place)
            yield begin_rows({"inputs": inputs, "targets": targets, "weights": weights}, self.first.ids)


def pair_batches(
    lm, source: Bitext, rows: int = 0, *, source_language: str | None = None, target_language: str | None = None
) -> Iterator[Batch]:
    """Every pair of a bitext in batches of similar lengths, with about ``rows`` rows of 64 tokens (0: fits the
    vocabulary).

    Raises:
        UserError: the model has no tokenizer, or a sentence is longer than it reads.
    """
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    tokens = (rows or _rows(lm, 64)) * 64
    pairs = SentencePairs(
        source, lm.tokenizer, BucketShapes(_BUCKETS, tokens, extend=True), source_language=source_language,
        target_language=language_into(lm, target_language),
        start_id=decoder_start_token(lm.config, generation_for_language(lm, target_language)),
    )
    if lm.config.positions == "learned" and pairs.report()["longest"] > lm.config.max_positions:
        raise UserError(
            f"{source.spec!r} has a sentence of {pairs.report()['longest']} tokens and the model reads "
            f"{lm.config.max_positions}: split it"
        )
    plan = pairs.plan(None, 0)
    return (pairs.batch(plan, k) for k in range(len(plan.bucket)))


def perplexity(
    lm,
    source: Documents | Tokens,
    *,
    context: int = 0,
    stride: int = 0,
    batch_size: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores a stream of text in strided windows (see ``windows``); documents are joined by the end token.

    Args:
        lm: has ``config``, ``graphdef``, ``params`` and ``tokenizer`` (None: no figures over words and bytes).
        source: what to score.
        context: tokens in a window, its first token included; 0 is the model's own, at most 2,048.
        stride: tokens from one window to the next; 0: windows do not overlap.
        batch_size: windows at a time; 0 fits the vocabulary.
        progress: called with "scoring", the batches done and all batches.

    Returns:
        ``loss`` (nats a token), ``perplexity``, ``word_perplexity``, ``byte_perplexity``, ``bits_per_byte``, ``tokens``
        (scored), ``words``, ``bytes``, ``context``, ``stride``, ``first_token`` (what begins each window, where
        something does). Words and bytes are those of the whole text, which is charged the mean loss for each of its
        tokens, also the few that start a window and are not scored.
    """
    context = context or min(lm.config.context_length or _LONGEST_CONTEXT, _LONGEST_CONTEXT)
    if context < 2 or not 0 <= stride <= context:
        raise UserError(f"context {context} and stride {stride}: give a context of 2 or more and a stride within it")
    if lm.config.position_limit and context > lm.config.position_limit:
        raise UserError(f"context {context} is more than the {lm.config.max_positions} positions the model learned")
    text = stream(lm, source)
    if context < 2 + len(text.first_token):
        raise UserError(f"context {context} has no room for two tokens behind {len(text.first_token)} that begin each")
    scored = StreamWindows(text, context, stride)
    count = len(scored.spans)
    if count == 0:
        raise UserError(f"{source.spec!r} is less than two tokens: there is nothing to predict")
    rows = min(batch_size or _rows(lm, context), count)
    nll, tokens = _sum(lm, scored.batches(rows), -(-count // rows), progress)
    texts = source.texts if isinstance(source, Documents) else None
    if texts is None and lm.tokenizer is not None:
        texts = [lm.tokenizer.decode(text.ids)]
    out = {**figures(nll, tokens, scored.num_tokens, texts), "context": context, "stride": scored.stride}
    if text.first_token:
        out["first_token"] = lm.tokenizer.decode(text.first_token, skip_special=False)
    return out


def dialogue_perplexity(
    lm, source: Dialogues, *, context: int = 0, batch_size: int = 0, progress: Progress | None = None
) -> dict[str, float]:
    """Scores the replies of dialogues, each token given all before it; what is beyond ``context`` tokens (0: of the
    model, at most 2,048) is left out.

    Returns ``perplexity``'s figures, over the replies.
    """
    if lm.tokenizer is None:
        raise UserError("the model has no tokenizer: put a tokenizer.json beside its config.json")
    context = context or min(lm.config.context_length or _LONGEST_CONTEXT, _LONGEST_CONTEXT)
    packed = PackedDocuments(encode_documents(source, lm.tokenizer), context, lm.tokenizer.pad_id or 0)
    rows = min(batch_size or _rows(lm, context), len(packed))
    row_N = np.arange(-(-len(packed) // rows) * rows)
    batches = [packed.take(0, row_B) for row_B in np.where(row_N < len(packed), row_N, -1).reshape(-1, rows)]
    nll, tokens = _sum(lm, batches, len(batches), progress)
    replies = [lm.tokenizer.decode(batch["targets"][batch["weights"] > 0]) for batch in batches]
    return {**figures(nll, tokens, tokens, replies), "context": context}


def bitext_perplexity(
    lm,
    source: Bitext,
    *,
    source_language: str | None = None,
    target_language: str | None = None,
    batch_size: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Scores target sentences given their sources, each token given the true ones before it, the end token included,
    and the code of the language where the model says it. Languages are those of ``translate``.

    Returns ``perplexity``'s figures, over the target side.
    """
    batches = list(pair_batches(
        lm, source, batch_size, source_language=source_language, target_language=target_language
    ))
    nll, tokens = _sum(lm, batches, len(batches), progress)
    return figures(nll, tokens, tokens, source.tgt)


def _rows(lm, length: int) -> int:
    return max(1, min(64, _LOGITS // (length * lm.config.vocab_size)))


def _sum(lm, batches, total: int, progress: Progress | None) -> tuple[float, int]:
    """Nats and tokens, added up in float64."""
    nll, tokens = 0.0, 0
    for done, batch in enumerate(batches, 1):
        nll += float(np.asarray(row_nll(lm.graphdef, lm.params, batch), np.float64).sum())
        tokens += int(batch["weights"].sum())
        if progress is not None:
            progress("scoring", done, total)
    return nll, tokens


def figures(nll: float, tokens: int, text_tokens: int, texts) -> dict[str, float]:
    """From nats over scored tokens to figures; ``text_tokens`` is how many ``texts`` has (None: unknown text)."""
    loss = nll / tokens
    out = {"loss": loss, "perplexity": _exp(loss)}
    words, size = count_words_and_bytes(texts) if texts is not None else (0, 0)
    out["word_perplexity"] = _exp(loss * text_tokens / words) if words else None
    out["byte_perplexity"] = _exp(loss * text_tokens / size) if size else None
    out["bits_per_byte"] = loss * text_tokens / size / math.log(2) if size else None
    return {**out, "tokens": tokens, "words": words or None, "bytes": size or None}


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
