"""``hf://``: what is asked of the hub, and what is said where it does not answer."""

from __future__ import annotations

import fnmatch

import huggingface_hub
import huggingface_hub.constants
import pytest

import jaxlm
from jaxlm.data.tokenizers import files as tokenizer_files
from jaxlm.hf.hub import DOWNLOADED_FILES


def test_everything_that_a_tokenizer_is_kept_in_is_downloaded(monkeypatch, tmp_path):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(jaxlm.UserError, match="has no config.json"):
        jaxlm.load("hf://org/name@v1")
    assert (asked["name"], asked["revision"]) == ("org/name", "v1")
    names = {*tokenizer_files._MODELS, *tokenizer_files._MARIAN, *tokenizer_files._MERGES, "config.json",
             "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
             "additional_chat_templates/tool_use.jinja", "model-00001-of-00002.safetensors", "adapter_config.json"}
    assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in DOWNLOADED_FILES)] == []
    assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in asked["allow_patterns"])


def test_without_a_network_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(jaxlm.UserError, match="hf://org/name is not in the cache, and HF_HUB_OFFLINE is set: unset it"):
        jaxlm.load("hf://org/name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with pytest.raises(jaxlm.UserError, match="hf://org/name .*(cannot be reached|cannot be downloaded)"):
        jaxlm.load("hf://org/name")
