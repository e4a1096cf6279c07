"""The first token: what a tokenizer puts before a text, such as Gemma's ``<bos>``, at the start of every window.

A model that was trained with it reads any text badly without it: Gemma 3 270M has twice the perplexity. It stands once
before each document and each window, and the model is never trained or scored on it. It may be several tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["FirstToken"]


class FirstToken:
    """The first token of the documents of one stream of ids, ``[N]``.

    Attributes:
        ids: int32 [P]; P is 0 where the tokenizer puts nothing before a text.
        leading: how many tokens at the start of the stream are a first token: P or 0.
        begin: the position in the stream of the first token that a model predicts: ``leading``, or 1 where there is
            nothing to predict the very first token from.
    """

    def __init__(self, ids: Sequence[int], stream: np.ndarray, lengths: np.ndarray | None = None):
        """
        Args:
            ids: the first token.
            stream: ids [N]. Documents that begin with the first token already are known by that.
            lengths: of the documents, [D]; None: the stream is one.
        """
        self.ids = np.asarray(ids, np.int32).reshape(-1)
        size = len(self.ids)
        starts_D = np.zeros(1, np.int64) if lengths is None else np.cumsum(lengths) - lengths
        if size:
            starts_D = starts_D[starts_D + size <= len(stream)]
            at_DxP = starts_D[:, None] + np.arange(size)
            starts_D = starts_D[(stream[at_DxP] == self.ids).all(-1)]
        self._starts = starts_D[:0] if not size else np.unique(starts_D)
        self.leading = size if 0 in self._starts[:1] else 0
        self.begin = self.leading if size else 1

    def __len__(self) -> int:
        return len(self.ids)

    def holds(self, at: np.ndarray) -> np.ndarray:
        """Whether the stream holds a first token, or a part of one, at each position; bool of the same shape."""
        return self._offset(at) >= 0

    def skip(self, at: np.ndarray) -> np.ndarray:
        """Positions in the stream; those at a first token move behind it."""
        offset = self._offset(at)
        return np.where(offset >= 0, at - offset + len(self), at)

    def count(self) -> int:
        """The tokens of the stream that belong to first tokens."""
        return len(self._starts) * len(self)

    def _offset(self, at: np.ndarray) -> np.ndarray:
        """The place of each position in the first token that the stream has there; -1 where it has none."""
        if not len(self._starts):
            return np.full(np.shape(at), -1)
        document = np.searchsorted(self._starts, at, "right") - 1
        offset = np.asarray(at) - self._starts[np.maximum(document, 0)]
        return np.where((document >= 0) & (offset < len(self)), offset, -1)
