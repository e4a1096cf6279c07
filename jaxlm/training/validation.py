"""Validation during training: the loss on held-out batches, and BLEU where it selects the best checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax

from jaxlm.core.errors import UserError
from jaxlm.core.host_memory import on_host
from jaxlm.core.sharding import make_mesh
from jaxlm.core.tree import unflatten
from jaxlm.data.batches.batch import Batch
from jaxlm.data.sources.types import Bitext
from jaxlm.inference.translation import translate
from jaxlm.model import LM
from jaxlm.training.multihost.distributed import all_gather_object
from jaxlm.training.objectives.objective import make_validation_loss
from jaxlm.training.setup import Setup
from jaxlm.training.step import make_eval

__all__ = ["Validator"]


class Validator:
    """Scores flat parameters on the validation data.

    Args:
        setup: the training.
        put: moves a batch to the devices.
        check: is called between batches, and may raise to stop early.

    Raises:
        UserError: when ``eval.metric`` is "bleu" and the validation data are not translations.
    """

    def __init__(self, setup: Setup, put: Callable[[Batch], Batch], check: Callable[[], None]):
        if setup.config.eval.metric == "bleu":
            if not isinstance(setup.valid_source, Bitext):
                raise UserError('eval.metric "bleu" needs parallel validation text; set data.valid, or use "loss"')
        self._setup, self._put, self._check = setup, put, check
        loss, needs_reference = make_validation_loss(setup.config)
        self._sums = make_eval(setup.graphdef, setup.like, loss, setup.reference.build if needs_reference else None)

    def __call__(self, params: dict[str, Any], reference: dict[str, Any] | None = None) -> dict[str, float]:
        """``valid_loss`` (nats per token, or per pair of preferences), ``valid_perplexity``, the loss's other sums, and
        ``valid_bleu`` (cased, 13a) if that is the metric."""
        totals = {"nll": 0.0, "weight": 0.0}
        pending = None
        for index, batch in enumerate(self._setup.valid_loader.iterate()):
            if index == self._setup.config.eval.batches > 0:
                break
            self._check()
            dispatched = self._sums(params, self._put(batch), reference)
            _add(totals, pending)  # of the previous batch: do not wait for the one just dispatched
            pending = dispatched
        _add(totals, pending)
        means = {name: total / totals["weight"] for name, total in totals.items()}
        scores = {"valid_loss": means["nll"]}
        if not self._setup.config.dpo.beta:
            scores["valid_perplexity"] = math.exp(min(means["nll"], 700))
        scores |= {f"valid_{name}": mean for name, mean in means.items() if name not in ("nll", "weight", "tokens")}
        if self._setup.config.eval.metric == "bleu":
            scores["valid_bleu"] = self._bleu(params)
        return scores

    def _bleu(self, params: dict[str, Any]) -> float:
        """Each process translates its share of the sentences, on one of its own devices."""
        from jaxlm.evaluation.translation_quality import bleu  # sacrebleu, only where it is needed

        setup, options = self._setup, self._setup.config.eval
        part, parts = jax.process_index(), jax.process_count()
        mesh, progress = nullcontext(), lambda _: self._check()
        if parts > 1:
            params = jax.tree.map(on_host, params)
            mesh = jax.set_mesh(make_mesh(devices=jax.local_devices()[:1]))
            progress = None  # processes have unequal batches here, and could not agree on where to stop
        lm = LM(setup.config.model, setup.graphdef, unflatten(setup.like, params), setup.tokenizer)
        count = options.bleu_sentences or len(setup.valid_source.src)
        with mesh:
            mine = translate(
                lm, setup.valid_source.src[part:count:parts], beam=options.beam, length_penalty=options.length_penalty,
                max_length=options.max_length, progress=progress,
            )
        translations = [""] * len(setup.valid_source.src[:count])
        for process, shard in enumerate(all_gather_object(mine)):
            translations[process::parts] = shard
        return bleu(translations, setup.valid_source.tgt[:count])["bleu"]


def _add(totals: dict[str, float], sums: dict[str, jax.Array] | None) -> None:
    for name, value in jax.device_get(sums or {}).items():
        totals[name] = totals.get(name, 0.0) + float(value)
