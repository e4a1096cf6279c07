"""Finds contamination: documents of the evaluation data that are in the training data, whole or in large part.

Documents are compared by the n-grams of letters and digits that they share, without case, punctuation and spaces (the
decontamination of GPT-3, arXiv:2005.14165, appendix C, does so with n-grams of words). Long documents are judged in
chunks, and documents shorter than an n-gram as a whole. N-grams that a tenth of the documents share, such as those of a
system prompt, do not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxlm.data.batches.encoding import EncodedDocuments
from jaxlm.data.tokenizers.tokenizer import Tokenizer

_NGRAM = 40  # letters: about eight words
_CHUNK = 512  # tokens of a long document that are judged together
_NEAR = 0.5  # share of the n-grams of a document that makes it a near match
_COMMON = 0.1  # share of the documents in which an n-gram is too common to count
_TOKENS = 1 << 19  # compared at a time
_SHOWN = 3  # examples
_FILTER = 1 << 22  # bits of the filter that rules out most n-grams
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_FACTOR), -1, 1 << 64))


@dataclass(frozen=True)
class Contamination:
    """How many documents are in the training data.

    Attributes:
        documents: compared; a chunk of a long document counts as one.
        exact: documents all of whose n-grams are in the training data.
        near: other documents at least half of whose n-grams are.
        examples: the beginnings of some of these documents.
    """

    documents: int
    exact: int
    near: int
    examples: tuple[str, ...]

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
    """The documents of ``held`` that are in ``train``. Both are encoded by ``tokenizer``. Memory grows with ``held``
    only."""
    letters = _Letters(tokenizer)
    chunks = [chunk for part in held for chunk in _chunks(part, _CHUNK, 0)]
    ids, lengths = (np.concatenate(each) for each in zip(*chunks, strict=True))
    hashes, owners = _without_common(*letters.ngrams(ids, lengths), len(lengths))
    found = _found_in(train, np.unique(hashes), hashes, letters)
    total = np.bincount(owners, minlength=len(lengths))
    share = np.bincount(owners, found, minlength=len(lengths)) / np.maximum(total, 1)
    exact, near = share == 1, (share >= _NEAR) & (share < 1)
    starts = np.cumsum(lengths) - lengths
    examples = tuple(
        " ".join(tokenizer.decode(ids[starts[i] : starts[i] + min(lengths[i], 40)]).split())[:60]
        for i in np.flatnonzero(exact | near)[:_SHOWN]
    )
    return Contamination(len(lengths), int(exact.sum()), int(near.sum()), examples)


def _found_in(
    train: Iterable[EncodedDocuments], wanted: np.ndarray, hashes: np.ndarray, letters: _Letters
) -> np.ndarray:
    """Which ``hashes`` of n-grams the training data has, [len(hashes)] bool; ``wanted`` are the same, sorted and
    unique."""
    if not len(wanted):
        return np.zeros(0, bool)
    found = np.zeros(len(wanted), bool)
    may_be_wanted = np.zeros(_FILTER, bool)  # by the last bits of the hash
    may_be_wanted[wanted & np.uint64(_FILTER - 1)] = True
    for part in train:
        for ids, lengths in _chunks(part, _TOKENS, 4 * _NGRAM):
            seen, _ = letters.ngrams(ids, lengths)
            seen = seen[may_be_wanted[seen & np.uint64(_FILTER - 1)]]
            place = np.minimum(np.searchsorted(wanted, seen), len(wanted) - 1)
            found[place[wanted[place] == seen]] = True
    return found[np.searchsorted(wanted, hashes)]


class _Letters:
    """The letters and digits of every token of a vocabulary, without case, as random-looking numbers."""

    def __init__(self, tokenizer: Tokenizer):
        forms = []
        for token in range(tokenizer.vocab_size):
            text = tokenizer.decode([token])
            if "\ufffd" in text:  # a part of a character: the token counts as one letter
                forms.append([(1 << 32) + token])
            else:
                forms.append([ord(letter) for letter in text.casefold() if letter.isalnum()])
        self._counts = np.array([len(form) for form in forms])
        self._starts = np.cumsum(self._counts) - self._counts
        self._codes = _mixed(np.array([code for form in forms for code in form], np.uint64))

    def ngrams(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The hash of every n-gram of some documents (of a shorter document: the hash of all of it), and the index of
        the document that each hash belongs to.

        ``ids`` are the documents end to end, ``lengths`` their lengths. A hash is a polynomial of the codes of letters
        modulo 2 ** 64: a difference of two cumulative sums of codes times powers of a factor, divided by the first
        power.
        """
        counts = self._counts[ids]
        at = np.repeat(self._starts[ids] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        ends = np.cumsum(np.append(0, counts))[np.cumsum(lengths)]  # of documents, in letters
        sizes = np.diff(ends, prepend=0)
        sums = np.zeros(len(at) + 1, np.uint64)
        np.cumsum(self._codes[at] * _powers(_FACTOR, len(at)), out=sums[1:])
        owner = np.repeat(np.arange(len(lengths)), sizes)
        begin = np.flatnonzero(owner[: max(len(owner) - _NGRAM + 1, 0)] == owner[_NGRAM - 1 :])
        short = np.flatnonzero((sizes > 0) & (sizes < _NGRAM))
        begins = np.append(begin, ends[short] - sizes[short])
        size = np.append(np.full(len(begin), _NGRAM), sizes[short])
        hashes = (sums[begins + size] - sums[begins]) * _powers(_INVERSE, len(at))[begins]
        return _mixed(hashes ^ size.astype(np.uint64)), np.append(owner[begin], short)


def _powers(factor: np.uint64, count: int) -> np.ndarray:
    """factor ** 0, factor ** 1, ... modulo 2 ** 64."""
    powers = np.full(count, factor)
    powers[:1] = 1
    return np.cumprod(powers, out=powers)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Numbers whose bits look random (the finalizer of SplitMix64)."""
    values = values + _FACTOR
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _chunks(part: EncodedDocuments, size: int, overlap: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents in chunks of ``size`` tokens, each followed by the first ``overlap`` tokens of the next; some chunks at
    a time, as (ids end to end, lengths)."""
    lengths = np.asarray(part.lengths)
    starts = np.cumsum(lengths) - lengths
    counts = np.maximum(1, -(-lengths // size))
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[document] + number * size
    sizes = np.minimum(lengths[document] - number * size, size + overlap)
    groups = np.cumsum(sizes) // _TOKENS
    bounds = np.append(np.flatnonzero(np.diff(groups, prepend=-1)), len(sizes))
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        length = sizes[low:high]
        at = np.repeat(first[low:high] - (np.cumsum(length) - length), length) + np.arange(length.sum())
        yield part.ids[at], length


def _without_common(hashes: np.ndarray, owners: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out the n-grams that many documents share."""
    order = np.lexsort((owners, hashes))
    sorted_hashes, sorted_owners = hashes[order], owners[order]
    first = np.ones(len(order), bool)  # whether it is the first of its n-gram in its document
    first[1:] = (sorted_hashes[1:] != sorted_hashes[:-1]) | (sorted_owners[1:] != sorted_owners[:-1])
    names, counts = np.unique(sorted_hashes[first], return_counts=True)
    common = names[counts > max(3, _COMMON * documents)]
    keep = ~np.isin(hashes, common)
    return hashes[keep], owners[keep]
