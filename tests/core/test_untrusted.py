"""JSON and regular expressions that anybody may have written: each is a value or an error, soon."""

from __future__ import annotations

import json

import pytest

from jaxlm.core.errors import UserError
from jaxlm.core.untrusted import MAX_DEPTH, Pattern, parse_json, read_json, read_sealed_json, seal, unseal


@pytest.mark.parametrize(("text", "problem"), [
    ("[" * 100_000, "nested"),
    ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested"),
    ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested"),
    (f'{{"a": {"9" * 5000}}}', "digits"),
    ('{"a"', "char"),
])
def test_a_text_is_a_value_or_an_error(tmp_path, text, problem):
    for data in (text, text.encode()):
        with pytest.raises(ValueError, match=problem):
            parse_json(data)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=f"x.json cannot be read as JSON .*{problem}"):
        read_json(tmp_path / "x.json")


def test_depth_is_of_brackets_inside_each_other():
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(f'{{"a": "{"[" * 200}", "b": [{"[], " * 200} 1]}}')["b"][-1] == 1
    assert parse_json(deepest) == json.loads(deepest)


def test_sealed_fields_come_back_or_are_refused(tmp_path):
    fields = {"steps": (3, 0.1), "name": "ä", "none": None, "inside": {"b": 1, "a": 2}}
    sealed = json.loads(json.dumps(seal(fields)))
    plain = {name: value for name, value in sealed.items() if name != "checksum"}
    assert unseal(sealed) == plain == json.loads(json.dumps(fields))
    assert unseal(dict(reversed(sealed.items()))) == plain
    for damaged in (sealed | {"steps": [3, 0.2]}, sealed | {"more": 1}, sealed | {"checksum": "0"}, {**plain}):
        with pytest.raises(ValueError, match="checksum is"):
            unseal(damaged)
    (tmp_path / "x.json").write_text(json.dumps(sealed | {"name": "b"}))
    with pytest.raises(UserError, match="x.json was damaged or changed"):
        read_sealed_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(plain))  # written before there were checksums
    assert read_sealed_json(tmp_path / "x.json") == plain


def test_messages_stay_short():
    message = str(UserError(f"x.json: {'a' * 10**5} is no token; copy it again"))
    assert len(message) < 2100 and message.startswith("x.json: a") and message.endswith("is no token; copy it again")
    assert str(UserError("short")) == "short"


def test_patterns_match_as_those_of_python_and_end():
    assert Pattern(r".*\.(q|k)_proj", "x").match("layers.1.q_proj.weight")
    assert not Pattern(r".*\.(q|k)_proj", "x").fullmatch("layers.1.q_proj.weight")
    assert Pattern(r"(?!.*lm_head).*", "x").fullmatch("layers.1")
    with pytest.raises(UserError, match=r"'\(' in targets is not a regular expression"):
        Pattern("(", "targets")
    endless = Pattern(r"(a|aa)+$", "targets")
    for _ in range(2):  # its time is up for good
        with pytest.raises(UserError, match=r"'\(a\|aa\)\+\$' in targets takes too long"):
            endless.match("a" * 60 + "b")
