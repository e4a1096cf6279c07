"""Ways to damage a model directory, for ``tests.hf.fuzz``. Each changes the files and returns what it did."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

from jaxlm.hf.families.registry import FAMILIES
from jaxlm.hf.tensor_checksums import CHECKSUMS, VERSION
from jaxlm.hf.tensor_files import INDEX_FILE, WEIGHTS_FILE

CONFIG = "config.json"
Files = dict[str, bytes]  # of a directory, by name

DEEP = "[" * 100_000
DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "I8", "U8", "BOOL", "C64", "f32", "F128")
NUMBERS = (
    0, -1, 1, 2, 3, 7, 64, 1000, 10**4, 2**31 - 1, 2**31, 10**9, 2**63 - 1, 2**63, 2**64 - 1, 10**30, -(10**30),
    10**400, 0.0, -0.0, 0.5, 1.5, -1.5, 3.0, 1e-320, 1e20, 1e39, 1e300, float("nan"), float("inf"), float("-inf"),
)
OTHERS = (
    None, True, False, "", "3", "x", "nan", "a\nb", "\u2028", "\ud800", "\0", "../../x", "x" * 5000, [], [1], [-1],
    [0.5], [None], ["a"], [[1]], [10**9], [10**30], [0] * 64, {}, {"a": 1}, {"": None}, {"a": {"b": [{}]}},
)


def vary(rng: random.Random, value: Any) -> Any:
    """Another JSON value: near the given one, or of any type."""
    kind = rng.randrange(4)
    if kind == 0 and isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, value // 2, -value, float(value), str(value)])
    if kind == 0 and isinstance(value, list) and value:
        return rng.choice([value[::-1], value[1:], value * 2, [*value[:-1], vary(rng, value[-1])]])
    if kind == 0 and isinstance(value, dict) and value:
        name = rng.choice(sorted(value))
        return {**value, name: vary(rng, value[name])}
    return rng.choice(NUMBERS if kind < 3 else OTHERS)


def vary_inside(rng: random.Random, value: Any) -> Any:
    """The value, with another one somewhere inside."""
    if not isinstance(value, dict) or not value or rng.random() < 0.1:
        return vary(rng, value)
    name = rng.choice(sorted(value))
    return {**value, name: vary_inside(rng, value[name])}


def flip_bits(rng: random.Random, data: bytes, end: int | None = None) -> bytes:
    """The data with a few bits before ``end`` flipped."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        out[rng.randrange(min(len(out), end or len(out)))] ^= 1 << rng.randrange(8)
    return bytes(out)


