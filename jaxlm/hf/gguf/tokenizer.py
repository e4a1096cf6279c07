"""The tokenizer of a GGUF file: byte-level BPE or the BPE of SentencePiece, as metadata that llama.cpp reads."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from jaxlm.core.errors import UserError
from jaxlm.data.tokenizers.tokenizer import Tokenizer

__all__ = ["tokenizer_metadata"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_PATTERNS = {  # regular expression that splits the text -> llama.cpp's name for it
    _LLAMA3: "llama-bpe",
    _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2",
}


def tokenizer_metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The key-value pairs with which llama.cpp encodes and decodes. ``rows`` is the number of the model's embeddings.

    Raises:
        UserError: llama.cpp has no such tokenizer.
    """
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        path = Path(directory) / "tokenizer.json"
        spec = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"model": {"type": "SentencePiece"}}
    model = spec["model"]
    if model["type"] != "BPE":
        raise UserError(f"llama.cpp has no tokenizer of the kind {model['type']}; only BPE ones are written to GGUF")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    kinds = [_UNUSED] * rows
    for token, i in model["vocab"].items():
        tokens[i], kinds[i] = token, _NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], _CONTROL if added["special"] else _USER
    if model.get("byte_fallback"):
        out = _sentencepiece(spec, tokens, kinds)
    else:
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        out = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _splitter(spec), "tokenizer.ggml.merges": merges}
    out |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (index := getattr(tokenizer, f"{role}_id")) is not None:
            out[f"tokenizer.ggml.{name}_token_id"] = index
    prompt, plain = tokenizer.encode_prompt("a"), tokenizer.encode("a")
    out["tokenizer.ggml.add_bos_token"] = prompt[: len(prompt) - len(plain)] == [tokenizer.bos_id]
    return {name: value for name, value in out.items() if value != []}


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
