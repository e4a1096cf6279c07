"""The formats that jaxlm reads, each as a small good example with what reads it."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, processors

from jaxlm.checkpoint.store import Store
from jaxlm.compression.names import load_recipe
from jaxlm.core.config import from_dict, to_dict
from jaxlm.core.leaves import LoRA, QArray, is_leaf
from jaxlm.core.tree import flatten, map_params
from jaxlm.core.untrusted import read_sealed_json, seal
from jaxlm.data.batches.token_cache import encode_cached
from jaxlm.data.sources import jsonl
from jaxlm.data.sources.spec import open_source
from jaxlm.data.sources.types import Documents
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.directory import export_model, read_generation, read_model, write_model
from jaxlm.hf.peft.adapters import read_adapter, save_adapter
from jaxlm.inference.generation_config import GenerationConfig
from jaxlm.model import load
from jaxlm.nn.config import DecoderConfig
from jaxlm.training.config import Experiment
from jaxlm.training.metrics import read_metrics
from tests.data.tokenizers.pieces import family
from tests.models import build

CONFIG = DecoderConfig(vocab_size=24, width=32, heads=2, layers=1, ffn=32, max_positions=32)
TEXTS = ["the cat sat on the mat", "a", "", "x" * 40, "größe 日本 \x00"]


@dataclass(frozen=True)
class Format:
    """A format that is read.

    - ``make`` writes a good example into a directory.
    - ``read`` reads it, and raises UserError where it is damaged.
    - ``damaged`` are the names of the files to damage, as patterns.
    - ``checked`` are those whose checksums make every wrong value known.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    damaged: Sequence[str]
    checked: Sequence[str] = ()


# Models ---------------------------------------------------------------------------------------------------------------


def _weights(path: Path) -> Any:
    config, params, _, _ = read_model(path)
    return config, flatten(params)


def _foreign(path: Path) -> None:
    """A model as other programs write it: without checksums."""
    write_model(path, CONFIG, build(CONFIG)[1], None)
    tensors = load_file(path / "model.safetensors")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((path / "config.json").read_text())
    fields["rope_scaling"] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                              "original_max_position_embeddings": 16}
    (path / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if name != "jaxlm"}))


