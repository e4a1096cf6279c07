"""``GenerationConfig``: the settings of generation_config.json, by which a model's makers want it to generate.

Names and meanings are those of transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.config import override as override_fields
from jaxlm.core.errors import UserError, shown
from jaxlm.inference.sampling import check_sampling
from jaxlm.nn.config import ModelConfig

__all__ = ["FILE", "PLAIN", "GenerationConfig"]

FILE = "generation_config.json"

# Settings that change the tokens that transformers generates, and are not supported here; with the values that change
# nothing.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "constraints": (), "diversity_penalty": (0,), "dola_layers": (), "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,), "epsilon_cutoff": (0,), "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (), "force_words_ids": ([],), "guidance_scale": (1,), "max_time": (),
    "num_beam_groups": (1,), "num_return_sequences": (1,), "penalty_alpha": (0,), "sequence_bias": ([], {}),
    "token_healing": (False,), "top_h": (), "typical_p": (1,), "watermarking_config": (),
}
# Those of them that count in one way of generating only.
_WHEN_SAMPLING = ("epsilon_cutoff", "eta_cutoff", "top_h", "typical_p")
_IN_BEAM_SEARCH = ("diversity_penalty", "num_beam_groups")
_WHEN_GREEDY = ("penalty_alpha",)
_NOT_WHEN_GREEDY = ("num_return_sequences",)
# Settings that say how to compute or what to return, or repeat config.json.
_NEUTRAL = frozenset(
    "_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight "
    "assistant_lookbehind bos_token_id cache_config cache_implementation compile_config continuous_batching_config "
    "disable_compile is_assistant low_memory max_cache_len max_matching_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores pad_token_id "
    "prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values return_dict_in_generate speculation_type "
    "target_lookbehind transformers_version use_cache use_mtp".split()
)
_ONE_OR_MORE = ("eos_token_id", "forced_eos_token_id", "stop_strings")  # a list, or one value without brackets
_TOP_K = 50  # what transformers uses where a file samples and does not say


@dataclass(frozen=True)
class GenerationConfig:
    """Default settings of ``generate`` and ``translate``. Lengths are in tokens. None or an empty list is "not set".

    ``max_length`` and ``min_length`` count the prompt, which for an encoder-decoder is its start token;
    ``max_new_tokens`` and ``min_new_tokens`` do not, and come first where both are set.
    """

    eos_token_id: tuple[int, ...] = ()  # each of them ends a text; (): the eos_id of the model's configuration
    decoder_start_token_id: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_beams: int | None = None
    length_penalty: float = 1.0
    early_stopping: Literal[False, True, "never"] = False  # see ``jaxlm.inference.beam``
    repetition_penalty: float = 1.0  # arXiv:1909.05858, section 4.1
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None  # the first new token, if the prompt has one token
    forced_eos_token_id: tuple[int, ...] = ()  # allowed as the last token, where a text reaches its limit
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()  # suppressed as the first token that is not forced
    renormalize_logits: bool = False  # log-probabilities sum to 1 again after all of the above
    stop_strings: tuple[str, ...] = ()
    others: Mapping[str, Any] = field(default_factory=dict)  # settings of the file that are not supported or not known

    def replace(self, **changes: Any) -> GenerationConfig:
        """The same settings but for some fields."""
        return dataclasses.replace(self, **changes)

    def given(
        self, *, beam: int | None = None, temperature: float | None = None, **others: Any
    ) -> GenerationConfig:
        """These settings, replaced by the options of a caller that are not None.

        ``beam`` sets ``num_beams``. A ``temperature`` of 0 turns sampling off, one above 0 turns it on. A caller who
        asks for beam search or for sampling gets it, whatever the file says about the other. What the file says of
        sampling alone (``top_k``, ``top_p``, ``min_p``) counts only where there is some.
        """
        if beam is not None:
            others["num_beams"] = beam
            if beam > 1 and temperature is None:
                others["do_sample"] = False
        if temperature is not None:
            others["do_sample"] = temperature > 0
            others["temperature"] = temperature or self.temperature
            if temperature > 0 and beam is None:
                others["num_beams"] = 1
        others = {name: value for name, value in others.items() if value is not None}
        check_sampling(others)
        samples = others.get("do_sample", self.do_sample)
        return self.replace(**({} if samples else {"top_k": 0, "top_p": 1.0, "min_p": 0.0}) | others)

    def override(self, changes: Mapping[str, str]) -> GenerationConfig:
        """These settings with fields set by name from strings, as on a command line.

        Raises:
            UserError: on an unknown name or a wrong value.
        """
        if "others" in changes:
            raise UserError(f"'others' is not a setting of {FILE}")
        return override_fields(self, changes)._checked()

    def limits(self, prompts: Sequence[int], default: int) -> list[int]:
        """How many tokens may follow prompts of these lengths; ``default`` where no setting says so.

        Raises:
            UserError: when a prompt is as long as ``max_length``.
        """
        if self.max_new_tokens is not None or self.max_length is None:
            return [default if self.max_new_tokens is None else self.max_new_tokens] * len(prompts)
        if max(prompts, default=0) >= self.max_length:
            raise UserError(
                f"a prompt has {max(prompts)} tokens, and the max_length of {FILE} allows {self.max_length} for prompt "
                "and text: set max_new_tokens"
            )
        return [self.max_length - prompt for prompt in prompts]

    def check(self) -> None:
        """To be called before text is generated, and not before: a model may be loaded for something else, and be asked
        to sample although its file does not.

        Raises:
            UserError: when the file asks for something that is not supported, and that counts in the way in which these
                settings generate: greedily, by sampling or by beam search.
        """
        if self.do_sample and self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it cannot be negative (0 turns it off)")
        searches = (self.num_beams or 1) > 1
        idle = {*([] if self.do_sample else _WHEN_SAMPLING), *([] if searches else _IN_BEAM_SEARCH)}
        idle |= set(_WHEN_GREEDY if self.do_sample or searches else _NOT_WHEN_GREEDY)
        for name, value in self.others.items():
            if name in _UNSUPPORTED and name not in idle and value is not None and value not in _UNSUPPORTED[name]:
                raise UserError(
                    f"the model's {FILE} asks for {name} = {shown(value)}, which is not supported; generate without "
                    "that file (--ignore-generation-config, lm.replace(generation=jaxlm.GenerationConfig()))"
                )

    def notes(self) -> list[str]:
        """Warnings for a user who relies on the file."""
        unknown = [shown(name)[1:-1] for name in self.others if name not in _UNSUPPORTED]
        return [f"{', '.join(unknown)} in {FILE}: unknown settings, without effect"] if unknown else []

    @classmethod
    def read(cls, file: Path, fields: Mapping[str, Any], *, older: bool = False) -> GenerationConfig:
        """The settings that the fields of a file hold.

        ``older`` says that the file is a config.json, where older models have them; most of its fields are none.

        Raises:
            UserError: on a value of the wrong kind; the message names the file.
        """
        names = {field.name for field in dataclasses.fields(cls)} - {"others"}
        given = {name: value for name, value in fields.items() if name in names and value is not None}
        for name in _ONE_OR_MORE:
            if name in given and not isinstance(given[name], list):
                given[name] = [given[name]]
        if given.get("do_sample"):
            given.setdefault("top_k", _TOP_K)
        others = {
            name: value for name, value in fields.items()
            if name not in names and (name in _UNSUPPORTED if older else name not in _NEUTRAL)
        }
        try:
            return from_dict(cls, given)._checked().replace(others=others)
        except UserError as error:
            raise UserError(f"{file}: {error}") from None

    def _checked(self) -> GenerationConfig:
        for name in ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size"):
            if (getattr(self, name) or 0) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be negative")
        if self.num_beams is not None and self.num_beams < 1:
            raise UserError(f"num_beams is {self.num_beams}; it must be at least 1")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")
        if () in self.bad_words_ids:
            raise UserError("bad_words_ids holds an empty sequence; remove it")
        return self

    def to_json(self, config: ModelConfig) -> dict[str, Any]:
        """The fields to write for a model: special tokens, settings that differ from the defaults, and ``others``."""
        ids: dict[str, Any] = {f"{role}_token_id": getattr(config, f"{role}_id") for role in ("bos", "eos", "pad")}
        if config.kind == "seq2seq":
            ids["decoder_start_token_id"] = config.bos_id
        said = {
            name: value for name, value in to_dict(self.replace(others={})).items()
            if getattr(self, name) != getattr(PLAIN, name) and name != "others"
        }
        if self.do_sample:
            said["top_k"] = self.top_k
        for name in ("eos_token_id", "forced_eos_token_id"):
            if len(said.get(name, ())) == 1:
                (said[name],) = said[name]
        return ids | said | dict(self.others)


PLAIN = GenerationConfig()  # greedy, up to the model's end token
