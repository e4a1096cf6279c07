"""Overrides are typed by annotations, JSON round-trips, and mistakes are named."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from jaxlm.core.config import from_dict, load_config, override, paths, replace_path, to_dict
from jaxlm.core.errors import UserError
from jaxlm.nn.config import PRESETS, ModelConfig
from jaxlm.training.config import DecoderConfig, Experiment, LSTMConfig, Seq2SeqConfig

EXPERIMENT = Experiment(model=DecoderConfig())


@dataclass(frozen=True)
class Leaf:
    kind: Literal["leaf"] = "leaf"
    ratio: float = 0.5
    limit: int | None = None
    choice: Literal["a", 2] = "a"
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Other:
    kind: Literal["other"] = "other"


@dataclass(frozen=True)
class Root:
    needed: int
    part: Leaf | Other = field(default_factory=Leaf)
    on: bool = False
    name: str = ""


ROOT = Root(needed=1)


@pytest.mark.parametrize(("path", "text", "value"), [
    ("needed", "12", 12),
    ("needed", "1_000", 1000),
    ("on", "true", True),
    ("on", "No", False),
    ("name", " spaced ", " spaced "),
    ("name", "none", "none"),
    ("part.ratio", "3e-4", 3e-4),
    ("part.ratio", 1, 1.0),
    ("part.limit", "7", 7),
    ("part.limit", "none", None),
    ("part.limit", None, None),
    ("part.choice", "2", 2),
    ("part.choice", "a", "a"),
    ("part.names", "x, y", ("x", "y")),
    ("part.names", "", ()),
    ("part.names", "()", ()),
    ("part.names", ["x"], ("x",)),
])
def test_a_value_takes_the_type_of_its_field(path, text, value):
    found = dict(paths(override(ROOT, {path: text})))
    assert found[path] == value
    assert type(found[path]) is type(value)
    assert {**dict(paths(ROOT)), path: value} == found  # and nothing else changed


def test_lists_of_numbers():
    changed = override(EXPERIMENT, {"model.windows": "(128, 0)", "data.buckets": "[8,16]"})
    assert changed.model.windows == (128, 0)
    assert changed.data.buckets == (8, 16)


@pytest.mark.parametrize(("path", "value", "message"), [
    ("needed", "x", "needed: 'x' is not a whole number"),
    ("needed", "1.5", "needed: '1.5' is not a whole number"),
    ("needed", True, "needed: True is not a whole number"),
    ("on", "maybe", "on: 'maybe' is not true or false"),
    ("on", 1, "on: 1 is not true or false"),
    ("name", 3, "name: 3 is not text"),
    ("part.ratio", "nan", "part.ratio: 'nan' is not a number"),
    ("part.choice", "b", "part.choice: 'b' is not one of a, 2"),
    ("part.names", 3, "part.names: 3 is not a list such as 1,2,3, each text"),
    ("part", "leaf", "part is a group of settings; set one of them (part.kind, part.ratio, part.limit, ...)"),
    ("part.ration", "1", "unknown configuration key 'part.ration'; the nearest is 'part.ratio'"),
    ("ratio", "1", "unknown configuration key 'ratio'; the nearest is 'part.ratio'"),
    ("part.ratio.x", "1", "unknown configuration key 'part.ratio.x'; the nearest is 'part.ratio'"),
])
def test_a_wrong_value_or_key_is_named(path, value, message):
    with pytest.raises(UserError) as caught:
        replace_path(ROOT, path, value)
    assert str(caught.value) == message


def test_the_fields_of_the_current_member_of_a_union_count():
    assert override(EXPERIMENT, {"model.layers": "3"}).model.layers == 3
    with pytest.raises(UserError, match="unknown configuration key 'model.encoder_layers'"):
        override(EXPERIMENT, {"model.encoder_layers": "3"})
    translation = dataclasses.replace(EXPERIMENT, model=Seq2SeqConfig())
    assert override(translation, {"model.encoder_layers": "3"}).model.encoder_layers == 3


@pytest.mark.parametrize("model", [*PRESETS.values(), LSTMConfig(hidden=3)], ids=lambda model: model.kind)
def test_json_round_trip(model):
    experiment = Experiment(model=model, init_from="x")
    assert from_dict(Experiment, json.loads(json.dumps(to_dict(experiment)))) == experiment
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(model)))) == model


def test_absent_fields_keep_their_defaults():
    assert from_dict(Root, {"needed": 3}) == Root(needed=3)


@pytest.mark.parametrize(("data", "message"), [
    ({}, "the configuration lacks 'needed'; add it"),
    ({"neded": 1}, "unknown configuration key 'neded'; the nearest is 'needed'"),
    ({"needed": "1"}, "needed: '1' is not a whole number"),
    ({"needed": 1, "part": {"kind": "leaf", "rato": 1}},
     "unknown configuration key 'part.rato'; the nearest is 'part.ratio'"),
    ({"needed": 1, "part": {"ratio": 1.0}}, "part: kind is None; choose from leaf, other"),
    ({"needed": 1, "part": 3}, "part: 3 is not a group of settings; write an object with named fields"),
    ([], "the configuration: [] is not a group of settings; write an object with named fields"),
])
def test_from_dict_is_strict(data, message):
    with pytest.raises(UserError) as caught:
        from_dict(Root, data)
    assert str(caught.value) == message


def test_a_config_file_is_python(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text("from jaxlm.training.config import *\nconfig = Experiment(model=LSTMConfig(width=3 + 4))\n")
    assert load_config(path) == Experiment(model=LSTMConfig(width=7))


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1\n", "experiment.py defines no 'config'; it must say config = ..."),
    ("x = 1\nconfig = y\n", "experiment.py line 2: NameError: name 'y' is not defined"),
    ("x = 1\n\nconfig = (\n", "experiment.py line 3: SyntaxError: '(' was never closed"),
    ("from jaxlm.core.errors import UserError\nraise UserError('no')\n", "no"),
])
def test_a_broken_config_file_is_explained(tmp_path, text, message):
    path = tmp_path / "experiment.py"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_a_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="does not exist; name a Python file that says config"):
        load_config(tmp_path / "none.py")
