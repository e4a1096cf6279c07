"""Settings of generation_config.json on small random models, and the tokens that transformers generates with them.

    python -m tests.inference.golden_tokens [NAME ...]     (with torch and transformers) writes golden/tokens.json

The models are those of ``tests.hf.families.families``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.hf.families.families import inputs, transformers_model

GOLDEN = Path(__file__).parent / "golden" / "tokens.json"
PROMPT = 8  # tokens that a decoder continues

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": ("marian", dict(
        max_length=24, bad_words_ids=[[60], [50], [0]], forced_eos_token_id=0, renormalize_logits=True,
        repetition_penalty=1.4,
    )),
    "m2m_100": ("m2m_100", dict(
        max_length=28, forced_bos_token_id=9, length_penalty=0.6, min_length=10, eos_token_id=[2, 17, 30],
    )),
    "bart": ("bart", dict(
        max_length=32, forced_bos_token_id=0, forced_eos_token_id=2, no_repeat_ngram_size=3, min_length=12,
        length_penalty=2.0, early_stopping=True, eos_token_id=[2, 33],
    )),
    "mbart": ("mbart", dict(
        max_new_tokens=20, decoder_start_token_id=7, forced_eos_token_id=2, repetition_penalty=1.5,
        no_repeat_ngram_size=2,
    )),
    "t5": ("t5", dict(
        max_length=32, early_stopping="never", length_penalty=1.5, eos_token_id=[1, 20, 33], suppress_tokens=[25, 26],
        begin_suppress_tokens=[3, 58], bad_words_ids=[[43, 43], [9, 9], [15, 43, 5], [12]],
    )),
    "llama": ("llama", dict(
        max_new_tokens=32, eos_token_id=[2, 11, 25], repetition_penalty=1.3, suppress_tokens=[4, 9], min_new_tokens=6,
    )),
    "gpt2": ("gpt2", dict(
        max_length=40, no_repeat_ngram_size=2, bad_words_ids=[[12], [30, 31]], begin_suppress_tokens=list(range(20)),
    )),
    "qwen3": ("qwen3", dict(max_length=36, min_length=20, repetition_penalty=0.8, eos_token_id=list(range(30, 40)))),
}
SEARCHES = [(name, beams) for name in CASES for beams in (1, 5)]


def settings(name: str, beams: int) -> dict[str, Any]:
    """generation_config.json of a case."""
    return {"num_beams": beams, **CASES[name][1]}


def by_transformers(name: str, beams: int, directory: Path) -> list[list[int]]:
    """The new tokens of each row without the end token, by a model that is saved in the directory."""
    import torch

    model = transformers_model(CASES[name][0], directory)
    config = model.config.to_dict()
    roles = {f"{role}_token_id": config.get(f"{role}_token_id") for role in ("pad", "eos", "bos", "decoder_start")}
    path = directory / "generation_config.json"
    path.write_text(json.dumps(roles | settings(name, beams)))
    model = type(model).from_pretrained(directory).eval()
    source = torch.from_numpy(inputs(config)[0])
    seq2seq = model.config.is_encoder_decoder
    source = source if seq2seq else source[:, :PROMPT]
    with torch.no_grad():
        rows = model.generate(source, attention_mask=torch.ones_like(source))[:, 1 if seq2seq else PROMPT :].tolist()
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return [row[: next((i for i, token in enumerate(row) if token in eos), len(row))] for row in rows]


def main() -> None:
    from tempfile import TemporaryDirectory

    found: dict[str, dict[str, list[list[int]]]] = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    for name, beams in SEARCHES:
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        with TemporaryDirectory() as directory:
            found.setdefault(name, {})[str(beams)] = rows = by_transformers(name, beams, Path(directory))
        print(name, beams, rows)
    lines = (f'"{name}": {json.dumps(rows)}' for name, rows in found.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
