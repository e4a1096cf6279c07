"""Validation during training: the loss on held-out batches, and BLEU where it picks the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.core.errors import UserError
from jaxlm.core.tree import unflatten
from jaxlm.data.sources import Bitext
from jaxlm.model import LM
from jaxlm.training.loss import Batch, make_loss
from jaxlm.training.setup import Setup
from jaxlm.training.step import make_eval

__all__ = ["Validator"]


class Validator:
    """Called with the flat parameters every ``eval_every`` steps.

    ``put`` moves a batch to the devices; ``check`` is called between batches and may raise to stop early.
    """

    def __init__(self, setup: Setup, put: Callable[[Batch], Batch], check: Callable[[], None]):
        if setup.config.eval.metric == "bleu":
            if not isinstance(setup.valid_source, Bitext):
                raise UserError('eval.metric "bleu" needs parallel validation text; set data.valid, or use "loss"')
            if jax.process_count() > 1:
                raise UserError('eval.metric "bleu" translates on one host only; use "loss" on several')
        self._setup, self._put, self._check = setup, put, check
        self._sums = make_eval(setup.graphdef, setup.like, make_loss(setup.config.model))

    def __call__(self, params: dict[str, Any]) -> dict[str, float]:
        """``valid_loss`` (nats a token), ``valid_perplexity``, and ``valid_bleu`` (cased, 13a) if that is the metric.
        """
        totals = {"nll": 0.0, "weight": 0.0}
        pending = None
        for index, batch in enumerate(self._setup.valid_loader.iterate()):
            if index == self._setup.config.eval.batches > 0:
                break
            self._check()
            dispatched = self._sums(params, self._put(batch))
            _add(totals, pending)  # of the batch before: never wait for the one just dispatched
            pending = dispatched
        _add(totals, pending)
        loss = totals["nll"] / totals["weight"]
        scores = {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700))}
        if self._setup.config.eval.metric == "bleu":
            scores["valid_bleu"] = self._bleu(params)
        return scores

    def _bleu(self, params: dict[str, Any]) -> float:
        from jaxlm.evaluation.bleu import bleu, translate_corpus  # sacrebleu, only where it is needed

        setup, options = self._setup, self._setup.config.eval
        lm = LM(setup.config.model, setup.graphdef, unflatten(setup.like, params), setup.tokenizer)
        translations, references = translate_corpus(
            lm, setup.valid_source, sentences=options.bleu_sentences, beam=options.beam,
            length_penalty=options.length_penalty, max_length=options.max_length, progress=lambda _: self._check(),
        )
        return bleu(translations, references)["bleu"]


def _add(totals: dict[str, float], sums: dict[str, jax.Array] | None) -> None:
    for name, value in jax.device_get(sums or {}).items():
        totals[name] += float(value)
