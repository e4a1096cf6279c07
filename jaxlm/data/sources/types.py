"""The types of sources: what ``open_source`` makes of a SPEC."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.data.sources.dialogues import Dialogue
from jaxlm.data.sources.jsonl import JsonlRows


@dataclass(frozen=True)
class Documents:
    """Texts for a language model. ``ends`` tells whether each text is a document with an end the model should learn;
    a text file is not: it is a stretch of one stream."""

    spec: str
    texts: Iterable[str]
    ends: bool
    synthetic: str = ""  # says so, where the text was made up


@dataclass(frozen=True)
class Dialogues:
    """Texts and conversations of which a language model is to learn the replies."""

    spec: str
    rows: JsonlRows[Dialogue]
    synthetic: str = ""


@dataclass(frozen=True)
class Preferences:
    """Dialogues in twos: the same prompt, with a reply that is preferred to another, and the other."""

    spec: str
    rows: JsonlRows[tuple[Dialogue, Dialogue]]
    synthetic: str = ""


@dataclass(frozen=True)
class Tokens:
    """One stream of token ids, integers of any width [N]."""

    spec: str
    ids: np.ndarray
    synthetic: str = ""


@dataclass(frozen=True)
class Bitext:
    """Sentence pairs: ``tgt[i]`` translates ``src[i]``."""

    spec: str
    src: Sequence[str]
    tgt: Sequence[str]
    synthetic: str = ""

    @property
    def texts(self) -> list[str]:
        """Both sides: what a joint tokenizer is trained on."""
        return [*self.src, *self.tgt]


Plain = Documents | Dialogues | Preferences | Tokens | Bitext


@dataclass(frozen=True)
class Mixture:
    """Sources that language models read, with their ``weights``: shares that add up to 1, or epochs."""

    spec: str
    sources: tuple[Documents | Dialogues | Tokens, ...]
    weights: tuple[float, ...]
    shares: bool

    @property
    def texts(self) -> Iterator[str]:
        """Of those that have plain text."""
        return itertools.chain.from_iterable(getattr(source, "texts", ()) for source in self.sources)

    @property
    def synthetic(self) -> str:
        return "; ".join(dict.fromkeys(source.synthetic for source in self.sources if source.synthetic))


Source = Plain | Mixture
