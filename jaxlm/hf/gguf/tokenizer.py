"""The tokenizer of a GGUF file: byte-level BPE or the BPE of SentencePiece, as metadata that llama.cpp reads, with the
chat templates and the tokens that end a text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["tokenizer_metadata"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_ROLES = {"bos": "bos", "pad": "padding", "unk": "unknown", "sep": "seperator", "mask": "mask"}  # as GGUF spells them
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_PATTERNS = {  # regular expression that splits the text -> llama.cpp's name for it
    _LLAMA3: "llama-bpe",
    _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
}


def tokenizer_metadata(tokenizer: Tokenizer, rows: int, ends: Sequence[int]) -> dict[str, Any]:
    """The key-value pairs with which llama.cpp encodes, decodes, and writes conversations as prompts.

    Args:
        tokenizer: the tokenizer.
        rows: the number of the model's embeddings.
        ends: the tokens that end a text.

    Raises:
        UserError: llama.cpp has no such tokenizer, or a GGUF file cannot name all of ``ends``.
    """
    file = tokenizer.files().get("tokenizer.json")
    spec = json.loads(file) if file else {"model": {"type": "SentencePiece"}}
    model = spec["model"]
    if model["type"] != "BPE":
        raise UserError(f"llama.cpp has no tokenizer of the kind {model['type']}; only BPE ones are written to GGUF")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [_UNUSED] * rows
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in spec["added_tokens"]:
        i, text = added["id"], added["content"]
        if added["normalized"] and model.get("byte_fallback"):
            text = text.replace("▁", " ")  # llama.cpp looks for it before it replaces spaces
        tokens[i], kinds[i] = text, _CONTROL if added["special"] else _USER
    if model.get("byte_fallback"):
        out = _sentencepiece(spec, tokens, kinds)
    else:
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        out = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _splitter(spec), "tokenizer.ggml.merges": merges}
    out |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    for role, name in _ROLES.items():
        if (index := tokenizer.vocabulary.special_id(role)) is not None:
            out[f"tokenizer.ggml.{name}_token_id"] = index
    out |= _end_tokens(tokenizer, ends) | _frame(tokenizer) | _chat_templates(tokenizer)
    return {name: value for name, value in out.items() if value != []}


def _end_tokens(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, int]:
    """The end of a text, of a turn, and of a message before the answer of a tool."""
    ends = list(dict.fromkeys(ends))
    eos = tokenizer.eos_id if tokenizer.eos_id in ends else ends[0]
    names = {index: tokenizer.decode([index], skip_special=False) for index in ends}
    others = sorted((index for index in ends if index != eos), key=lambda index: "eom" in names[index])
    if len(others) > 2:
        raise UserError(
            f"a text ends at {', '.join(names.values())}, and a GGUF file has room for 3 end tokens; name fewer as "
            "eos_token_id in generation_config.json"
        )
    places = ("eom",) if len(others) == 1 and "eom" in names[others[0]] else ("eot", "eom")
    found = {"eos": eos, **dict(zip(places, others, strict=False))}
    return {f"tokenizer.ggml.{place}_token_id": index for place, index in found.items()}


def _frame(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether a prompt begins with the begin token and ends with the end token."""
    out = {}
    for place, tokens, own in zip(("bos", "eos"), tokenizer.frame, (tokenizer.bos_id, tokenizer.eos_id), strict=True):
        out[f"tokenizer.ggml.add_{place}_token"] = bool(tokens)
        if tokens not in ([], [own]):
            put = tokenizer.decode(tokens, skip_special=False)
            raise UserError(f"the tokenizer puts {put} around prompts; llama.cpp knows only the {place} token there")
    return out


def _chat_templates(tokenizer: Tokenizer) -> dict[str, Any]:
    templates = tokenizer.chat_template.by_name
    out: dict[str, Any] = {}
    if default := templates.pop("default", None):
        out["tokenizer.chat_template"] = default
    named = {re.sub(r"[^A-Za-z0-9]", "_", name): template for name, template in templates.items()}
    out |= {f"tokenizer.chat_template.{name}": template for name, template in named.items()}
    return out | ({"tokenizer.chat_templates": list(named)} if named else {})


def _splitter(spec: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which text is split before merges."""
    if (spec.get("normalizer") or {}).get("type") not in (None, "NFC"):
        raise UserError(f"llama.cpp has no normalizer {spec['normalizer']['type']!r} before byte-level BPE")
    before = spec.get("pre_tokenizer") or {}
    steps = before["pretokenizers"] if before.get("type") == "Sequence" else [before]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        pattern = steps[0].get("pattern", {}).get("Regex") if len(steps) == 2 else None
        if pattern in _PATTERNS and not last.get("use_regex", True):
            return _PATTERNS[pattern]
    raise UserError("llama.cpp does not split text as this tokenizer does; only as GPT-2, Llama 3 and Qwen 2 do")


def _sentencepiece(spec: dict[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """The pairs of a SentencePiece tokenizer. Merges become scores: the earlier a merge, the higher the score of the
    token that it makes."""
    model = spec["model"]
    scores = [0.0] * len(tokens)
    for rank, merge in enumerate(model["merges"]):
        token = "".join(merge.split(" ", 1) if isinstance(merge, str) else merge)
        if (index := model["vocab"].get(token)) is not None and not scores[index]:
            scores[index] = -1.0 - rank
    for i, token in enumerate(tokens):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[i] = _BYTE
        elif token == model.get("unk_token"):
            kinds[i] = _UNKNOWN
    text = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    prefix = '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
    return {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
    }
