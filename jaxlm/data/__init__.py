"""Data: opens sources of text, tokens and sentence pairs, tokenizes them, and makes the batches of training and
evaluation.

    from jaxlm.data import DataConfig, Tokenizer, make_loader, open_source

    source = open_source("jsonl:stories.jsonl[:99%]")
    tokenizer = Tokenizer.train(source.texts, vocab_size=8192)
    loader = make_loader(DataConfig(seq_len=256, batch_size=16), source, tokenizer, train=True)
    batch = loader.batch(0)  # inputs, targets and weights, each [16, 256]

Only ``make_loader`` imports grain, and with it jax.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.data.batches.batch import Batch
    from jaxlm.data.batches.encoding import EncodedDocuments, encode_documents
    from jaxlm.data.batches.loader import Loader, make_loader
    from jaxlm.data.calibration import calibration_batches
    from jaxlm.data.config import DataConfig
    from jaxlm.data.contamination import Contamination, find_contamination
    from jaxlm.data.sources.spec import open_source
    from jaxlm.data.sources.types import Bitext, Dialogues, Documents, Mixture, Preferences, Source, Tokens
    from jaxlm.data.tokenizers.from_config import tokenizer_from_config
    from jaxlm.data.tokenizers.tokenizer import Tokenizer
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, batches__batch="Batch", batches__encoding="EncodedDocuments encode_documents",
        batches__loader="Loader make_loader", calibration="calibration_batches", config="DataConfig",
        contamination="Contamination find_contamination", sources__spec="open_source",
        sources__types="Bitext Dialogues Documents Mixture Preferences Source Tokens",
        tokenizers__from_config="tokenizer_from_config", tokenizers__tokenizer="Tokenizer",
    )
