"""Models of one family side by side: what each costs, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxlm.core.progress import Progress
from jaxlm.core.tree import count_bytes, count_params
from jaxlm.data.sources.spec import open_source
from jaxlm.evaluation.scoring import evaluate
from jaxlm.evaluation.speed import tokens_per_second


@dataclass(frozen=True)
class Comparison:
    """One model's figures. ``bleu`` is None for a language model; ``notes`` say what was expanded at load."""

    name: str
    bytes_on_disk: int
    bytes_in_memory: int
    bits_per_weight: float  # on disk, over all weights, embeddings included
    perplexity: float
    bleu: float | None
    tokens_per_second: float
    signature: str | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    lms: Mapping[str, Any], spec: str, *, beam: int = 5, sentences: int = 0, progress: Progress | None = None
) -> list[Comparison]:
    """The figures of each model on ``spec``, in the order given.

    Args:
        lms: loaded models (``jaxlm.load``) by name. They share a tokenizer; ``info`` tells their size on disk.
        spec: see ``evaluate``; speed is measured on it too, the models in turn.
        beam, sentences: of the translations.
        progress: see ``evaluate``; the names of the models are put in front.
    """
    scores = {}
    for name, lm in lms.items():
        def tell(what: str, done: int, total: int, name: str = name) -> None:
            if progress is not None:
                progress(f"{name}: {what}", done, total)

        scores[name] = evaluate(lm, spec, beam=beam, sentences=sentences, progress=tell)
    speeds = tokens_per_second(lms, open_source(spec, "test"))
    return [
        Comparison(
            name=name,
            bytes_on_disk=lm.info["bytes_on_disk"],
            bytes_in_memory=count_bytes(lm.params),
            bits_per_weight=8 * lm.info["bytes_on_disk"] / count_params(lm.params),
            perplexity=scores[name]["perplexity"],
            bleu=scores[name].get("bleu"),
            tokens_per_second=speeds[name],
            signature=scores[name].get("signature"),
            notes=tuple(lm.info["notes"]),
        )
        for name, lm in lms.items()
    ]
