"""Reads the tokenizer of a Hugging Face directory: finds its files and merges what they say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import parse_json, read_json_if_there
from jaxlm.data.tokenizers.backends import (
    FastBackend,
    TokenizerBackend,
    add_config_tokens,
    add_named_tokens,
    named_tokens,
    read_vocabulary,
)
from jaxlm.data.tokenizers.limits import check_charsmaps, library_errors

_MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")  # SentencePiece
_MARIAN = ("source.spm", "target.spm", "vocab.json")
_M2M = ("sentencepiece.bpe.model", "vocab.json")
_MERGES = ("vocab.json", "merges.txt")
_CONVENTIONAL = {  # the names to look for when no file says which token has the role
    "pad": ("<pad>", "[PAD]"),
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>"),
}
_BY_MODEL = {  # the tokenizer class for a model_type of config.json, when no file names the class
    "t5": "T5Tokenizer", "mt5": "T5Tokenizer", "umt5": "T5Tokenizer", "mbart": "MBartTokenizer",
    "m2m_100": "NllbTokenizer", "bart": "BartTokenizer", "roberta": "RobertaTokenizer",
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe"), "Qwen2Tokenizer"),
}
_MOST_SENTINELS = 10_000
_ROBERTA = ("BartTokenizer", "RobertaTokenizer")
_END_OF_TEXT = "<|endoftext|>"
_BYTE_LEVEL: dict[str, dict[str, Any]] = {  # the classes, with the roles of tokens that they give where no file does
    "GPT2Tokenizer": {}, "CodeGenTokenizer": {}, **dict.fromkeys(_ROBERTA, {}),
    "Qwen2Tokenizer": {"bos_token": None, "eos_token": _END_OF_TEXT, "pad_token": _END_OF_TEXT},
}
_QWEN2 = (  # the regular expression with which Qwen2Tokenizer splits text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Models whose tokenizer.json counts in transformers 5.24 where tokenizer_class says LlamaTokenizer.
_FILE_COUNTS = ("mistral", "mixtral", "phi3", "olmo2", "qwen2")


def find_tokenizer(directory: Path) -> str | None:
    """The file that decides which tokenizer a directory holds; None if it holds none.

    The files of Marian and M2M-100 come before a tokenizer.json, which can hold only one of two language sides.
    """
    def there(*names: str) -> bool:
        return all((directory / name).is_file() for name in names)

    if there(*_MARIAN):
        return "source.spm"
    if there(*_M2M):
        return "sentencepiece.bpe.model"
    for name in ("tokenizer.json", *_MODELS):
        if there(name):
            return name
    return "merges.txt" if there(*_MERGES) else None


def read_tokenizer(path: Path) -> tuple[TokenizerBackend, dict[str, Any], str]:
    """The tokenizer of a directory, or of one file with the configs beside it.

    Returns:
        the backend; the content of tokenizer_config.json with what other files add to it; the tokenizer class without
        "Fast", or "" if no file names it.

    Raises:
        UserError: when there is no tokenizer, or when one of its files cannot be read.
    """
    directory = path if path.is_dir() else path.parent
    name = find_tokenizer(path) if path.is_dir() else path.name
    if name is None or not (directory / name).is_file():
        raise UserError(
            f"{directory / (name or 'tokenizer.json')} does not exist; name a tokenizer.json or a directory that holds "
            "one, a SentencePiece model, or vocab.json and merges.txt"
        )
    try:
        return _read(directory, name)
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{directory}: its tokenizer_config.json makes no sense ({line}); copy it again") from error


def _read(directory: Path, name: str) -> tuple[TokenizerBackend, dict[str, Any], str]:
    config = read_json_if_there(directory / "tokenizer_config.json")
    model = read_json_if_there(directory / "config.json")
    family = _family(directory, name, config, model)
    converted = name.endswith((".model", ".spm", ".txt"))
    if not config:
        config = {"tokenizer_class": (converted and family) or "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False}
    if name == "merges.txt":
        config = _BYTE_LEVEL.get(family, {}) | config
    _merge_specials(directory, config, converted)
    _merge_templates(directory, config)
    _check(directory, config)
    backend = _backend(directory / name, family, config, model)
    _name_roles(config, model, backend.vocabulary, converted)
    if isinstance(backend, FastBackend) and backend.raw.post_processor is None:
        _add_frame(backend, config, begins=name == "tokenizer.model")
    return backend, config, family


def _check(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises UserError when the name of a token or language is not a string, or ``extra_ids`` is not a count."""
    roles = [f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
    for key in (*roles, "src_lang", "tgt_lang"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) and key in roles else value
        if value is not None and not isinstance(value, str):
            raise UserError(f"{directory / 'tokenizer_config.json'}: {key} is {value!r}; name a token")
    count = config.get("extra_ids")
    if count is not None and (type(count) is not int or not 0 <= count <= _MOST_SENTINELS):
        raise UserError(
            f"{directory / 'tokenizer_config.json'}: extra_ids is {count!r}; give a number up to {_MOST_SENTINELS:,}"
        )


def _family(directory: Path, name: str, config: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    named = str(config.get("tokenizer_class") or model.get("tokenizer_class") or "").removesuffix("Fast")
    if name == "source.spm":
        return "MarianTokenizer"
    if name == "sentencepiece.bpe.model" and (directory / "vocab.json").is_file():
        return "M2M100Tokenizer"
    if named == "MT5Tokenizer":
        return "T5Tokenizer"
    generic = named in ("", "PreTrainedTokenizer", "TokenizersBackend")
    if not generic or (name == "tokenizer.json" and named):
        return named
    default = {"spiece.model": "T5Tokenizer", "tokenizer.model": "LlamaTokenizer", "merges.txt": "GPT2Tokenizer"}
    return _BY_MODEL.get(str(model.get("model_type")), default.get(name, ""))


def _backend(file: Path, family: str, config: dict[str, Any], model: Mapping[str, Any]) -> TokenizerBackend:
    if file.name == "merges.txt":
        return FastBackend(_byte_level(file, family, config))
    if file.suffix in (".model", ".spm"):
        from jaxlm.data.tokenizers import sentencepiece  # protobuf, which only this needs

        if family == "MarianTokenizer":
            return sentencepiece.read_marian(file.parent, config)
        if family == "M2M100Tokenizer":
            return sentencepiece.read_m2m(file.parent, config)
        return sentencepiece.convert(file, family, config)
    try:
        data = file.read_bytes()
        check_charsmaps(parse_json(data))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a tokenizer.json ({error}); save it again") from None
    with library_errors(f"{file} is not a tokenizer.json"):
        raw = tokenizers.Tokenizer.from_buffer(data)
    if family == "LlamaTokenizer" and _is_first_llama(raw):
        if model.get("model_type") in _FILE_COUNTS:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"  # also where it is saved with another model
        else:
            _split_as_llama(raw, config)
    rows = (model.get("text_config") or model).get("vocab_size") if model else None
    add_config_tokens(raw, config, most=(rows or 0) if model else None)
    try:
        return FastBackend(raw)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _is_first_llama(raw: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer.json is of the kind that Llama 2 was first published with: it puts a space before every
    stretch of text between special tokens."""
    normalizer = b"" if raw.normalizer is None else raw.normalizer.__getstate__()
    return isinstance(raw.model, models.BPE) and b'"Prepend"' in normalizer


def _split_as_llama(raw: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Gives such a file the pre-tokenizer and the decoder of ``LlamaTokenizer``, as transformers does since 5, and as
    SentencePiece was used in training: there is a space before the text, and none after a special token."""
    prefix = config.get("add_prefix_space") is not False
    scheme = ("always" if config.get("legacy") else "first") if prefix else "never"
    raw.normalizer = None
    raw.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    raw.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _byte_level(file: Path, family: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer, as GPT-2's or Qwen's, from vocab.json and merges.txt."""
    if family not in _BYTE_LEVEL:
        raise UserError(
            f"{file.parent} has no tokenizer.json, and how {family} splits text is not known here; save it with "
            "transformers, which writes one"
        )
    read_vocabulary(file.with_name("vocab.json"))  # checks what the library does not
    with library_errors(f"{file} and vocab.json do not make a tokenizer"):
        raw = tokenizers.Tokenizer(models.BPE.from_file(str(file.with_name("vocab.json")), str(file)))
    prefix = bool(config.get("add_prefix_space"))
    qwen = family == "Qwen2Tokenizer"
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=not qwen)
    if qwen:
        raw.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2), "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence([split, raw.pre_tokenizer])
    raw.decoder = decoders.ByteLevel()
    names = ("<s>", "<pad>", "</s>", "<unk>", "<mask>") if family in _ROBERTA else (_END_OF_TEXT,)
    add_named_tokens(raw, config)
    raw.add_special_tokens([
        AddedToken(name, special=True, normalized=False, lstrip=name == "<mask>")
        for name in dict.fromkeys((*names, *named_tokens(config))) if qwen or raw.token_to_id(name) is not None
    ])
    if family in _ROBERTA:
        ends = [(name, raw.token_to_id(name)) for name in ("</s>", "<s>")]
        if None in dict(ends).values():
            raise UserError(f"{file.with_name('vocab.json')} lacks <s> or </s>, which {family} has; copy it again")
        raw.post_processor = processors.RobertaProcessing(*ends, trim_offsets=True, add_prefix_space=prefix)
    return raw


def _merge_specials(directory: Path, config: dict[str, Any], converted: bool) -> None:
    """Adds what older directories keep in special_tokens_map.json and added_tokens.json. As in transformers, the first
    replaces roles that tokenizer_config.json gives, and adds to its list of tokens without a role."""
    if "added_tokens_decoder" in config:
        return
    listed = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    for key, value in read_json_if_there(directory / "special_tokens_map.json").items():
        if key == "extra_special_tokens" and isinstance(value, list) and not isinstance(listed, dict):
            value = [*(listed or ()), *(token for token in value if token not in (listed or ()))]
        if key != "additional_special_tokens" or not listed:
            config[key] = value
    if converted and (added := read_json_if_there(directory / "added_tokens.json")):
        special = set(named_tokens(config))
        config["added_tokens_decoder"] = {
            str(index): {"content": token, "special": token in special, "normalized": token not in special}
            for token, index in sorted(added.items(), key=lambda item: item[1])
        }


def _merge_templates(directory: Path, config: dict[str, Any]) -> None:
    """Adds chat templates from files of their own, which replace one in tokenizer_config.json."""
    named = {}
    if template := read_json_if_there(directory / "chat_template.json").get("chat_template"):
        named["default"] = template
    for file in [directory / "chat_template.jinja", *sorted(directory.glob("additional_chat_templates/*.jinja"))]:
        if file.is_file():
            try:
                named["default" if file.parent == directory else file.stem] = file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise UserError(f"{file} cannot be read ({error}); copy it again") from None
    if list(named) == ["default"]:
        config["chat_template"] = named["default"]
    elif named:
        config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]


def _name_roles(
    config: dict[str, Any], model: Mapping[str, Any], vocabulary: Mapping[str, int], converted: bool
) -> None:
    """Fills in the names of the pad, bos and eos tokens: from the ids in config.json, or by convention."""
    for role, conventional in _CONVENTIONAL.items():
        if not config.get(f"{role}_token"):
            index = model.get(f"{role}_token_id")
            index = index[0] if isinstance(index, list) else index
            if index is None:
                usual = f"{role}_token" not in config and (converted or not model)
                known = (name for name in conventional if usual and name in vocabulary)
            else:
                known = (token for token, other in vocabulary.items() if other == index)
            config[f"{role}_token"] = next(known, None)


def _add_frame(backend: FastBackend, config: Mapping[str, Any], begins: bool) -> None:
    """Adds a post-processor as the flags of tokenizer_config.json say. ``begins`` is the default of ``add_bos_token``:
    all models that come with a SentencePiece tokenizer.model were trained with the bos token."""
    roles = {"bos": config.get("add_bos_token", begins), "eos": config.get("add_eos_token")}
    tokens = {}
    for role, wanted in roles.items():
        token = config.get(f"{role}_token")
        token = token["content"] if isinstance(token, dict) else token
        if wanted and token in backend.vocabulary:
            tokens[role] = token
    if tokens:
        single = [*filter(None, [tokens.get("bos"), "$A", tokens.get("eos")])]
        ids = [(token, backend.vocabulary[token]) for token in dict.fromkeys(tokens.values())]
        backend.raw.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
