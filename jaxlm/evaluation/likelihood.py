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
from jaxlm.data.batches.encoding import encode_documents
from jaxlm.data.batches.packing import PackedDocuments, token_stream
from jaxlm.data.sources.text_chunks import count_words_and_bytes
from jaxlm.data.sources.types import Bitext, Dialogues, Documents, Tokens
from jaxlm.inference.translation import decoder_start_token, generation_for_language
from jaxlm.inference.translation import target_language as language_into

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
    arguments = (batch["src"], batch["inputs"]) if "src" in batch else (batch["inputs"],)
    packing = {f"{name}_BxT": batch[name] for name in ("segment_ids", "positions") if name in batch}
    logits_BxTxV = model(*arguments, **packing).astype(jnp.float32)
    target_BxT = jnp.take_along_axis(logits_BxTxV, batch["targets"][..., None], axis=-1)[..., 0]
    nll_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1) - target_BxT
    return jnp.where(batch["weights"] > 0, nll_BxT * batch["weights"], 0.0).sum(-1)


def stream(lm, source: Documents | Tokens) -> np.ndarray:
    """A source as the model's token ids ``[N]``.

    Raises:
        UserError: the model has no tokenizer for the text, or the source has ids that the model does not know.
    """
    if lm.tokenizer is not None:
        ids_N = token_stream(source, lm.tokenizer)
    elif isinstance(source, Tokens):
        ids_N = source.ids
    else:
        raise UserError("the model has no tokenizer: give it tokens:PATH.npy")
    if len(ids_N) and int(ids_N.max()) >= lm.config.vocab_size:
        raise UserError(
            f"{source.spec!r} holds the id {int(ids_N.max())} and the model knows {lm.config.vocab_size}: "
            "use the tokenizer the model was trained with"
        )
    return ids_N


def windows(n: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """``(begin, end, first)`` of each window over ``n`` tokens: it reads ``begin..end`` and scores ``first..end``.

    Window i begins at ``i * stride``, reads ``context`` tokens (the last one what is left) and scores those that no
    earlier window scored, but never its first. With ``stride`` below ``context`` every token but the very first is
    scored exactly once; with ``stride == context`` the first token of each window has nothing before it and is not.
    """
    out, scored = [], 0
    for begin in range(0, n, stride):
        end = min(begin + context, n)
        first = max(scored, begin + 1)
        if first < end:
            out.append((begin, end, first))
        scored = end
        if end == n:
            break
    return out


def window_batches(ids_N: np.ndarray, context: int, stride: int, rows: int) -> Iterator[Batch]:
    """The windows as batches of one shape ``[rows, context - 1]``; what pads has weight 0."""
    spans = windows(len(ids_N), context, stride)
    shape = (rows, context - 1)
    for at in range(0, len(spans), rows):
        inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        weights = np.zeros(shape, np.float32)
        for r, (begin, end, first) in enumerate(spans[at : at + rows]):
            inputs[r, : end - begin - 1] = ids_N[begin : end - 1]
            targets[r, : end - begin - 1] = ids_N[begin + 1 : end]
            weights[r, first - begin - 1 : end - begin - 1] = 1
        yield {"inputs": inputs, "targets": targets, "weights": weights}


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
        context: tokens in a window; 0 is the model's own, at most 2,048.
        stride: tokens from one window to the next; 0 is ``context``.
        batch_size: windows at a time; 0 fits the vocabulary.
        progress: called with "scoring", the batches done and all batches.

    Returns:
        ``loss`` (nats a token), ``perplexity``, ``word_perplexity``, ``byte_perplexity``, ``bits_per_byte``, ``tokens``
        (scored), ``words``, ``bytes``, ``context``, ``stride``. Words and bytes are those of the whole text, which is
        charged the mean loss for each of its tokens, also the few that start a window and are not scored.
    """
    context = context or min(lm.config.context_length or _LONGEST_CONTEXT, _LONGEST_CONTEXT)
    stride = stride or context
    if context < 2 or not 1 <= stride <= context:
        raise UserError(f"context {context} and stride {stride}: give a context of 2 or more and a stride within it")
    if lm.config.position_limit and context > lm.config.position_limit:
        raise UserError(f"context {context} is more than the {lm.config.max_positions} positions the model learned")
    ids_N = stream(lm, source)
    count = len(windows(len(ids_N), context, stride))
    if count == 0:
        raise UserError(f"{source.spec!r} is less than two tokens: there is nothing to predict")
    rows = min(batch_size or _rows(lm, context), count)
    batches = window_batches(ids_N, context, stride, rows)
    nll, tokens = _sum(lm, batches, -(-count // rows), progress)
    texts = source.texts if isinstance(source, Documents) else None
    if texts is None and lm.tokenizer is not None:
        texts = [lm.tokenizer.decode(ids_N)]
    return {**figures(nll, tokens, len(ids_N), texts), "context": context, "stride": stride}


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
