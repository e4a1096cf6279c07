"""The configuration of data: sources, tokenizer, and the shapes of batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SpecialTokens = Literal["text", "parse"]
FirstTokenOption = Literal["auto", "never"]


@dataclass(frozen=True)
class DataConfig:
    """Sources are SPECs (see ``jaxlm.data.sources.spec``).

    A language model sees ``batch_size`` windows of ``seq_len`` tokens a step; a translation model sees about
    ``batch_tokens`` padded tokens a step (the larger of source and target side), in one of a few bucketed shapes.
    Both are global: over all devices and processes.
    """

    train: str = ""
    valid: str = ""  # scored while training
    test: str = ""  # scored by ``jaxlm evaluate`` if that names no data
    tokenizer: str = ""  # a tokenizer.json or a model directory; "": trained on ``train``
    tokenizer_kind: Literal["bpe", "char"] = "bpe"
    vocab_size: int = 8192  # of a byte-pair tokenizer that is trained
    seq_len: int = 256
    batch_size: int = 16
    packing: Literal["stream", "documents"] = "stream"  # windows of a token stream, or whole documents side by side
    batch_tokens: int = 4096
    buckets: tuple[int, ...] = (12, 16, 24, 32, 64, 128)  # padded lengths; longer pairs are left out of training
    prefetch: int = 2  # batches that a thread prepares ahead; 0: none
    cache: str = ""  # the directory of the token cache; "": tokenized text is kept in memory
    special_tokens: SpecialTokens = "text"  # that documents spell: characters, or parsed as special tokens
    prompt_special_tokens: SpecialTokens = "text"  # the same in prompts and completions that are texts (instruct:)
    first_token: FirstTokenOption = "auto"  # each document and window begins with what the tokenizer puts before a text
    bad_rows: Literal["fail", "report"] = "fail"  # unusable rows: an error, or left out and counted
    contamination: Literal["report", "fail", "off"] = "report"  # documents of ``valid`` and ``test`` found in ``train``
    seed: int = 0
