"""The types of sources that ``open_source`` returns.

In each, ``spec`` is the SPEC that it was opened with, and ``synthetic`` a note for texts that no human wrote ("" for
others).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxlm.data.config import FirstTokenOption
from jaxlm.data.sources.dialogues import Dialogue
from jaxlm.data.sources.jsonl import JsonlRows


@dataclass(frozen=True)
class Documents:
    """Texts for a language model.

    Attributes:
        append_eos: whether each text is a whole document, whose end the model should learn; a text file is a stretch of
            one stream.
        parse_special: whether the texts have the special tokens that they spell; otherwise these are characters.
        first_token: whether each text and each window begins with what the tokenizer puts before a text.
    """

    spec: str
    texts: Iterable[str]
    append_eos: bool
    synthetic: str = ""
    parse_special: bool = False
    first_token: FirstTokenOption = "auto"


@dataclass(frozen=True)
class Dialogues:
    """Prompts with completions, and conversations, for a language model that is trained on the replies.
    ``parse_special``: prompts and completions that are texts have the special tokens that they spell."""

    spec: str
    rows: JsonlRows[Dialogue]
    synthetic: str = ""
    parse_special: bool = False


@dataclass(frozen=True)
class Preferences:
    """Pairs of dialogues with the same prompt: (with the preferred reply, with the rejected reply). ``parse_special``:
    as in ``Dialogues``."""

    spec: str
    rows: JsonlRows[tuple[Dialogue, Dialogue]]
    synthetic: str = ""
    parse_special: bool = False


@dataclass(frozen=True)
class Tokens:
    """One stream of token ids [N], of any integer type. ``first_token``: whether each window begins with what the
    tokenizer puts before a text."""

    spec: str
    ids: np.ndarray
    synthetic: str = ""
    first_token: FirstTokenOption = "auto"


@dataclass(frozen=True)
class Bitext:
    """Sentence pairs: ``tgt[i]`` translates ``src[i]``."""

    spec: str
    src: Sequence[str]
    tgt: Sequence[str]
    synthetic: str = ""

    @property
    def texts(self) -> list[str]:
        """The sentences of both languages, on which a joint tokenizer is trained."""
        return [*self.src, *self.tgt]


@dataclass(frozen=True)
class Mixture:
    """Several sources for one language model.

    Attributes:
        weights: of each source. They are shares of the rows, which add up to 1, if ``shares``; otherwise they are how
            many times an epoch of the mixture goes through each source.
    """

    spec: str
    sources: tuple[Documents | Dialogues | Tokens, ...]
    weights: tuple[float, ...]
    shares: bool

    @property
    def texts(self) -> Iterator[str]:
        """The texts of the sources that are plain text."""
        return itertools.chain.from_iterable(getattr(source, "texts", ()) for source in self.sources)

    @property
    def synthetic(self) -> str:
        return "; ".join(dict.fromkeys(source.synthetic for source in self.sources if source.synthetic))


Source = Documents | Dialogues | Preferences | Tokens | Bitext | Mixture
