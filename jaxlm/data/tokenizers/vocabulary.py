"""The vocabulary of a tokenizer: how many ids there are, which tokens are special, and what bytes tokens stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.backends import TokenizerBackend


class Vocabulary:
    """The tokens of a tokenizer and their ids.

    Attributes:
        size: one more than the largest id; some ids below it may have no token.
        special_tokens: the tokens that are not text, in the order of the file.
        pad_id, bos_id, eos_id: None where the tokenizer has no such token.
    """

    def __init__(self, backend: TokenizerBackend, config: Mapping[str, Any]):
        """``config`` is the content of tokenizer_config.json: the names of the special tokens."""
        self._backend, self._config = backend, config
        self.size = max(backend.vocabulary.values()) + 1
        self.special_tokens = list(backend.special_tokens)
        self.pad_id, self.bos_id, self.eos_id = map(self.special_id, ("pad", "bos", "eos"))

    def special_id(self, role: str) -> int | None:
        """The id of a token by its role: "pad", "bos", "eos", "unk", "sep", "cls" or "mask". None if there is none."""
        name = self._config.get(f"{role}_token")
        name = name.get("content") if isinstance(name, dict) else name
        return None if name is None else self._backend.vocabulary.get(name)

    @property
    def id_dtype(self) -> type[np.integer]:
        """The smallest integer type in which arrays of ids are kept: uint16 if it can hold every id, else int32."""
        return np.uint16 if self.size <= 1 << 16 else np.int32

    def check_embedding_rows(self, rows: int, target_rows: int) -> None:
        """Checks that every token has a row of embeddings, in the source vocabulary and in the target vocabulary.

        The token that stands for an image is exempt, because no text contains it: Gemma 3 has one in the tokenizer of
        models without a row for it.

        Raises:
            UserError: when a token has an id of ``rows`` (or ``target_rows``) or more.
        """
        image = self._config.get("image_token")
        image = image.get("content") if isinstance(image, dict) else image
        for vocabulary, count in ((self._backend.vocabulary, rows), (self._backend.target_vocabulary, target_rows)):
            if max(vocabulary.values()) >= count:
                index, token = max((index, token) for token, index in vocabulary.items() if token != image)
                if index >= count:
                    raise UserError(
                        f"the tokenizer gives {token!r} the id {index}, and the model has {count} rows of embeddings; "
                        "copy the tokenizer that belongs to it"
                    )

    def token_bytes(self) -> list[bytes | None]:
        """The bytes that each token stands for, by id; None for special tokens and for ids that have no token.

        Raises:
            UserError: when the bytes of a token depend on its neighbours, as in Marian and M2M-100.
        """
        return self._backend.token_bytes()
