"""POST /v1/inspect: why a model continues a text as it does."""

from __future__ import annotations

import asyncio

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.evaluation.insight import Insight, inspect_slices
from jaxlm.inference.translation import decoder_start_token, generation_for_language
from jaxlm.serving.models import ServedModel
from jaxlm.serving.protocol.errors import invalid_field
from jaxlm.serving.protocol.requests import MAX_INSPECTED_TOKENS, InspectionRequest
from jaxlm.serving.protocol.responses import AttentionMap, Attribution, Inspection, TokenCandidate
from jaxlm.serving.routes.generation import prompt_tokens, token_text
from jaxlm.serving.routes.translation import source_tokens
from jaxlm.serving.worker import Caller

__all__ = ["inspect"]

# For each kind of attention: the index of the input whose tokens attend, and of the one they attend to.
_ATTENTION = {"encoder": (0, 0), "self": (-1, -1), "cross": (-1, 0)}


async def inspect(served: ServedModel, body: InspectionRequest, caller: Caller) -> Inspection:
    """The most likely next tokens, attributions and attention.

    Raises:
        ApiError: when the layer or the token does not exist, or a target is given for a model that does not translate.
        UserError: when the text is too long.
    """
    vocabulary = served.lm.config.vocab_size
    if body.layer is not None and body.layer >= served.card.layers:
        raise invalid_field("layer", f"layer is {body.layer}, and {served.name} has {served.card.layers} layers")
    if body.token is not None and body.token >= vocabulary:
        raise invalid_field("token", f"token is {body.token}, and the vocabulary has {vocabulary} tokens")
    if body.target is not None and not served.translates:
        raise invalid_field("target", f"{served.name} does not translate: remove the target")
    inputs = await asyncio.to_thread(_inputs, served, body)
    slices = inspect_slices(served.lm, inputs, token=body.token, method=body.method, steps=body.steps, top=body.top)
    return await asyncio.to_thread(_inspection, served, body, inputs, await served.worker.run(slices, caller.client))


def _inspection(
    served: ServedModel, body: InspectionRequest, inputs: list[list[int]], insight: Insight
) -> Inspection:
    texts = [[token_text(served, token) for token in row] for row in inputs]
    scores = np.concatenate(insight.scores).round(5)
    return Inspection(
        model=served.name, next=[_candidate(served, *each) for each in insight.next],
        attribution=Attribution(
            method=body.method, token=_candidate(served, insight.token, insight.probability), tokens=sum(texts, []),
            scores=scores.tolist(), total=insight.total,
        ),
        attention=[
            _attention_map(kind, insight.attention[kind], texts, body.layer)
            for kind in _ATTENTION if kind in insight.attention
        ],
    )


def _inputs(served: ServedModel, body: InspectionRequest) -> list[list[int]]:
    """The token ids that the model reads: the text, or the source and the beginning of the target."""
    lm = served.lm
    most = min(MAX_INSPECTED_TOKENS, served.context)
    if not served.translates:
        rows = [prompt_tokens(served, body.text)]
    else:
        generation = generation_for_language(lm)
        forced = generation.forced_bos_token_id
        begin = [decoder_start_token(lm.config, generation), *([] if forced is None else [forced])]
        rows = [*source_tokens(lm, [body.text], None, most), [*begin, *lm.tokenizer.encode(body.target or "")]]
    if (longest := max(map(len, rows))) > most:
        raise UserError(f"the text has {longest} tokens, and at most {most} can be inspected: shorten it")
    return rows


def _candidate(served: ServedModel, token: int, probability: float) -> TokenCandidate:
    return TokenCandidate(id=token, text=token_text(served, token), probability=probability)


def _attention_map(kind: str, weights: np.ndarray, texts: list[list[str]], layer: int | None) -> AttentionMap:
    """The attention of one layer from that of all: ``weights`` [layers, heads, rows, columns]."""
    layer = len(weights) - 1 if layer is None else min(layer, len(weights) - 1)
    rows, columns = _ATTENTION[kind]
    return AttentionMap(
        kind=kind, layer=layer, layers=len(weights), rows=texts[rows], columns=texts[columns],
        weights=weights[layer].astype(np.float64).round(4).tolist(),
    )