def split_file(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file. Without checksums: what is behind them is tried too."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    if "__metadata__" in header:
        header["__metadata__"] = without_checksums(header["__metadata__"])
    return header, data[end:]


def without_checksums(metadata: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if name not in (VERSION, CHECKSUMS)}


def join_file(header: dict[str, Any] | str | bytes, data: bytes) -> bytes:
    header = json.dumps(header) if isinstance(header, dict) else header
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


def weights_file(rng: random.Random, files: Files) -> str:
    return rng.choice(sorted(name for name in files if name.endswith(".safetensors")))


def damage_bytes(rng: random.Random, files: Files) -> str:
    """Weights: truncated, with a wrong length, or with flipped bits."""
    name = weights_file(rng, files)
    data = files[name]
    length = int.from_bytes(data[:8], "little")
    kind = rng.choice(["truncated", "length", "header bits", "data bits", "more"])
    if kind == "truncated":
        data = data[: rng.choice([0, 7, 8, 9, 8 + length, len(data) - 1, rng.randrange(len(data)), rng.randrange(200)])]
    elif kind == "length":
        lengths = [0, 1, 2, length - 1, length + 1, len(data), 10**8, 10**8 + 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1]
        data = rng.choice(lengths).to_bytes(8, "little") + data[8:]
    elif kind == "more":
        data += b"\0" * rng.randint(1, 9)
    else:
        data = flip_bits(rng, data, 8 + length if kind == "header bits" else None)
    files[name] = data
    return f"{name}: {kind}"


def damage_header(rng: random.Random, files: Files) -> str:
    """Weights: another header, or none."""
    name = weights_file(rng, files)
    header, data = split_file(files[name])
    whole = json.dumps(header)
    first = next(name for name in header if name != "__metadata__")
    text = rng.choice([
        "", "{}", "[]", "null", "3", '"x"', "NaN", "{", whole[:-1], whole + "}", whole + " " * 9, " " + whole, DEEP,
        '{"a":' * 100_000, f'{{"a": {DEEP}}}', f'{{"__metadata__": {DEEP}}}', "9" * 5000, '{"a": NaN}',
        "\ufeff" + whole,
        b"\xff\xfe" + whole.encode(), whole.encode("utf-16"), whole.replace('"', "'"), whole.replace("F32", "F\\u0033"),
        f'{{"{first}": {json.dumps(header[first])}, {whole[1:]}',
        f'{{"{first}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, {whole[1:]}',
        f'{whole[:-1]}, "{first}": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}',
        f'{whole[:-1]}, "__metadata__": {{"a": "b"}}, "__metadata__": {{"a": "c"}}}}',
        whole.replace('"dtype"', '"dtype": "F64", "dtype"', 1), whole.replace('"shape"', '"shape": [1], "shape"', 1),
    ])
    files[name] = join_file(text, data)
    return f"{name}: header {text[:40]!r}"


def damage_entry(rng: random.Random, files: Files) -> str:
    """Weights: the entry of one tensor in the header."""
    file = weights_file(rng, files)
    header, data = split_file(files[file])
    name = rng.choice(sorted(set(header) - {"__metadata__"}))
    entry = header[name]
    field = rng.choice(["dtype", "shape", "shape", "data_offsets", "data_offsets", "all", "missing", "more"])
    if field == "dtype":
        entry[field] = rng.choice([*DTYPES, vary(rng, "F32")])
    elif field == "shape":
        shape = entry[field]
        at = rng.randrange(len(shape))
        changed = [*shape[:at], vary(rng, shape[at]), *shape[at + 1 :]]
        entry[field] = rng.choice([
            changed, changed, vary(rng, shape), shape[::-1], [1, *shape], [*shape, 0], [*shape, 1],
        ])
    elif field == "data_offsets":
        begin, end = entry[field]
        other = header[rng.choice(sorted(set(header) - {"__metadata__"}))][field]
        entry[field] = rng.choice([
            other, [end, begin], [begin - 4, end - 4], [begin + 4, end + 4], [begin, end + 4], [vary(rng, begin), end],
            [begin, vary(rng, end)], [begin], [begin, end, end], [2**64 - 4, 2**64], vary(rng, [begin, end]),
        ])
    elif field == "missing":
        del entry[rng.choice(sorted(entry))]
    elif field == "more":
        entry["stride"] = vary(rng, 1)
    else:
        header[name] = vary(rng, entry)
    files[file] = join_file(header, data)
    return f"{file}: {name!r} is {str(header[name])[:200]}"


def damage_names(rng: random.Random, files: Files) -> str:
    """Weights: missing, renamed or superfluous tensors in a file that is otherwise valid."""
    file = weights_file(rng, files)
    header, data = split_file(files[file])
    names = sorted(set(header) - {"__metadata__"})
    name, other = rng.choice(names), rng.choice(names)
    kind = rng.choice(["lost", "hole", "renamed", "swapped", "more", "empty"])
    if kind == "lost":
        begin, end = header.pop(name)["data_offsets"]
        data = data[:begin] + data[end:]
        for entry in (header[each] for each in names if each != name):
            entry["data_offsets"] = [at - (end - begin if at >= end else 0) for at in entry["data_offsets"]]
    elif kind == "hole":
        del header[name]
    elif kind == "renamed":
        header[rng.choice(["", "x", "a\nb", "\ud800", name + ".0", name.upper(), "lm_head.weight"])] = header.pop(name)
    elif kind == "swapped":
        header[name], header[other] = header[other], header[name]
    elif kind == "more":
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
        data += b"\0" * 4
    else:
        header[rng.choice(["extra", "lm_head.weight"])] = {
            "dtype": "F32", "shape": rng.choice([[0], [0, 2**40], [2**63, 0], [0] * 40]),
            "data_offsets": [len(data), len(data)],
        }
    files[file] = join_file(header, data)
    return f"{file}: {kind} {name!r}"


def damage_metadata(rng: random.Random, files: Files) -> str:
    """Weights: the metadata of the header."""
    file = weights_file(rng, files)
    header, data = split_file(files[file])
    name = rng.choice(sorted(header))
    sums = rng.choice(["", "{}", "[]", "3", DEEP, "[[[],1]]", '[["a"]]', json.dumps({name: vary(rng, "0")}), "NaN"])
    metadata = header.get("__metadata__", {"format": "pt"})
    nested = json.dumps(vary_inside(rng, json.loads(metadata.get("jaxlm") or "{}")))
    metadata |= rng.choice([
        {"jaxlm.crc32": sums}, {CHECKSUMS: sums}, {VERSION: "2", CHECKSUMS: sums}, {"jaxlm": vary(rng, "")},
        {"jaxlm": nested}, {"jaxlm": nested},
    ])
    header["__metadata__"] = metadata if rng.random() < 0.8 else vary(rng, metadata)
    files[file] = join_file(header, data)
    return f"{file}: __metadata__ {str(header['__metadata__'])[:200]}"


def shard(files: Files) -> dict[str, str]:
    """Splits the weights into three files; returns tensor name -> file name, as in an index."""
    header, data = split_file(files.pop(WEIGHTS_FILE))
    places = {}
    metadata = header.pop("__metadata__", {})
    for part in range(3):
        file, entries, chosen = f"model-{part + 1}.safetensors", {"__metadata__": metadata}, b""
        for name in sorted(header)[part::3]:
            begin, end = header[name]["data_offsets"]
            entries[name] = header[name] | {"data_offsets": [len(chosen), len(chosen) + end - begin]}
            chosen += data[begin:end]
            places[name] = file
        files[file] = join_file(entries, chosen)
    return places


def damage_index(rng: random.Random, files: Files) -> str:
    """Weights in several files: the index, a file, or the file of a tensor."""
    places: dict[str, Any] = shard(files)
    name, file = rng.choice(sorted(places)), rng.choice(sorted(set(places.values())))
    kind = rng.choice(["place", "name", "file", "map", "index", "text", "weights"])
    index: Any = {"metadata": {"total_size": 1}, "weight_map": places}
    shown: Any = ""
    if kind == "place":
        shown = places[name] = rng.choice([
            vary(rng, file), file, "../" + file, "/etc/passwd", f"./{file}", f"{file}/", "", ".", "..",
            "a/b.safetensors",
            "none.safetensors", ".safetensors", "a\nb.safetensors", "\0.safetensors", "\ud800.safetensors",
            "x" * 300 + ".safetensors", CONFIG, INDEX_FILE,
        ])
    elif kind == "name":
        places[rng.choice(["x", "", "a\nb", name + ".0"])] = places.pop(name)
    elif kind == "file":
        data, another = files.pop(file), files[rng.choice(sorted(set(places.values()) - {file}))]
        files |= rng.choice([{}, {file: b""}, {file.upper(): data}, {file: another}])
    elif kind == "map":
        shown = index["weight_map"] = vary(rng, places)
    elif kind == "index":
        index = rng.choice([{}, {"weight_map": {}}, {"weight_map": None}, index | {"metadata": vary(rng, {})}])
    text = json.dumps(index).encode()
    if kind == "text":
        begin = text[: rng.randrange(len(text))]
        text = rng.choice([b"", b"[]", b"null", b"3", DEEP.encode(), b"\xff" + text, begin, flip_bits(rng, text)])
        shown = text[:40]
    files[INDEX_FILE] = text
    if kind == "weights":
        shown = rng.choice(WEIGHTS)(rng, files)
    return f"{INDEX_FILE}: {kind} of {name!r}, {file}: {str(shown)[:200]!r}"


def damage_config(rng: random.Random, files: Files) -> str:
    """config.json: one or two fields."""
    config = json.loads(files[CONFIG])
    family = FAMILIES.get(config["model_type"])  # None for jaxlm's own model types, whose fields are all known
    known = set(config) if family is None else {name for field in family.fields for name in field.hf_defaults}
    described = []
    for _ in range(rng.choice([1, 1, 1, 2])):
        name = rng.choice([*sorted(known), *sorted(set(config) & known), *sorted(config), "jaxlm", "unknown"])
        kind = rng.choice(["other", "other", "other", "removed", "inside"])
        if kind == "removed":
            config.pop(name, None)
        elif kind == "other":
            config[name] = vary(rng, config.get(name))
        else:
            name, config_value = rng.choice(_INSIDE)
            config[name] = config_value(rng)
        described.append(f"{name} = {str(config.get(name, 'absent'))[:200]}")
    files[CONFIG] = json.dumps(config).encode()
    return f"{CONFIG}: " + ", ".join(described)


def _rope(rng: random.Random) -> dict[str, Any]:
    given = {"rope_type": rng.choice(["linear", "dynamic", "llama3", "yarn", "longrope", "su", "default"])}
    given |= {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
    } if rng.random() < 0.5 else {}
    name = rng.choice([
        *given, "rope_theta", "factor", "mscale", "mscale_all_dim", "attention_factor", "beta_fast", "truncate", "type",
        "partial_rotary_factor", "original_max_position_embeddings", "full_attention", "sliding_attention", "x",
    ])
    return given | {name: vary(rng, given.get(name, 1.0))}


def _runtime(rng: random.Random) -> dict[str, Any]:
    names = [
        "dtype", "scan_layers", "remat", "dropout", "layer_groups", "encoder_layer_groups", "decoder_layer_groups", "x",
    ]
    values = [[1, 2], [3], [1, 1, 1], [2, 2], [10**9], [-1, 4], "float32", "full", vary(rng, [1, 2])]
    return {"runtime": {rng.choice(names): rng.choice(values)}}


def _kinds(rng: random.Random) -> list[Any]:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    return rng.choice([kinds, kinds[:2], kinds * 2, vary(rng, kinds), [*kinds[:2], vary(rng, "x")]])


_INSIDE: list[tuple[str, Callable[[random.Random], Any]]] = [
    ("rope_scaling", _rope), ("rope_parameters", _rope), ("jaxlm", _runtime), ("layer_types", _kinds),
    ("mlp_only_layers", lambda rng: vary(rng, [1])), ("rope_scaling", _rope),
    ("eos_token_id", lambda rng: [vary(rng, 2), vary(rng, 3)]),
]


def damage_config_text(rng: random.Random, files: Files) -> str:
    """config.json: its text."""
    text = files[CONFIG]
    text = rng.choice([
        b"", b"{", b"[]", b"null", b"3", b'"x"', b"NaN", b"9" * 5000, b"\xff\xfe" + text,
        text.decode().encode("utf-16"), b"\xef\xbb\xbf" + text, text + text, text[: rng.randrange(len(text))],
        flip_bits(rng, text), flip_bits(rng, text),
        text[:-1] + b', "vocab_size": 3}', b'{"model_type": {"a": 1}}', b'{"model_type": ["llama"]}',
    ])
    files[CONFIG] = text
    return f"{CONFIG}: text {text[:60]!r}"


WEIGHTS = [damage_bytes, damage_header, damage_entry, damage_entry, damage_names, damage_metadata]
DAMAGE = [*WEIGHTS, damage_index, damage_index, *[damage_config] * 7, damage_config_text]
