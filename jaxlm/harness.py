"""The model ``jaxlm`` for EleutherAI's lm-evaluation-harness.

    python -m jaxlm.harness --model jaxlm --model_args path=DIR --tasks NAME,... [options of lm_eval]

runs ``lm_eval`` with this model registered. ``lm_eval`` by itself knows only the models in its own table and looks for
no plugins; the only other code that it imports before it makes the model is what a task's YAML file names with
``!function``. No other module of jaxlm imports this one.

Tokens, prefixes, truncation and windows are those of the harness's own model for transformers, so figures compare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import lm_eval.models  # noqa: F401  its own table is read only into an empty registry
import numpy as np
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from jaxlm.core.errors import UserError
from jaxlm.inference.batching import batches_by_length, bucket, pad_rows, power_of_two
from jaxlm.inference.decoding import generate_tokens
from jaxlm.inference.generation import ending_at
from jaxlm.model import load
from jaxlm.nn.config import KVCache

__all__ = ["JaxLM"]

if "jaxlm" not in model_registry:  # by name: as a program this module is another than when it is imported
    model_registry.register("jaxlm", target="jaxlm.harness:JaxLM")

_LOGITS = 1 << 26  # of one batch, 256 MiB
_LONGEST_CONTEXT = 2048  # of models without a context of their own
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")

LogLikelihood = tuple[float, bool]  # in nats, and whether greedy decoding gives the same tokens


class JaxLM(TemplateLM):
    """A language model for the harness.

    Args:
        path: the model, as ``jaxlm.load`` takes it.
        adapter: a LoRA adapter of PEFT, merged into the weights.
        max_length: the number of tokens that the model reads at most; by default its own context.
        max_gen_toks: the number of tokens to generate where a task does not say.
        add_bos_token: whether prompts get the special tokens that the tokenizer adds; by default as the tokenizer does.
        prefix_token_id: the token before a text without context; by default the begin token, else the end token.
        batch_size: rows at a time; "auto" fits the vocabulary.
        max_batch_size: the limit of "auto".
        seed: of sampling.
        dtype: of the weights.
        kv_cache: how decoding stores keys and values, and scoring rounds them; by default as the model was saved.
        device: not used. The harness always passes what torch would need; JAX reads JAX_PLATFORMS.

    Raises:
        UserError: the model cannot be read, has no tokenizer, or is a translation model.
    """

    def __init__(
        self,
        path: str,
        adapter: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        batch_size: int | str = "auto",
        max_batch_size: int = 64,
        seed: int = 0,
        dtype: str = "float32",
        kv_cache: KVCache | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self.lm = load(path, adapter=adapter, dtype=dtype, kv_cache=kv_cache)
        if self.lm.config.kind == "seq2seq":
            raise UserError(f"{path} is a translation model, and the harness asks language models")
        if self.lm.tokenizer is None:
            raise UserError(f"{path} has no tokenizer: put a tokenizer.json beside its config.json")
        own = self.lm.config.context_length or _LONGEST_CONTEXT
        self.max_length = max_length or own
        self.max_gen_toks = max_gen_toks
        fits = _LOGITS // (self.max_length * self.lm.config.vocab_size)
        self.batch_size = max(1, min(max_batch_size, fits)) if str(batch_size).startswith("auto") else int(batch_size)
        self._path, self._seed, self._add_bos = path, seed, add_bos_token
        tokenizer = self.lm.tokenizer
        ends = (prefix_token_id, tokenizer.bos_id, tokenizer.eos_id, self.lm.config.bos_id)
        self._prefix = next(token for token in ends if token is not None)

    @property
    def eot_token_id(self) -> int:
        eos = self.lm.tokenizer.eos_id
        return self.lm.config.eos_id if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        return self._path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text. Special tokens that the text spells are recognised. Those that the tokenizer adds to a
        prompt are added unless the caller asks not to, or the text spells the first of them."""
        tokenizer = self.lm.tokenizer
        ids = tokenizer.encode(string, parse_special=True)
        framed = self._add_bos is not False if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(tokenizer.decode([self._prefix], skip_special=False)):
            framed = False
        before, after = tokenizer.frame if framed else ([], [])
        return [*before, *ids, *after]

    # Scoring

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[LogLikelihood]:
        """Scores continuations of contexts; a request is (key, context, continuation). Contexts are cut from the left.

        Requests that differ in their last token only, as one-letter answers do, are read once.
        """
        reads: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored by a model that reads "
                    f"{self.max_length}"
                )
            tokens = (*context, *continuation)[-(self.max_length + 1) :]
            reads.setdefault(tokens[:-1], []).append(i)
        rows, out = list(reads), [(0.0, True)] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests")
        for batch in batches_by_length([len(row) for row in rows], self.batch_size):
            read = self._read([rows[r] for r in batch])
            for r, (known, best, last) in zip(batch, read, strict=True):
                for i in reads[rows[r]]:
                    key, _, continuation = requests[i]
                    first, final = len(rows[r]) - len(continuation), continuation[-1]
                    total = float(known[first:].sum(dtype=np.float64) + last[final])
                    out[i] = total, bool(np.array_equal(best[first:], continuation))
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, out[i])
                    bar.update()
        bar.close()
        return out

    def _read(self, rows: Sequence[Sequence[int]]):
        """For each row of n tokens: log-probabilities ``[n - 1]`` of its tokens but the first, the likeliest token
        ``[n]`` after each, and log-probabilities ``[V]`` of what may follow the row."""
        lengths = [len(row) for row in rows]
        shape = power_of_two(len(rows)), max(max(lengths), min(bucket(max(lengths)), self.max_length))
        padded = np.ones(shape[0], np.int32)
        padded[: len(rows)] = lengths
        tokens_BxT = pad_rows(rows, shape, self.lm.config.pad_id)
        found = map(np.asarray, _read(self.lm.graphdef, self.lm.params, tokens_BxT, padded))
        known, best, last = found
        return [(known[r, : n - 1], best[r, :n], last[r]) for r, n in enumerate(lengths)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self._prefix, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (nats, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += nats
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # Generating

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        out = [""] * len(requests)
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests")
        for members in groups.values():
            texts = self._generate([requests[i].args[0] for i in members], requests[members[0]].args[1])
            for i, text in zip(members, texts, strict=True):
                out[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
            bar.update(len(members))
        bar.close()
        return out

    def _generate(self, prompts: Sequence[str], given: Mapping[str, Any]) -> list[str]:
        options = normalize_gen_kwargs(dict(given), self.max_gen_toks)
        eos = self.lm.tokenizer.decode([self.eot_token_id], skip_special=False)
        stop = handle_stop_sequences(options.pop("until", None), eos=eos)
        count, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        sampling = {name: options.pop(name) for name in _SAMPLING if name in options}
        if options:
            known = ", ".join(("until", "max_gen_toks", "do_sample", *_SAMPLING))
            raise UserError(f"{next(iter(options))} is not an option of generation here; there are {known}")
        room = self.max_length - count
        if room < 1:
            reads = self.max_length
            raise UserError(f"{count} new tokens leave no room in a model that reads {reads}; lower max_gen_toks")
        decode = self.lm.tokenizer.decode
        sampling = {"temperature": 1.0} | sampling if sampled else {"temperature": 0.0}
        found = generate_tokens(
            self.lm, [self.tok_encode(prompt)[-room:] or [self._prefix] for prompt in prompts],
            ending_at(self.lm, self.lm.generation, stop), max_new_tokens=count, **sampling, seed=self._seed,
            batch_size=self.batch_size, finished=_stops(decode, stop),
        )
        return [postprocess_generated_text(decode(tokens), stop, None) for tokens in found]

    # Chat

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a prompt. Without ``add_generation_prompt`` it ends within its last message, which the
        model continues. A system message is left out where the template cannot take one."""
        try:
            text = self.lm.tokenizer.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except UserError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = self.lm.tokenizer.chat_template.render(others, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].lstrip()
        begin = text.rindex(last.rstrip())
        return text[: begin + len(last if text.startswith(last, begin) else last.rstrip())]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The text of the template, which the harness stores with the results.

        Raises:
            UserError: a template is asked for by name.
        """
        if isinstance(chat_template, str):
            raise UserError(f"the chat template {chat_template!r} cannot be chosen; the tokenizer's default is used")
        return self.lm.tokenizer.chat_template.source if chat_template else None


def _stops(decode: Callable[[list[int]], str], stop: Sequence[str]) -> Callable[[int, list[int]], bool]:
    def finished(_: int, tokens: list[int]) -> bool:
        text = decode(tokens)
        return any(each in text for each in stop if each)

    return finished


@partial(jax.jit, static_argnames=("graphdef",))
def _read(graphdef, params, tokens_BxT: jax.Array, lengths_B: jax.Array):
    """``[B, T - 1]`` log-probabilities of the tokens but the first, ``[B, T]`` likeliest next tokens, and ``[B, V]``
    log-probabilities of what follows the first ``lengths`` tokens of each row."""
    model = nnx.merge(graphdef, params)
    named = {"length_B": lengths_B} if model.config.rotates_by_length else {}
    logits_BxTxV = model(tokens_BxT, **named).astype(jnp.float32)
    norm_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    known_BxT = jnp.take_along_axis(logits_BxTxV[:, :-1], tokens_BxT[:, 1:, None], axis=-1)[..., 0] - norm_BxT[:, :-1]
    row_B, last_B = jnp.arange(len(lengths_B)), lengths_B - 1
    last_BxV = logits_BxTxV[row_B, last_B] - norm_BxT[row_B, last_B][:, None]
    return known_BxT, jnp.argmax(logits_BxTxV, axis=-1), last_BxV


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
