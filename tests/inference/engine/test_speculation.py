"""With a draft, the distribution of the text is the model's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import scipy.stats

from jaxlm import nn
from jaxlm.inference.engine.engine import Engine
from jaxlm.inference.engine.requests import Request
from tests.inference.engine.serving import serve
from tests.inference.models import Handle, full_logits, random_params

PROMPT, SAMPLES, KEPT = (3, 1, 4), 500, 4


def tiny(seed: int) -> Handle:
    config = nn.DecoderConfig(vocab_size=6, width=8, heads=2, ffn=8, layers=1, eos_id=9)
    graphdef, params = random_params(config, seed=seed, sharpen=3.0)
    return Handle(config, graphdef, params, None)


def joint(lm: Handle) -> dict[tuple[int, int], float]:
    """The probabilities of the first two tokens under top-k sampling with k = ``KEPT``."""
    def after(tokens):
        logits = full_logits(lm, tokens)[-1].astype(np.float64)
        logits[np.argsort(logits)[:-KEPT]] = -np.inf
        return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()

    first = after(PROMPT)
    return {(a, b): first[a] * p for a in range(6) if first[a] for b, p in enumerate(after((*PROMPT, a))) if p}


def surprise(counts: Counter, expected: dict[tuple[int, int], float]) -> float:
    """The p-value of a chi-square test: the probability that counts of this distribution are further from it."""
    pairs = [(counts[pair], SAMPLES * p) for pair, p in expected.items() if SAMPLES * p >= 5]
    pairs.append((SAMPLES - sum(n for n, _ in pairs), SAMPLES - sum(n for _, n in pairs)))
    seen, wanted = np.array([pair for pair in pairs if pair[1] > 1]).T
    return scipy.stats.chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue


def test_the_distribution_is_that_of_the_model():
    lm, draft = tiny(0), tiny(1)
    engine = Engine(lm, draft=draft, num_draft_tokens=2, slots=32, context=16, page_size=4)
    answers = serve(engine, [Request(PROMPT, 3, temperature=1.0, top_k=KEPT, seed=5, n=SAMPLES)])
    counts = Counter(tuple(answer.tokens[:2]) for answer in answers.values())
    assert len(answers) == SAMPLES and set(counts) <= set(joint(lm))
    assert 0.2 < engine.stats.accepted_tokens / engine.stats.draft_tokens < 0.9
    assert surprise(counts, joint(lm)) > 0.001
    assert surprise(counts, joint(draft)) < 1e-9  # it would show
