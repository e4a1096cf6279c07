"""POST /v1/inspect: why a model would go on as it does."""

from __future__ import annotations

from functools import partial

import numpy as np

from jaxlm.core.errors import UserError
from jaxlm.evaluation.insight import inspect_tokens
from jaxlm.inference.translate import decoder_start_token, generation_for_language
from jaxlm.serving.models import Served
from jaxlm.serving.protocol.errors import ApiError
from jaxlm.serving.protocol.requests import MOST_INSPECTED, InspectRequest
from jaxlm.serving.protocol.responses import AttentionMap, Attribution, Candidate, Inspection
from jaxlm.serving.routes.generation import prompt_tokens, token_text
from jaxlm.serving.routes.translation import sources

_MAPS = {"encoder": (0, 0), "self": (-1, -1), "cross": (-1, 0)}  # which of the inputs look, and at which


async def inspect(served: Served, body: InspectRequest) -> Inspection:
    """UserError for a text that is too long, a layer that there is not, and a target where nothing is translated."""
    if body.layer is not None and body.layer >= served.card.layers:
        raise ApiError(400, f"layer is {body.layer}, and {served.name} has {served.card.layers}", param="layer")
    if body.token is not None and body.token >= served.lm.config.vocab_size:
        raise ApiError(400, f"token is {body.token}, and the model knows {served.lm.config.vocab_size}", param="token")
    if body.target is not None and not served.translates:
        raise ApiError(400, f"{served.name} does not translate: leave the target out", param="target")
    return await served.worker.run(partial(_inspect, served, body))


def _inspect(served: Served, body: InspectRequest) -> Inspection:
    inputs = _inputs(served, body)
    insight = inspect_tokens(
        served.lm, inputs, token=body.token, method=body.method, steps=body.steps, top=body.top
    )
    texts = [[token_text(served, token) for token in row] for row in inputs]
    scores = np.concatenate(insight.scores).round(5)
    return Inspection(
        model=served.name, next=[_candidate(served, *each) for each in insight.next],
        attribution=Attribution(
            method=body.method, token=_candidate(served, insight.token, insight.probability), tokens=sum(texts, []),
            scores=scores.tolist(), total=insight.total,
        ),
        attention=[
            _map(name, insight.attention[name], texts, body.layer) for name in _MAPS if name in insight.attention
        ],
    )


def _inputs(served: Served, body: InspectRequest) -> list[list[int]]:
    """What the model reads."""
    lm = served.lm
    most = min(MOST_INSPECTED, served.context)
    if not served.translates:
        rows = [prompt_tokens(served, body.text)]
    else:
        generation = generation_for_language(lm)
        said = lm.tokenizer.encode(body.target or "")
        first = generation.forced_bos_token_id
        begin = [decoder_start_token(lm.config, generation), *([] if first is None else [first])]
        rows = [*sources(lm, [body.text], None, most), [*begin, *said]]
    if (longest := max(map(len, rows))) > most:
        raise UserError(f"the text has {longest} tokens and {most} can be looked into: shorten it")
    return rows



def _candidate(served: Served, token: int, probability: float) -> Candidate:
    return Candidate(id=token, text=token_text(served, token), probability=probability)


def _map(name: str, weights: np.ndarray, texts: list[list[str]], layer: int | None) -> AttentionMap:
    layer = len(weights) - 1 if layer is None else min(layer, len(weights) - 1)
    rows, columns = _MAPS[name]
    return AttentionMap(
        kind=name, layer=layer, layers=len(weights), rows=texts[rows], columns=texts[columns],
        weights=weights[layer].astype(np.float64).round(4).tolist(),
    )
