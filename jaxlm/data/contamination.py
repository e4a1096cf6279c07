"""Whether what a model is judged by is in what it is trained on: word for word, or in large part.

Documents are compared by the runs of letters and digits that they share (as those of words in the decontamination of
GPT-3, arXiv:2005.14165, appendix C), after case, punctuation and spaces are taken away. Long documents are judged in
pieces, and documents shorter than a run as wholes. Runs that a tenth of the documents share, as those of a system
prompt, say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_RUN = 40  # letters: about eight words
_PIECE = 512  # tokens of a long document that are judged together
_NEAR = 0.5  # of the runs of a document
_COMMON = 0.1  # of the documents
_AT_A_TIME = 1 << 19  # tokens
_SHOWN = 3
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_FACTOR), -1, 1 << 64))


@dataclass(frozen=True)
class Contamination:
    """What of ``documents``, long ones in pieces, is in the training data: ``exact`` ones word for word, ``near`` ones
    in large part."""

    documents: int
    exact: int
    near: int
    examples: tuple[str, ...]  # how some of them begin

    def __str__(self) -> str:
        if not self.exact + self.near:
            return f"none of {self.documents:,} documents is in the training data"
        shown = ", ".join(f'"{example}"' for example in self.examples)
        return (
            f"{self.exact:,} of {self.documents:,} documents are in the training data word for word, and {self.near:,} "
            f"more in large part, such as {shown}"
        )


def find_contamination(
    train: Iterable[EncodedDocuments], held: Iterable[EncodedDocuments], tokenizer: Tokenizer
) -> Contamination:
    """Of ``held`` documents, those that are in ``train``; both encoded by ``tokenizer``. Memory grows with ``held``
    alone."""
    letters = _Letters(tokenizer)
    pieces = [piece for part in held for piece in _pieces(part, _PIECE, 0)]
    ids, lengths = (np.concatenate(each) for each in zip(*pieces, strict=True))
    hashes, owners = letters.runs(ids, lengths)
    hashes, owners = _without_common(hashes, owners, len(lengths))
    sought = np.unique(hashes)
    found = np.zeros(len(sought), bool)
    maybe = np.zeros(1 << 22, bool)  # by their last bits, which rules most out
    maybe[sought & np.uint64(len(maybe) - 1)] = True
    for part in train:
        for some, sizes in _pieces(part, _AT_A_TIME, 4 * _RUN):
            seen, _ = letters.runs(some, sizes)
            seen = seen[maybe[seen & np.uint64(len(maybe) - 1)]]
            at = np.minimum(np.searchsorted(sought, seen), max(len(sought) - 1, 0))
            if len(sought):
                found[at[sought[at] == seen]] = True
    hit = found[np.searchsorted(sought, hashes)] if len(sought) else np.zeros(0, bool)
    total = np.bincount(owners, minlength=len(lengths))
    share = np.bincount(owners, hit, minlength=len(lengths)) / np.maximum(total, 1)
    exact, near = share == 1, (share >= _NEAR) & (share < 1)
    starts = np.cumsum(lengths) - lengths
    examples = tuple(
        " ".join(tokenizer.decode(ids[starts[i] : starts[i] + min(lengths[i], 40)]).split())[:60]
        for i in np.flatnonzero(exact | near)[:_SHOWN]
    )
    return Contamination(len(lengths), int(exact.sum()), int(near.sum()), examples)


class _Letters:
    """What is left of tokens without case, spaces and punctuation, as numbers that look random, end to end."""

    def __init__(self, tokenizer: Tokenizer):
        forms = []
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode([token])
            if "\ufffd" in text:  # a part of a character, which stands for itself
                forms.append([(1 << 32) + token])
            else:
                forms.append([ord(letter) for letter in text.casefold() if letter.isalnum()])
        self._counts = np.array([len(form) for form in forms])
        self._starts = np.cumsum(self._counts) - self._counts
        self._codes = _mixed(np.array([code for form in forms for code in form], np.uint64))

    def runs(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A hash of every run of a document, or of the whole of a shorter one, and the document that each is of.

        ``ids`` are documents of ``lengths``, end to end. A hash is the sum of codes times powers of a factor, which a
        difference of running sums gives, times the inverse of the power that the run begins with; all modulo 2 ** 64.
        """
        counts = self._counts[ids]
        at = np.repeat(self._starts[ids] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        ends = np.cumsum(np.append(0, counts))[np.cumsum(lengths)]  # of documents, in letters
        sizes = np.diff(ends, prepend=0)
        sums = np.zeros(len(at) + 1, np.uint64)
        np.cumsum(self._codes[at] * _powers(_FACTOR, len(at)), out=sums[1:])
        owner = np.repeat(np.arange(len(lengths)), sizes)
        begin = np.flatnonzero(owner[: max(len(owner) - _RUN + 1, 0)] == owner[_RUN - 1 :])
        short = np.flatnonzero((sizes > 0) & (sizes < _RUN))
        begins = np.append(begin, ends[short] - sizes[short])
        size = np.append(np.full(len(begin), _RUN), sizes[short])
        hashes = (sums[begins + size] - sums[begins]) * _powers(_INVERSE, len(at))[begins]
        return _mixed(hashes ^ size.astype(np.uint64)), np.append(owner[begin], short)


def _powers(factor: np.uint64, count: int) -> np.ndarray:
    powers = np.full(count, factor)
    powers[:1] = 1
    return np.cumprod(powers, out=powers)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Numbers whose bits look random (the finalizer of SplitMix64)."""
    values = values + _FACTOR
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _pieces(part: EncodedDocuments, size: int, overlap: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents in pieces of ``size`` tokens, each with what ``overlap`` tokens more hold; some at a time, as ids end
    to end and lengths."""
    lengths = np.asarray(part.lengths)
    starts = np.cumsum(lengths) - lengths
    counts = np.maximum(1, -(-lengths // size))
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[document] + number * size
    sizes = np.minimum(lengths[document] - number * size, size + overlap)
    groups = np.cumsum(sizes) // _AT_A_TIME
    bounds = np.append(np.flatnonzero(np.diff(groups, prepend=-1)), len(sizes))
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        length = sizes[low:high]
        at = np.repeat(first[low:high] - (np.cumsum(length) - length), length) + np.arange(length.sum())
        yield part.ids[at], length


def _without_common(hashes: np.ndarray, owners: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Without the runs that many documents share."""
    order = np.lexsort((owners, hashes))
    sorted_hashes, sorted_owners = hashes[order], owners[order]
    first = np.ones(len(order), bool)  # of a run in a document
    first[1:] = (sorted_hashes[1:] != sorted_hashes[:-1]) | (sorted_owners[1:] != sorted_owners[:-1])
    names, counts = np.unique(sorted_hashes[first], return_counts=True)
    common = names[counts > max(3, _COMMON * documents)]
    keep = ~np.isin(hashes, common)
    return hashes[keep], owners[keep]
