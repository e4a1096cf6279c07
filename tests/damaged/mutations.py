"""Ways to damage one file, by its kind. Each returns what it did and the new content; the seed decides."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
from collections.abc import Callable

from tests.hf.damage import DEEP, OTHERS, flip_bits, join_file, vary, vary_inside

Mutation = Callable[[random.Random, bytes], tuple[str, bytes]]
HUGE = "9" * 5000
TYPES = ("F32", "I32", "U32", "F16", "BF16", "I16", "U16", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F64", "I64")


def mutate(rng: random.Random, name: str, data: bytes) -> tuple[str, bytes]:
    """What was done to a file of this name, and its new content."""
    if name.endswith((".gz", ".xz", ".tgz")) and rng.random() < 0.5:
        return _inside_compressed(rng, name, data)
    kinds: list[Mutation] = [_bytes]
    if name.endswith(".safetensors"):
        kinds = [_bytes, _header_bytes, _entry, _entry, _header_text, _metadata]
    elif name.endswith((".json", "metadata", "_METADATA")):
        kinds = [_bytes, _json_value, _json_value, _json_value, _json_keys, _json_text]
    elif name.endswith(".jsonl"):
        kinds = [_bytes, _lines, _lines]
    return rng.choice(kinds)(rng, data)


def _bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    size, few = len(data), rng.randint(1, 40)
    at = rng.randrange(size) if size else 0
    at = at if rng.random() < 0.7 else at % 200  # headers come first
    noise = rng.randbytes(few)
    kind = rng.choice(["bit", "bits", "noise", "cut", "lost", "twice", "zeros", "more", "inserted", "empty", "all"])
    changed = {
        "bit": lambda: data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if size else b"",
        "bits": lambda: flip_bits(rng, data) if size else b"",
        "noise": lambda: data[:at] + noise + data[at + few :],
        "cut": lambda: data[:at],
        "lost": lambda: data[:at] + data[at + few :],
        "twice": lambda: data[: at + few] + data[at:],
        "zeros": lambda: data[:at] + bytes(few) + data[at + few :],
        "more": lambda: data + noise,
        "inserted": lambda: data[:at] + noise + data[at:],
        "empty": lambda: b"",
        "all": lambda: rng.randbytes(min(size, 1000)),
    }[kind]()
    return f"{kind} at {at} of {size}", changed


def _json_value(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """Another value somewhere inside."""
    value = json.loads(data)
    new = vary_inside(rng, value)
    if rng.random() < 0.2:  # characters of a text somewhere inside
        return "another text", _vary_text(rng, data)
    if rng.random() < 0.2:
        return "a deep value", _replace_one(rng, value, DEEP)
    if rng.random() < 0.1:
        return "a huge number", _replace_one(rng, value, HUGE)
    return "another value", json.dumps(new).encode("utf-8", "surrogatepass")


def _vary_text(rng: random.Random, data: bytes) -> bytes:
    """Other characters in one of the longer strings."""
    strings = [match for match in re.finditer(rb'"([A-Za-z0-9+/=]{8,})"', data)]
    if not strings:
        return data
    chosen = rng.choice([max(strings, key=lambda each: len(each[1])), rng.choice(strings)])
    at = chosen.start(1) + rng.randrange(min(len(chosen[1]), rng.choice([8, 10**6])))
    return data[:at] + rng.choice([b"/", b"A", b"Z9", b"////", b""]) + data[at + 1 :]


def _replace_one(rng: random.Random, value: object, text: str) -> bytes:
    """The JSON with a text in place of one value."""
    marker = "@@@"

    def inside(value: object) -> object:
        if isinstance(value, dict) and value and rng.random() < 0.8:
            name = rng.choice(sorted(value))
            return {**value, name: inside(value[name])}
        if isinstance(value, list) and value and rng.random() < 0.8:
            at = rng.randrange(len(value))
            return [*value[:at], inside(value[at]), *value[at + 1 :]]
        return marker

    return json.dumps(inside(value)).replace(f'"{marker}"', text).encode()


def _json_keys(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """A name deleted, duplicated, renamed, or one more."""
    root = node = json.loads(data)
    if not isinstance(node, dict) or not node:
        return "nothing", data
    name = rng.choice(sorted(node))
    while isinstance(node[name], dict) and node[name] and rng.random() < 0.5:
        node = node[name]
        name = rng.choice(sorted(node))
    kind = rng.choice(["deleted", "renamed", "more", "twice"])
    if kind == "twice":
        text = json.dumps(root)
        again, other = json.dumps(name) + ": ", json.dumps(rng.choice(OTHERS[:20]))
        return f"{name} twice", text.replace(again, f"{again}{other}, {again}", 1).encode()
    value = node.pop(name) if kind != "more" else None
    if kind != "deleted":
        node["".join(rng.sample(name, len(name))) or "x"] = value
    return f"{kind} {name}", json.dumps(root).encode()


def _json_text(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    text = rng.choice([
        b"", b"{", b"[]", b"{}", b"null", b"3", b'"x"', b"NaN", HUGE.encode(), DEEP.encode(), b'{"a":' * 50_000,
        b"[" * 500 + b"]" * 500, b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, data + data, data[: len(data) // 2],
        data.replace(b'"', b"'"), data.replace(b":", b": -"), b'{"\\ud800": "\\udfff"}', data.replace(b"1", b"1e999"),
    ])
    return f"text {text[:20]!r}", text


def _split(data: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _header_bytes(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    what, header = _bytes(rng, data[:end])
    return f"header: {what}", header + data[end:]


def _header_text(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    header, tensors = _split(data)
    what, text = rng.choice([_json_value, _json_keys, _json_text])(rng, json.dumps(header).encode())
    return f"header: {what}", join_file(text, tensors)


def _entry(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    """The type, shape or place of one tensor."""
    header, tensors = _split(data)
    name, other = (rng.choice(sorted(set(header) - {"__metadata__"})) for _ in range(2))
    kind = rng.choice(["dtype", "dtype", "shape", "shapes", "offsets", "name", "vary"])
    entry = header[name]
    if kind == "dtype":
        entry["dtype"] = rng.choice(TYPES)
    elif kind == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [1, *entry["shape"]], [-1, *entry["shape"][1:]]])
    elif kind == "shapes":
        entry["shape"], header[other]["shape"] = header[other]["shape"], entry["shape"]
    elif kind == "offsets":
        entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
    elif kind == "name":
        header[name], header[other] = header[other], header[name]
    else:
        field = rng.choice(sorted(entry))
        entry[field] = vary(rng, entry[field])
    return f"{kind} of {name}: {str(header[name])[:80]}", join_file(header, tensors)


def _metadata(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    header, tensors = _split(data)
    metadata = header.setdefault("__metadata__", {"format": "pt"})
    name = rng.choice(sorted(metadata))
    if rng.random() < 0.3:
        del metadata[name]
    else:
        metadata[name] = _bytes(rng, metadata[name].encode())[1].decode("latin-1")
    return f"metadata {name}", join_file(header, tensors)


def _lines(rng: random.Random, data: bytes) -> tuple[str, bytes]:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    odd = rng.choice([
        DEEP.encode(), HUGE.encode(), b'{"text": ' + HUGE.encode() + b"}", b"[]", b"null", b'{"text": 3}', b"\xff",
        b'{"text": "\\ud800"}', b"{" * 2000, b'{"messages": [{"role": 3}]}', b"\x00", b'{"text": "x"}\r{"text": "y"}',
        json.dumps(vary(rng, {"text": "x"})).encode("utf-8", "surrogatepass"),
    ])
    lines[at] = odd if rng.random() < 0.8 else _bytes(rng, lines[at])[1]
    return f"line {at}: {odd[:20]!r}", b"\n".join(lines)


def _inside_compressed(rng: random.Random, name: str, data: bytes) -> tuple[str, bytes]:
    """What is compressed is damaged, or is far larger than what it is made of."""
    module = lzma if name.endswith(".xz") else gzip
    if rng.random() < 0.2:
        bomb = module.compress(bytes(1 << 24))
        return "a bomb", bomb * rng.randint(2, 40)
    what, content = (_lines if ".jsonl" in name else _bytes)(rng, module.decompress(data))
    return f"inside: {what}", module.compress(content)
