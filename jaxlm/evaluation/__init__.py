"""How good a model is, how fast, and why it says what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxlm.core.lazy import lazy

if TYPE_CHECKING:
    from jaxlm.evaluation.comparison import Comparison, compare
    from jaxlm.evaluation.insight import Insight, TokenScores, inspect_tokens, score_tokens
    from jaxlm.evaluation.likelihood import bitext_perplexity, dialogue_perplexity, perplexity
    from jaxlm.evaluation.scoring import evaluate
    from jaxlm.evaluation.speed import tokens_per_second
    from jaxlm.evaluation.translation_quality import bleu, translate_corpus
else:
    __getattr__, __dir__, __all__ = lazy(
        __name__, comparison="Comparison compare", insight="Insight TokenScores inspect_tokens score_tokens",
        likelihood="bitext_perplexity dialogue_perplexity perplexity", scoring="evaluate", speed="tokens_per_second",
        translation_quality="bleu translate_corpus",
    )  # fmt: skip
