"""The tokenizer that a training uses: loaded from a file, or trained on the training data."""

from __future__ import annotations

from jaxlm.core.errors import UserError
from jaxlm.data.config import DataConfig
from jaxlm.data.sources.types import Dialogues, Documents, Mixture, Preferences, Source, Tokens
from jaxlm.data.tokenizers.tokenizer import Tokenizer


def tokenizer_from_config(config: DataConfig, source: Source) -> Tokenizer:
    """The tokenizer that ``config.tokenizer`` names, or else one trained on ``source``.

    Raises:
        UserError: when the tokenizer cannot be loaded, or would have to be trained on a source that is not text.
    """
    if config.tokenizer:
        return Tokenizer.load(config.tokenizer)
    if isinstance(source, Tokens):
        raise UserError(
            f"{source.spec!r} holds ids, not text to train a tokenizer on; name their tokenizer in data.tokenizer"
        )
    if isinstance(source, Mixture) and not all(isinstance(each, Documents) for each in source.sources):
        raise UserError(f"{source.spec!r} is not all text to train a tokenizer on; name one in data.tokenizer")
    if isinstance(source, Dialogues | Preferences):
        raise UserError(f"{source.spec!r} is no data to train a tokenizer on; name the model's in data.tokenizer")
    return Tokenizer.train(source.texts, config.tokenizer_kind, config.vocab_size)
