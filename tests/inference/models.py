"""Small untrained models with a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from jaxlm import nn
from jaxlm.core.tree import Params, flatten, unflatten
from jaxlm.data.tokenizers.backends import FastBackend
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
    """Ids 0 to 2 are <pad>, <s>, </s>; then there is one for each character."""
    return Tokenizer.train([LETTERS], kind="char")


def random_params(config, *, seed: int = 0, sharpen: float = 1.0) -> tuple[nnx.GraphDef, Params]:
    """A model with random weights of about the scale of ``nn.build`` times ``sharpen``, made by NumPy: nothing is
    compiled for it."""
    rng = np.random.default_rng(seed)
    graphdef, like = nn.abstract(config)
    table_std = config.width**-0.5 if getattr(config, "embed_scale", False) else 0.02

    def make(path: str, shape: tuple[int, ...]) -> np.ndarray:
        *_, layer, kind = path.split("/")
        if kind in ("scale", "bias"):
            return np.full(shape, kind == "scale", np.float32)
        std = table_std if kind == "table" else shape[-2] ** -0.5 * (0.5 if layer in ("o", "down") else 1)
        return rng.normal(scale=std, size=shape).astype(np.float32)

    values = {path: jnp.asarray(sharpen * make(path, leaf.shape)) for path, leaf in flatten(like).items()}
    return graphdef, unflatten(like, values)


def handle(config, *, seed: int = 1, sharpen: float = 1.0, **changes) -> Handle:
    """An untrained model over ``letters``; weights times ``sharpen``, so that its choices differ by context."""
    tokenizer = letters()
    config = replace(config, vocab_size=tokenizer.vocab_size, **changes)
    graphdef, params = random_params(config, seed=seed, sharpen=sharpen)
    return Handle(config, graphdef, params, tokenizer)


def with_config(lm: Handle, **changes) -> Handle:
    """The same program and parameters under another configuration: for what is decided outside the program, such as
    the end token, and for models that are refused before anything is computed."""
    return replace(lm, config=replace(lm.config, **changes))


def with_special_token(lm: Handle, token: str) -> Handle:
    """The same model, one of whose tokens is special."""
    raw = tokenizers.Tokenizer.from_str(lm.tokenizer.backend.raw.to_str())
    raw.add_special_tokens([token])
    return replace(lm, tokenizer=Tokenizer(FastBackend(raw), lm.tokenizer.config))


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
    """Logits after each of ``tokens`` from one uncached pass. The padding behind them is hidden from all of them."""
    length = min(LENGTH, lm.config.position_limit or LENGTH)
    rows = [tokens] if src is None else [src, tokens]
    arrays = [np.array([[*row, *[lm.config.pad_id] * (length - len(row))]], np.int32) for row in rows]
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
