#!/usr/bin/env bash
# peft 0.21.2 with transformers 5.24.0: an adapter of a model with more tokens loses the rows that its output layer got.
#
# Expected: resize_token_embeddings gives both tables of a model with untied embeddings new rows. save_pretrained of an
#           adapter looks for that (save_embedding_layers="auto"), so that the adapter can be loaded on the model before:
#           where target_modules names neither table, the file holds both.
# Happens:  where target_modules names the input embeddings, the file holds them alone. The rows of the output layer for
#           the new tokens are in no file. Loaded again, the logits of old tokens are the same; those of the new tokens
#           come from whatever the new rows are initialized with, and no warning says so.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.24.0 peft==0.21.2 safetensors
cat > "$folder/tables.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

OLD, NEW = 32, 40  # tokens
base, adapter = f"{sys.argv[1]}/base", f"{sys.argv[1]}/adapter"
LlamaForCausalLM(LlamaConfig(
    vocab_size=OLD, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    tie_word_embeddings=False,
)).save_pretrained(base)


def resized(seed):
    """The base model with more tokens, whose rows depend on the seed."""
    model = LlamaForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(NEW)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


for targets in (["q_proj"], ["q_proj", "embed_tokens"]):
    model = get_peft_model(resized(1), LoraConfig(r=2, target_modules=targets))
    model.save_pretrained(adapter)
    with safe_open(f"{adapter}/adapter_model.safetensors", "pt") as file:
        tables = [name for name in file.keys() if "lora" not in name]
    difference = (logits(model) - logits(PeftModel.from_pretrained(resized(2), adapter))).abs()
    same = ["same" if part.max() == 0 else "other" for part in (difference[..., :OLD], difference[..., OLD:])]
    print(f"{'+'.join(targets)}: {len(tables)} of 2 tables, logits of old tokens {same[0]}, of new ones {same[1]}", end="; ")
PY
seen="$("$folder/venv/bin/python" "$folder/tables.py" "$folder" 2>/dev/null)"
echo "$seen"
expected="q_proj: 2 of 2 tables, logits of old tokens same, of new ones same; q_proj+embed_tokens: 1 of 2 tables, logits of old tokens same, of new ones other; "
[ "$seen" = "$expected" ] || { echo "changed; it was: $expected" >&2; exit 1; }
