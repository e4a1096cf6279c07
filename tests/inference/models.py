"""Small untrained models with a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxlm import nn
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.inference.generation_config import PLAIN, GenerationConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


@dataclass(frozen=True)
class Handle:
    """What generation, translation and evaluation need of a model."""

    config: Any
    graphdef: Any
    params: Any
    tokenizer: Any
    generation: GenerationConfig = PLAIN


@cache
def letters() -> Tokenizer:
    """Ids 0 to 2 are <pad>, <s>, </s>; then one a character."""
    return Tokenizer.train([LETTERS], kind="char")


def handle(config, *, seed: int = 0, sharpen: float = 1.0, **changes) -> Handle:
    """An untrained model over ``letters``; weights times ``sharpen``, so that its choices differ by context."""
    tokenizer = letters()
    config = replace(config, vocab_size=tokenizer.vocab_size, **changes)
    graphdef, params = nn.build(config, jax.random.key(seed))
    return Handle(config, graphdef, jax.tree.map(lambda x: x * sharpen, params), tokenizer)


NEVER = 999  # as the end token: no model says it


@cache
def decoder(**changes) -> Handle:
    options = {"width": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "layers": 2, "eos_id": NEVER} | changes
    return handle(nn.DecoderConfig(**options), sharpen=3.0)


@cache
def lstm() -> Handle:
    return handle(nn.LSTMConfig(width=24, hidden=32, layers=2, eos_id=NEVER), sharpen=3.0)


@cache
def seq2seq(**changes) -> Handle:
    options = {"width": 32, "heads": 4, "ffn": 48, "encoder_layers": 1, "decoder_layers": 2} | changes
    return handle(nn.preset("tiny", **options), sharpen=2.0)


LENGTH = 128  # of every full forward pass here: one shape


@partial(jax.jit, static_argnames="graphdef")
def _logits(graphdef, params, *arrays):
    return nnx.merge(graphdef, params)(*arrays)


def full_logits(lm: Handle, tokens: list[int], src: list[int] | None = None) -> np.ndarray:
    """Logits after each of ``tokens`` from one uncached pass: causality hides the padding behind them."""
    learned = getattr(lm.config, "positions", "") == "learned"
    padded = np.zeros((1, min(LENGTH, lm.config.max_positions) if learned else LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    arrays = (padded,) if src is None else (np.asarray([src], np.int32), padded)
    return np.asarray(_logits(lm.graphdef, lm.params, *arrays))[0, : len(tokens)]


def greedy_by_full_forward(lm: Handle, prompt: list[int], n: int, src: list[int] | None = None) -> list[int]:
    """Argmax of the whole sequence's logits, again for every token; ends before the end token."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(full_logits(lm, tokens, src)[-1].argmax()))
        if tokens[-1] == lm.config.eos_id:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def total_logp(lm: Handle, prompt: list[int], tokens: list[int], src: list[int] | None = None) -> float:
    """The log-probability of ``tokens`` after ``prompt``, float64."""
    logits = full_logits(lm, prompt + tokens, src).astype(np.float64)
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return sum(logp[len(prompt) + i - 1, token] for i, token in enumerate(tokens))
