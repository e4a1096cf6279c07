"""Fields that had another name: files from then load, and whoever still writes the old name is told the new one."""

from __future__ import annotations

import json

import pytest

import jaxlm
from jaxlm import nn
from jaxlm.core.config import RENAMED, from_dict, load_config, override, to_dict
from jaxlm.core.errors import UserError
from jaxlm.hf.directory import read_model, read_model_config, write_model
from jaxlm.nn.config import DecoderConfig, ModelConfig, Seq2SeqConfig
from jaxlm.training.config import Experiment
from jaxlm.training.setup import _check_unchanged
from tests.models import build

OLD = {new: old for old, new in RENAMED.items()}
DECODER = DecoderConfig(vocab_size=24, width=8, heads=2, layers=3, layer_groups=(2, 1), ring_min_keys=64)
SEQ2SEQ = Seq2SeqConfig(
    vocab_size=24, width=8, heads=2, encoder_layers=2, decoder_layers=2, decoder_layer_groups=(1, 1)
)


def as_then(data):
    """JSON data with every field under the name it had first."""
    if isinstance(data, dict):
        return {OLD.get(name, name): as_then(value) for name, value in data.items()}
    return data


@pytest.mark.parametrize("config", [DECODER, SEQ2SEQ], ids=["a Llama", "ours"])
def test_model_directories_written_then_load(tmp_path, config):
    params = build(config)[1]
    path = write_model(tmp_path / "model", config, params, None) / "config.json"
    path.write_text(json.dumps(as_then(json.loads(path.read_text()))))
    assert "segments" in path.read_text()
    found = read_model(tmp_path / "model")[0]
    assert {name: to_dict(found)[name] for name in OLD if hasattr(config, name)} == {
        name: to_dict(config)[name] for name in OLD if hasattr(config, name)
    }


def test_trainings_begun_then_go_on(tmp_path):
    experiment = Experiment(model=DECODER)
    (tmp_path / "experiment.json").write_text(json.dumps(as_then(to_dict(experiment))))
    assert read_model_config(tmp_path) == DECODER
    _check_unchanged(experiment, tmp_path)


def test_the_old_name_is_an_error_that_names_the_new_one(tmp_path):
    params = nn.abstract(DECODER)
    for name, data in [("segments", (1, 2)), ("ring_from", 4)]:
        with pytest.raises(UserError, match=f"'model.{name}' is called '{RENAMED[name]}' now"):
            override(Experiment(model=DECODER), {f"model.{name}": data})
        with pytest.raises(UserError, match=f"'{name}' is called '{RENAMED[name]}' now"):
            from_dict(ModelConfig, {"kind": "decoder", name: data})
        with pytest.raises(UserError, match=f"'{name}' is called '{RENAMED[name]}' now"):
            jaxlm.LM(DECODER, *params, None).configure(**{name: data})
        file = tmp_path / "experiment.py"
        file.write_text(f"from jaxlm.training.config import *\nconfig = DecoderConfig({name}={data})\n")
        with pytest.raises(UserError, match=f"experiment.py line 2.*'{name}' is called '{RENAMED[name]}' now"):
            load_config(file)


def test_a_name_that_never_was_is_only_unknown():
    with pytest.raises(UserError, match="unknown configuration key 'segments'"):
        from_dict(ModelConfig, {"kind": "lstm", "segments": [1]}, stored=True)
