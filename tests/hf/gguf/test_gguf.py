"""GGUF: blocks against a reader written here from the description of the format, whole files against llama.cpp."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import urllib.request

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import processors

import jaxlm
from jaxlm import nn
from jaxlm.compression.quantize.rtn import quantize
from jaxlm.core.errors import UserError
from jaxlm.core.leaves import dequantize_tree
from jaxlm.core.tree import flatten, map_params
from jaxlm.data.tokenizers.tokenizer import Tokenizer
from jaxlm.hf.gguf.ggml_types import CODE_TYPES, GGML_TYPES, encode_codes, encode_values
from jaxlm.inference.generation_config import PLAIN
from jaxlm.model import LM
from jaxlm.nn.config import DecoderConfig, RopeScaling

TOKENIZER = Tokenizer.train(["the cat sat on the mat, and the cat purred"], "bpe", 280)
CONFIG = DecoderConfig(
    vocab_size=TOKENIZER.vocab_size, width=64, heads=4, kv_heads=2, layers=2, ffn=96, max_positions=64
)
GPT2 = dataclasses.replace(
    CONFIG, kv_heads=0, activation="gelu_tanh", norm="layernorm", positions="learned", qkv_bias=True, out_bias=True,
    mlp_bias=True, norm_bias=True,
)
QWEN3 = dataclasses.replace(CONFIG, qk_norm="head", head_dim=32)


# A reader ------------------------------------------------------------------------------------------------------------


def decode(kind, data, count):
    """Float64 weights of whole blocks, one at a time."""
    out = []
    size = GGML_TYPES[kind].block_bytes
    for start in range(0, len(data), size):
        block = bytes(data[start : start + size])
        if kind in ("F32", "F16"):
            out.append(struct.unpack("<f" if kind == "F32" else "<e", block)[0])
            continue
        (d,) = struct.unpack("<e", block[:2])
        if kind == "Q8_0":
            out += [d * code for code in struct.unpack("<32b", block[2:])]
        elif kind in ("Q4_0", "Q5_0"):
            fifth = struct.unpack("<I", block[2:6])[0] if kind == "Q5_0" else 0
            nibbles = block[-16:]
            codes = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
            out += [d * (code + (fifth >> i & 1) * 16 + GGML_TYPES[kind].min_code) for i, code in enumerate(codes)]
        else:
            (m,), packed, nibbles = struct.unpack("<e", block[2:4]), block[4:16], block[16:]
            for i in range(8):
                if i < 4:
                    s, t = packed[i] & 63, packed[i + 4] & 63
                else:
                    s = packed[i + 4] & 15 | packed[i - 4] >> 6 << 4
                    t = packed[i + 4] >> 4 | packed[i] >> 6 << 4
                for byte in nibbles[i // 2 * 32 : i // 2 * 32 + 32]:
                    out.append(d * s * (byte >> 4 if i % 2 else byte & 15) - m * t)
    return np.array(out[:count])


def read(path):
    """(metadata, name -> (type, values)) of a file."""
    data, at = path.read_bytes(), 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def text():
        nonlocal at
        size = take("Q")
        at += size
        return data[at - size : at].decode()

    def value(kind):
        if kind == 9:
            inner, count = take("I"), take("Q")
            return [value(inner) for _ in range(count)]
        return text() if kind == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    assert take("4s") == b"GGUF" and take("I") == 3
    tensors, pairs = take("Q"), take("Q")
    metadata = {text(): value(take("I")) for _ in range(pairs)}
    table = []
    for _ in range(tensors):
        name, rank = text(), take("I")
        table.append((name, [take("Q") for _ in range(rank)][::-1], take("I"), take("Q")))
    start = at + -at % 32
    kinds = {block.number: kind for kind, block in GGML_TYPES.items()}
    out = {}
    for name, shape, number, offset in table:
        kind, count = kinds[number], int(np.prod(shape))
        size = count // GGML_TYPES[kind].block_weights * GGML_TYPES[kind].block_bytes
        assert offset % 32 == 0
        out[name] = kind, decode(kind, data[start + offset : start + offset + size], count).reshape(shape)
    return metadata, out


# Blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CODE_TYPES)
def test_codes_are_kept(kind):
    rng = np.random.default_rng(0)
    codes = rng.integers(GGML_TYPES[kind].min_code, GGML_TYPES[kind].max_code + 1, (3, 64))
    scale = rng.random((3, 2)).astype(np.float16)
    data = encode_codes(kind, codes, scale)
    assert data.shape == (3, 2 * GGML_TYPES[kind].block_bytes)
    for row, code, step in zip(data, codes, scale.astype(np.float64), strict=True):
        np.testing.assert_array_equal(decode(kind, row, 64), code * np.repeat(step, 32))


@pytest.mark.parametrize("kind", GGML_TYPES)
def test_values_are_rounded_to_the_nearest(kind):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(4, 512)).astype(np.float32)
    values[1] = 0
    values[2, :256] = np.abs(values[2, :256]) + 3  # all of one sign
    data = encode_values(kind, values)
    found = np.stack([decode(kind, row.view(np.uint8).reshape(-1), 512) for row in data])
    spread = np.ptp(values.reshape(4, -1, 32), axis=-1, keepdims=True)
    largest = np.abs(values.reshape(4, -1, 32)).max(-1, keepdims=True)
    step = {"F32": 0, "F16": largest * 2**-11, "Q8_0": largest / 127, "Q5_0": largest / 16, "Q4_0": largest / 8,
            "Q4_K": np.maximum(spread, largest) / 13 + largest / 60}[kind]
    assert (np.abs(found - values).reshape(4, -1, 32) <= step * 1.01).all()
    assert (found[1] == 0).all()


# Whole files ----------------------------------------------------------------------------------------------------------


def model(config=CONFIG, recipe=None):
    rng = np.random.default_rng(0)
    graphdef, like = nn.abstract(config)

    def draw(path, leaf):
        array = jnp.asarray(rng.normal(0, 0.2, leaf.shape) + path.endswith("norm/scale"), jnp.float32)
        return recipe(array) if recipe and path.endswith("mlp/down/kernel") else array

    return LM(config, graphdef, map_params(draw, like), TOKENIZER)


def half(leaf):
    """The leaf with scales rounded to float16."""
    return dataclasses.replace(leaf, scale=jnp.asarray(leaf.scale, jnp.float16).astype(jnp.float32))


def down(lm):
    return np.asarray(flatten(dequantize_tree(lm.params))["decoder/layers/0/mlp/down/kernel"])


def test_a_file_holds_the_model(tmp_path):
    lm = model()
    metadata, tensors = read(lm.export(tmp_path / "m.gguf", format="gguf-f16"))
    assert metadata["general.architecture"] == "llama" and metadata["llama.attention.head_count_kv"] == 2
    assert metadata["tokenizer.ggml.pre"] == "gpt-2" and metadata["tokenizer.ggml.bos_token_id"] == lm.tokenizer.bos_id
    assert len(metadata["tokenizer.ggml.tokens"]) == CONFIG.vocab_size
    assert "output.weight" not in tensors  # tied
    kind, values = tensors["blk.1.ffn_down.weight"]
    np.testing.assert_array_equal(values, down(lm)[1].T.astype(np.float16))
    assert kind == "F16" and tensors["blk.0.attn_norm.weight"][0] == "F32"
    q = np.asarray(flatten(lm.params)["decoder/layers/0/attn/q/kernel"])[0].T.astype(np.float16)
    turned = q.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"][1], turned)


SPECIAL = ["<|turn|>", "<|end|>", "<|eom|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)


def for_chat(directory):
    """A model whose texts and turns end in different tokens, with chat templates in files of their own."""
    TOKENIZER.save(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    for token in SPECIAL:
        index = len(spec["model"]["vocab"])
        spec["added_tokens"].append(spec["added_tokens"][0] | {"content": token, "id": index})
        spec["model"]["vocab"][token] = index
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"mask_token": "<|turn|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"unk_token": "<pad>", "add_bos_token": True}))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool-use.jinja").write_text("tools")
    (directory / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: 'x.org'\n---\n# A model\n")
    tokenizer = Tokenizer.load(directory)
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    ends = tuple(tokenizer.backend.special_tokens[token] for token in ("<|eom|>", "<|end|>", "</s>"))
    generation = PLAIN.replace(eos_token_id=ends, do_sample=True, temperature=0.5, top_k=9, repetition_penalty=1.25)
    return model(config).replace(tokenizer=tokenizer, generation=generation, info={"source": str(directory)})


def test_a_file_says_how_to_chat_and_where_texts_end(tmp_path):
    lm = for_chat(tmp_path / "tiny-chat")
    metadata, _ = read(lm.export(tmp_path / "m.gguf", format="gguf-f16"))
    assert metadata["tokenizer.chat_template"] == TEMPLATE
    assert metadata["tokenizer.chat_templates"] == ["tool_use"]
    assert metadata["tokenizer.chat_template.tool_use"] == "tools"
    special = lm.tokenizer.backend.special_tokens
    wanted = {
        "bos": "<s>", "eos": "</s>", "eot": "<|end|>", "eom": "<|eom|>", "padding": "<pad>", "unknown": "<pad>",
        "mask": "<|turn|>",
    }
    found = {role: metadata.get(f"tokenizer.ggml.{role}_token_id") for role in wanted}
    assert found == {role: special[token] for role, token in wanted.items()}
    assert "tokenizer.ggml.seperator_token_id" not in metadata
    assert (metadata["tokenizer.ggml.add_bos_token"], metadata["tokenizer.ggml.add_eos_token"]) == (True, False)
    control = [metadata["tokenizer.ggml.tokens"][i] for i, kind in enumerate(metadata["tokenizer.ggml.token_type"])
               if kind == 3]
    assert set(control) == set(special)
    assert metadata["general.name"] == "tiny-chat" and metadata["general.license"] == "apache-2.0"
    assert metadata["general.license.link"] == "x.org"
    sampling = {key.rsplit(".", 1)[1]: metadata[key] for key in metadata if key.startswith("general.sampling.")}
    assert sampling == {"temp": 0.5, "top_k": 9, "top_p": 1.0, "min_p": 0.0, "penalty_repeat": 1.25}
    plain, _ = read(model().export(tmp_path / "plain.gguf", format="gguf-f16"))
    assert not [key for key in plain if "chat_template" in key or "eot" in key or "sampling" in key]
    assert plain["tokenizer.ggml.eos_token_id"] == CONFIG.eos_id


def test_what_a_file_cannot_say_is_refused(tmp_path):
    lm = for_chat(tmp_path / "m")
    with pytest.raises(UserError, match="<s>, </s>, .*room for 3 end tokens"):
        lm.replace(generation=PLAIN.replace(eos_token_id=(1, 2, 280, 281))).export(tmp_path, format="gguf-f16")
    framed = Tokenizer.load(tmp_path / "m")
    framed.backend.raw.post_processor = processors.TemplateProcessing(
        single="<|turn|> <s> $A", special_tokens=[("<|turn|>", 280), ("<s>", 1)]
    )
    with pytest.raises(UserError, match=r"puts <\|turn\|><s> around prompts"):
        lm.replace(tokenizer=framed).export(tmp_path, format="gguf-f16")


def test_llama_cpp_writes_a_conversation_as_we_do(tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    lm = for_chat(tmp_path / "m")
    params = xllamacpp.CommonParams()
    params.model.path = str(lm.export(tmp_path / "m.gguf", format="gguf-f16"))
    params.n_ctx, params.cpuparams.n_threads, params.warmup, params.use_jinja = 64, 1, False, True
    server = xllamacpp.Server(params)

    def ask(path, **body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(server.listening_address + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    chat = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    prompt = ask("/apply-template", messages=[*chat, chat[0]])["prompt"]
    # llama.cpp leaves out a begin token that its tokenizer adds again.
    assert f"<s>{prompt.removeprefix('<s>')}" == lm.tokenizer.chat_template.render([*chat, chat[0]])
    tokens = ask("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
    assert tokens == lm.tokenizer.encode_chat([*chat, chat[0]])


@pytest.mark.parametrize(("recipe", "kind"), [
    (lambda leaf: quantize(leaf, bits=4, group=32), "Q4_0"),
    (lambda leaf: quantize(leaf, bits=3, group=0, symmetric=False), "Q4_0"),
    (lambda leaf: quantize(leaf, bits=4, group=64, symmetric=False), "Q5_0"),
    (lambda leaf: quantize(leaf, bits=8, group=32), "Q8_0"),
])
def test_codes_that_fit_a_type_are_kept(recipe, kind, tmp_path):
    lm = model(recipe=lambda leaf: half(recipe(leaf)))
    _, tensors = read(lm.export(tmp_path / "m.gguf", format="gguf-q4_0"))
    for layer in range(2):
        assert tensors[f"blk.{layer}.ffn_down.weight"][0] == kind
        np.testing.assert_allclose(tensors[f"blk.{layer}.ffn_down.weight"][1], down(lm)[layer].T, rtol=1e-6)
    assert tensors["token_embd.weight"][0] == "Q8_0"


def test_rows_that_are_no_whole_blocks_get_the_next_type(tmp_path):
    _, tensors = read(model().export(tmp_path, format="gguf-q4_k"))  # rows of 64 and 96, where blocks have 256
    assert tensors["blk.0.ffn_up.weight"][0] == "Q5_0" and (tmp_path / "model.gguf").is_file()
    odd = model(dataclasses.replace(CONFIG, ffn=100))
    _, tensors = read(odd.export(tmp_path / "odd.gguf", format="gguf-q4_0"))
    assert (tensors["blk.0.ffn_down.weight"][0], tensors["blk.0.ffn_up.weight"][0]) == ("F16", "Q4_0")


@pytest.mark.parametrize(("config", "message"), [
    (dataclasses.replace(CONFIG, windows=(8,)), "windows"),
    (dataclasses.replace(CONFIG, activation="geglu"), "'geglu'"),
    (dataclasses.replace(CONFIG, rope_scaling=RopeScaling("dynamic", factor=2.0)), "rope_scaling.*dynamic"),
])
def test_models_that_llama_cpp_cannot_run_are_an_error_of_one_line(config, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        model(config).export(tmp_path / "m.gguf", format="gguf-f16")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_tokenizer_of_characters_and_an_unknown_type_are_refused(tmp_path):
    lm = model().replace(tokenizer=Tokenizer.train(["ab"], "char"))
    with pytest.raises(UserError, match="WordLevel"):
        lm.export(tmp_path / "m.gguf", format="gguf-f16")
    with pytest.raises(UserError, match="'q9'.*f16, q8_0, q4_0, q4_k"):
        lm.export(tmp_path / "m.gguf", format="gguf-q9")


@pytest.mark.parametrize(("config", "kind"), [
    (CONFIG, "f16"), (CONFIG, "q8_0"), (GPT2, "f16"), (QWEN3, "f16"),
    (dataclasses.replace(CONFIG, qkv_bias=True, tie_embeddings=False), "f16"),
    (dataclasses.replace(CONFIG, rope_scaling=RopeScaling(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=16
    )), "f16"),
], ids=["llama", "llama-q8_0", "gpt2", "qwen3", "llama-biased", "llama3"])
def test_llama_cpp_computes_the_same(config, kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    lm = model(config)
    text = "the cat sat on the mat"
    file = lm.export(tmp_path / "m.gguf", format=f"gguf-{kind}")
    theirs = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    tokens = theirs.tokenize(text.encode(), add_bos=True)
    assert tokens == lm.tokenizer.encode_prompt(text)
    theirs.eval(tokens)
    logits = np.asarray(lm(np.array([tokens]))[0])
    error = np.abs(theirs.scores[: len(tokens)] - logits).max() / np.abs(logits).max()
    assert error < (0.05 if kind == "q8_0" else 5e-3)


def test_llama_cpp_reads_a_sentencepiece_tokenizer_alike(shared, tmp_path):
    """Except for texts that begin with a space: llama.cpp adds one more there, as SentencePiece itself does."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    shutil.copy(shared / "models" / "tokenizers" / "llama2.model", tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path)
    config = DecoderConfig(vocab_size=32000, width=32, heads=2, layers=1, ffn=32, max_positions=64)
    file = model(config).replace(tokenizer=tokenizer).export(tmp_path / "m.gguf", format="gguf-f16")
    theirs = llama_cpp.Llama(str(file), verbose=False, vocab_only=True)
    for text in ("Hello world, it's 3 o'clock.", "a  b\n\nc\td", "Größe 你好 🙂", "def f(x):\n    return x**2"):
        assert theirs.tokenize(text.encode(), add_bos=True) == tokenizer.encode_prompt(text)


def test_books_llama_says_the_same_in_llama_cpp(shared, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    lm = jaxlm.load(shared / "models" / "books-llama")
    prompt = "It was the best of times, it was the worst of"
    file = lm.export(tmp_path / "m.gguf", format="gguf-q8_0")
    theirs = llama_cpp.Llama(str(file), n_ctx=64, verbose=False, n_threads=1)
    text = theirs(prompt, max_tokens=24, temperature=0, repeat_penalty=1.0)["choices"][0]["text"]
    assert text == lm.generate([prompt], max_new_tokens=24)[0]