def _sharded(path: Path) -> None:
    _foreign(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in tensors if places[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _quantized(params: Any, group: int = 8) -> Any:
    """Kernels of the layers in four bits, and a half of another pruned."""
    rng = np.random.default_rng(0)

    def leaf(path: str, dense: Any) -> Any:
        if is_leaf(dense) or not path.endswith("/kernel"):
            return dense
        *lead, n_in, n_out = dense.shape
        codes = rng.integers(-8, 8, (*lead, n_out, n_in)) * rng.integers(0, 2, (*lead, n_out, n_in))
        scale = rng.random((*lead, n_out, n_in // group)) + 0.1
        return QArray(jnp.asarray(codes, jnp.int8), jnp.asarray(scale, jnp.float32), None, 4, group)

    return map_params(leaf, params)


def _coded(path: Path) -> None:
    write_model(path, CONFIG, _quantized(build(CONFIG)[1]), None, storage="huffman")


def _compressed_tensors(path: Path) -> None:
    export_model(path, CONFIG, _quantized(build(CONFIG)[1]), None, format="compressed-tensors")


def _packed_words(method: str) -> Callable[[Path], None]:
    """GPTQ or AWQ: any words are codes."""
    def make(path: Path) -> None:
        _foreign(path)
        rng, tensors = np.random.default_rng(0), load_file(path / "model.safetensors")
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            n_out, n_in = tensors.pop(name).shape
            module = name.removesuffix(".weight")
            shape = (n_in // 8, n_out) if method == "gptq" else (n_in, n_out // 8)
            for part, size in (("qweight", shape), ("qzeros", (n_in // 16, n_out // 8))):
                tensors[f"{module}.{part}"] = rng.integers(-(2**31), 2**31, size).astype(np.int32)
            tensors[f"{module}.scales"] = rng.random((n_in // 16, n_out)).astype(np.float16)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        fields = json.loads((path / "config.json").read_text())
        layout = {"quant_method": method, "bits": 4, "group_size": 16, "sym": False, "zero_point": True}
        (path / "config.json").write_text(json.dumps(fields | {"quantization_config": layout}))

    return make


def _adapter(path: Path) -> None:
    params = map_params(
        lambda name, leaf: LoRA(leaf, jnp.ones((*leaf.shape[:-1], 2)), jnp.ones((*leaf.shape[:-2], 2, leaf.shape[-1])),
                                jnp.ones((*leaf.shape[:-2], 1, 1))) if "/attn/" in name and "kernel" in name else leaf,
        build(CONFIG)[1])
    save_adapter(path, CONFIG, params)
    file = path / "adapter_config.json"
    patterns = {"rank_pattern": {"q_proj|x.*": 2}, "alpha_pattern": {r".*\.v_proj": 2}}
    file.write_text(json.dumps(json.loads(file.read_text()) | patterns | {"layers_pattern": None}))


def _generation(path: Path) -> None:
    given = GenerationConfig(do_sample=True, temperature=0.5, bad_words_ids=((1, 2), (3,)), stop_strings=("x",))
    fields = given.to_json(CONFIG) | {"watermarking_config": None, "cache_config": {"a": [1]}}
    (path / "generation_config.json").write_text(json.dumps(fields))


# Tokenizers -----------------------------------------------------------------------------------------------------------


def _tokenizer(path: Path) -> Any:
    tokenizer = Tokenizer.load(path)
    ids = [tokenizer.encode(text) for text in TEXTS[:1]] + tokenizer.encode_batch(TEXTS[1:])
    for call in (tokenizer.vocabulary.token_bytes, lambda: tokenizer.encode_prompt("a b", parse_special=True),
                 lambda: tokenizer.encode_prompt("a b"), lambda: tokenizer.encode_source(["a b"]),
                 lambda: tokenizer.chat_template.render([{"role": "user", "content": "x"}])):
        _unless_refused(call)
    return ids, [tokenizer.decode(each) for each in ids], tokenizer.fingerprint()


def _unless_refused(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except ValueError as error:
        if type(error).__name__ != "UserError" or len(str(error).splitlines()) != 1:
            raise RuntimeError(f"no error of one line: {error!r}") from error
        return str(error)


def _byte_level(path: Path) -> None:
    Tokenizer.train(TEXTS, vocab_size=290).save(path)
    file = path / "tokenizer_config.json"
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
    fields = {"chat_template": template, "added_tokens_decoder": None, "additional_special_tokens": ["<s>"],
              "extra_special_tokens": {"x_token": "</s>"}, "model_max_length": 64}
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    (path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    (path / "chat_template.jinja").write_text(template)


def _other_models(path: Path) -> None:
    """A word model with a template of special tokens, and regular expressions."""
    raw = RawTokenizer(models.WordLevel({"the": 0, "cat": 1, "<unk>": 2, "</s>": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    raw.add_special_tokens(["</s>", "<unk>"])
    raw.save(str(path / "tokenizer.json"))


def _unigram(path: Path) -> None:
    """Scores of pieces, with the table of a normaliser in a tokenizer.json, which grows if it is read in vain."""
    family("T5Tokenizer", path / "given")
    Tokenizer.load(path / "given").save(path)
    shutil.rmtree(path / "given")
    file = path / "tokenizer.json"
    spec = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t)|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"},
             "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, spec["pre_tokenizer"]]}
    file.write_text(json.dumps(spec))


def _merges(path: Path) -> None:
    raw = Tokenizer.train(TEXTS, vocab_size=290).backend.raw
    spec = json.loads(raw.to_str())["model"]
    vocab = {name: index for name, index in spec["vocab"].items()} | {"<|endoftext|>": len(spec["vocab"])}
    (path / "vocab.json").write_text(json.dumps(vocab))
    merges = [" ".join(each) if isinstance(each, list) else each for each in spec["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    fields = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(fields))


def _pieces(name: str) -> Callable[[Path], None]:
    return lambda path: family(name, path)


# Data -----------------------------------------------------------------------------------------------------------------


def _rows() -> bytes:
    others = {"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}
    rows = [{"text": f"{text}{i}", "messages": [
        {"role": "user", "content": "x"}, {"role": "assistant", "content": text}]} for i, text in enumerate(TEXTS * 4)]
    return "".join(json.dumps(row | others) + "\n" for row in rows).encode()


def _data(path: Path) -> None:
    text = "\n".join(TEXTS[:2] * 20).encode()
    for name, data in {"x.jsonl": _rows(), "x.txt": text}.items():
        (path / name).write_bytes(data)
        (path / f"{name}.gz").write_bytes(gzip.compress(data))
        (path / f"{name}.xz").write_bytes(lzma.compress(data))
    np.save(path / "x.npy", np.arange(50, dtype=np.uint16))
    with tarfile.open(path / "dev.tgz", "w:gz") as tar:
        for language in ("de", "en"):
            member = tarfile.TarInfo(f"dev/newstest2013.{language}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))


def _sources(path: Path) -> Any:
    specs = [f"{scheme}:{path}/x.jsonl" for scheme in ("jsonl", "chat", "instruct", "preference")]
    specs += [f"jsonl:{path}/x.jsonl.{suffix}" for suffix in ("gz", "xz")]
    specs += [f"text:{path}/x.txt.gz[:90%]", f"text:{path}/x.txt.xz", f"tokens:{path}/x.npy",
              f"bitext:{path}/x.txt,{path}/x.txt.gz", f"wmt14:{path}/en-de:valid"]
    return [_unless_refused(lambda spec=spec: _source(spec)) for spec in specs]


def _source(spec: str) -> Any:
    source = open_source(spec, bad_rows="report")
    rows = getattr(source, "texts", None) or getattr(source, "rows", None)
    found = source.ids if rows is None else list(rows)
    return repr(found)[:10_000], rows.notes() if hasattr(rows, "notes") else []


def _index(path: Path) -> None:
    (path / "x.jsonl").write_bytes(_rows())
    _read_index(path)


def _read_index(path: Path) -> Any:
    least, jsonl._MIN_BYTES_TO_INDEX = jsonl._MIN_BYTES_TO_INDEX, 0
    try:
        rows = jsonl.JsonlRows(path / "x.jsonl", dict, lambda n: slice(0, n))
        return repr(list(rows)), rows.content_key
    finally:
        jsonl._MIN_BYTES_TO_INDEX = least


def _cache(path: Path) -> None:
    Tokenizer.train(TEXTS, vocab_size=262).save(path / "tokenizer")
    _read_cache(path)


def _read_cache(path: Path) -> Any:
    documents = Documents("x", TEXTS[:2] * 5, append_eos=True)
    found = encode_cached(documents, Tokenizer.load(path / "tokenizer"), str(path / "cache"))
    return np.asarray(found.ids), np.asarray(found.lengths), found.notes


# Runs -----------------------------------------------------------------------------------------------------------------


def _state() -> Mapping[str, Any]:
    rng = np.random.default_rng(0)
    return {"params": {"w": jnp.asarray(rng.random((40, 30)), jnp.float32), "b": jnp.ones(5, jnp.bfloat16)},
            "step": jnp.int32(3)}


def _checkpoint(path: Path) -> None:
    store = Store(path / "checkpoints")
    store.save(3, _state(), {"examples": 11, "history": [1.5, None]}, 0.25)
    store.close()


def _restore(path: Path) -> Any:
    store = Store(path / "checkpoints", read_only=True)
    try:
        return *store.restore(3, _state()), store.best_steps(1)
    finally:
        store.close()


def _run(path: Path) -> None:
    """A run as older versions wrote it: without a checksum of its experiment."""
    store = Store(path / "checkpoints")
    store.save(3, {"params": flatten(build(CONFIG)[1])}, {})
    store.close()
    (path / "experiment.json").write_text(json.dumps(to_dict(Experiment(model=CONFIG))))


def _info(path: Path) -> None:
    """A compressed model with what its config.json says of how it was made."""
    recipe = load_recipe("w4a16-rtn-g64").to_json()
    info = {"recipe": recipe, "training": {"recipe": "w8a8"}, "parents": ["x"]}
    write_model(path, CONFIG, _quantized(build(CONFIG)[1]), None, info=info)


def _load(path: Path) -> Any:
    lm = load(path)
    return lm.config, flatten(lm.params), lm.info.get("notes"), repr(lm.recipe)


def _experiment(path: Path) -> None:
    fields = seal(to_dict(Experiment(model=CONFIG)))
    (path / "experiment.json").write_text(json.dumps(fields, indent=2))


def _metrics(path: Path) -> None:
    rows = [{"step": i, "loss": 1.0 / (i + 1), "note": "x"} for i in range(20)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _recipe(path: Path) -> None:
    fields = {"recipe": load_recipe("w4a16-rtn-g64").to_json(), "choices": [{"kernel": "x", "final": 0.5}]}
    (path / "compression.json").write_text(json.dumps(fields))


FORMATS = {
    "config.json": Format(_foreign, _weights, ["config.json"]),
    "safetensors": Format(_foreign, _weights, ["model.safetensors"]),
    "safetensors in parts": Format(_sharded, _weights, ["model*"]),
    "safetensors of jaxlm": Format(
        lambda path: write_model(path, CONFIG, build(CONFIG)[1], None), _weights, ["*.safetensors"], ["*"]),
    "coded weights": Format(_coded, _weights, ["model.safetensors", "config.json"], ["model.safetensors"]),
    "compressed-tensors": Format(
        _compressed_tensors, _weights, ["model.safetensors", "config.json"], ["*.safetensors"]),
    "GPTQ": Format(_packed_words("gptq"), _weights, ["model.safetensors", "config.json"]),
    "AWQ": Format(_packed_words("awq"), _weights, ["model.safetensors", "config.json"]),
    "adapter": Format(_adapter, read_adapter, ["adapter*"], ["*.safetensors"]),
    "generation_config.json": Format(_generation, read_generation, ["generation_config.json"]),
    "tokenizer.json": Format(_byte_level, _tokenizer, ["tokenizer.json"]),
    "tokenizer.json of words": Format(_other_models, _tokenizer, ["tokenizer.json"]),
    "tokenizer.json of pieces": Format(_unigram, _tokenizer, ["tokenizer.json"]),
    "settings of tokenizers": Format(_byte_level, _tokenizer, ["tokenizer_config.json", "special*", "chat*"]),
    "vocab.json, merges.txt": Format(_merges, _tokenizer, ["*"]),
    **{f"SentencePiece, {name}": Format(_pieces(f"{name}Tokenizer"), _tokenizer, ["*"])
       for name in ("Llama", "T5", "Marian", "M2M100", "Nllb")},
    "data": Format(_data, _sources, ["*"]),
    "index of rows": Format(_index, _read_index, ["x.jsonl.index.npy"], ["*"]),
    "token cache": Format(_cache, _read_cache, ["cache/*/*"], ["about.json"]),
    "checkpoint": Format(_checkpoint, _restore, ["checkpoints/**/*"], ["*"]),
    "run": Format(_run, _weights, ["experiment.json", "checkpoints/*/data/*"], ["metadata"]),
    "model with its history": Format(_info, _load, ["config.json", "generation_config.json"]),
    "experiment.json": Format(
        _experiment, lambda path: from_dict(Experiment, read_sealed_json(path / "experiment.json"), stored=True),
        ["*"], ["*"]),
    "metrics.jsonl": Format(_metrics, lambda path: read_metrics(path / "metrics.jsonl"), ["*"]),
    "compression.json": Format(_recipe, lambda path: load_recipe(str(path / "compression.json")), ["*"]),
}
