"""One line and status 2 for what users can mend; help at once."""

from __future__ import annotations

import re
import sys
import types

import pytest

from jaxlm import cli as main_module
from jaxlm.cli import COMMANDS
from jaxlm.cli.arguments import parse_overrides
from jaxlm.cli.output import Progress, print_fields, print_table, size
from jaxlm.core.errors import UserError


def test_help_names_every_command(jaxlm_command):
    for words in ([], ["--help"], ["-h"]):
        status, out, err = jaxlm_command(*words)
        assert (status, err) == (0, "")
        assert all(f"  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(jaxlm_command, name):
    status, out, err = jaxlm_command(name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: jaxlm {name}")
    assert re.search(rf"\n\n    (echo .* \| )?jaxlm {name}\b", out), "an example comes right after the first sentence"


def test_version(jaxlm_command):
    assert jaxlm_command("--version")[:2] == (0, "jaxlm 0.1.0\n")


@pytest.mark.parametrize(("words", "message"), [
    (["trian"], "unknown command 'trian'; the nearest is 'train', see jaxlm --help"),
    (["train"], "the following arguments are required: CONFIG.py, --out; see jaxlm train --help"),
    (["train", "none.py", "--out", "run"], "none.py does not exist; name a Python file that says config = ..."),
    (["evaluate", "none", "--data", "text:x"], "none does not exist; name a model directory or a training run"),
    (["evaluate", "none"], "none names no test data of its own; give --data SPEC"),
    (["evaluate", "none", "--data", "text:x", "--context", "many"],
     "argument --context: invalid int value: 'many'; see jaxlm evaluate --help"),
    (["evaluate", "none", "--data", "text:x", "--dta", "y"], "unknown argument '--dta'; see jaxlm evaluate --help"),
    (["evaluate", "none", "--data", "text:x", "--json", "no/x.json"], "--json no/x.json: its directory does not exist"),
    (["compress", "none", "--recipe", "w9", "--out", "x"], "unknown recipe 'w9'"),
    (["generate", "none", "--prompt", "x"], "none does not exist; name a model directory or a training run"),
    (["translate", "none", "--input", "none.txt"], "none.txt does not exist; name a text file with a sentence a line"),
    (["translate", "none", "--output", "no/x.txt"], "the directory of no/x.txt does not exist; make it"),
    (["inspect", "none"], "none does not exist; name a model directory or a training run"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_mistakes_end_in_one_line_and_status_2(jaxlm_command, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = jaxlm_command(*words)
    assert (status, out) == (2, "")
    assert err.startswith(f"jaxlm: {message}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "words", "message"), [
    ("config = 3", [], "config is a int; it must be a jaxlm Experiment"),
    ("config = Experiment(model=DecoderConfig())", ["--train.stepps", "3"],
     "unknown configuration key 'train.stepps'; the nearest is 'train.steps'"),
    ("config = Experiment(model=DecoderConfig())", ["--train.steps=many"], "train.steps: 'many' is not a whole number"),
    ("config = Experiment(model=DecoderConfig())", ["train.steps=3"],
     "unexpected argument 'train.steps=3'; settings are written --a.b VALUE"),
    ("config = Experiment(model=DecoderConfig())", ["--train.steps"], "--train.steps has no value"),
])
def test_mistakes_in_an_experiment(jaxlm_command, tmp_path, text, words, message):
    path = tmp_path / "x.py"
    path.write_text(f"from jaxlm.training.config import *\n{text}\n")
    status, _, err = jaxlm_command("train", path, "--out", tmp_path / "run", *words)
    assert status == 2
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_overrides_are_pairs():
    assert parse_overrides(["--a.b", "1", "--c=x=y", "--d", "-3"]) == {"a.b": "1", "c": "x=y", "d": "-3"}


@pytest.mark.parametrize(("error", "status", "text"), [
    (UserError("two\n lines"), 2, "jaxlm: two lines\n"),
    (PermissionError(13, "Permission denied", "/x"), 2, "jaxlm: /x: Permission denied\n"),
    (KeyboardInterrupt(), 130, "jaxlm: interrupted\n"),
])
def test_what_may_go_wrong_in_a_command(jaxlm_command, monkeypatch, error, status, text):
    def run(args):
        raise error

    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
    monkeypatch.setitem(sys.modules, "jaxlm.cli.fails", module)
    monkeypatch.setitem(main_module.COMMANDS, "fails", "")
    assert jaxlm_command("fails") == (status, "", text)


def test_a_defect_keeps_its_traceback(jaxlm_command, monkeypatch):
    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=lambda args: 1 / 0)
    monkeypatch.setitem(sys.modules, "jaxlm.cli.fails", module)
    monkeypatch.setitem(main_module.COMMANDS, "fails", "")
    with pytest.raises(ZeroDivisionError):
        main_module.main(["fails"])


def test_tables(capsys):
    print_table([{"name": "a", "n": 1234, "x": 0.5}, {"name": "long", "n": 5, "x": 1e6}])
    assert capsys.readouterr().out == (
        "name      n          x\n"
        "a     1,234     0.5000\n"
        "long      5  1,000,000\n"
    )
    print_fields({"a": True, "long": 1e-5, "c": [1, 2]})
    assert capsys.readouterr().out == "a     yes\nlong  1e-05\nc     1, 2\n"
    assert [size(n) for n in (5, 1024, 3 << 20)] == ["5 B", "1.0 KiB", "3.0 MiB"]


def test_progress_is_silent_when_there_is_little(capsys):
    Progress()("reading", 1, 2)
    assert capsys.readouterr() == ("", "")
