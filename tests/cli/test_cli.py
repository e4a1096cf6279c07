"""The table of commands and ``main``: help, one line and status 2 for mistakes of users, and what commands print."""

from __future__ import annotations

import re
import sys
import types

import pytest

from jaxlm import cli
from jaxlm.cli import COMMANDS
from jaxlm.cli.arguments import parse_overrides
from jaxlm.cli.output import ProgressBar, format_bytes, print_fields, print_table
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


MISTAKES = {
    "unknown command": (["trian"], ["'trian'", "'train'", "jaxlm --help"]),
    "missing arguments": (["train"], ["CONFIG.py", "--out", "jaxlm train --help"]),
    "no experiment": (["train", "none.py", "--out", "run"], ["none.py"]),
    "no model": (["evaluate", "none", "--data", "text:x"], ["none does not exist"]),
    "no data": (["evaluate", "none"], ["none", "--data SPEC"]),
    "no number": (["evaluate", "none", "--data", "text:x", "--context", "many"], ["--context", "'many'"]),
    "misspelt option": (["evaluate", "none", "--data", "text:x", "--dta", "y"], ["'--dta'", "jaxlm evaluate --help"]),
    "no directory": (["evaluate", "none", "--data", "text:x", "--json", "no/x.json"], ["--json no/x.json"]),
    "unknown recipe": (["compress", "none", "--recipe", "w9", "--out", "x"], ["'w9'"]),
    "no model to generate": (["generate", "none", "--prompt", "x"], ["none does not exist"]),
    "no input": (["translate", "none", "--input", "none.txt"], ["none.txt does not exist"]),
    "no directory of the output": (["translate", "none", "--output", "no/x.txt"], ["--output no/x.txt"]),
    "no model to inspect": (["inspect", "none"], ["none does not exist"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_line_and_status_2(jaxlm_command, tmp_path, monkeypatch, case):
    words, named = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    status, out, err = jaxlm_command(*words)
    assert (status, out) == (2, "")
    assert err.startswith("jaxlm: ") and err.count("\n") == 1
    assert all(name in err for name in named), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("text", "words", "named"), [
    ("config = 3", [], ["int", "Experiment"]),
    ("config = Experiment(model=DecoderConfig())", ["--train.stepps", "3"], ["'train.stepps'", "'train.steps'"]),
    ("config = Experiment(model=DecoderConfig())", ["--train.steps=many"], ["train.steps", "'many'"]),
    ("config = Experiment(model=DecoderConfig())", ["train.steps=3"], ["'train.steps=3'"]),
    ("config = Experiment(model=DecoderConfig())", ["--train.steps"], ["--train.steps"]),
])
def test_mistakes_in_an_experiment(jaxlm_command, tmp_path, text, words, named):
    path = tmp_path / "x.py"
    path.write_text(f"from jaxlm.training.config import *\n{text}\n")
    status, _, err = jaxlm_command("train", path, "--out", tmp_path / "run", *words)
    assert status == 2 and err.count("\n") == 1
    assert all(name in err for name in named), err
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
    monkeypatch.setitem(cli.COMMANDS, "fails", "")
    assert jaxlm_command("fails") == (status, "", text)


def test_a_defect_keeps_its_traceback(jaxlm_command, monkeypatch):
    module = types.SimpleNamespace(add_arguments=lambda parser: None, run=lambda args: 1 / 0)
    monkeypatch.setitem(sys.modules, "jaxlm.cli.fails", module)
    monkeypatch.setitem(cli.COMMANDS, "fails", "")
    with pytest.raises(ZeroDivisionError):
        cli.main(["fails"])


def test_tables(capsys):
    print_table([{"name": "a", "n": 1234, "x": 0.5}, {"name": "long", "n": 5, "x": 1e6}])
    assert capsys.readouterr().out == (
        "name      n          x\n"
        "a     1,234     0.5000\n"
        "long      5  1,000,000\n"
    )
    print_fields({"a": True, "long": 1e-5, "c": [1, 2]})
    assert capsys.readouterr().out == "a     yes\nlong  1e-05\nc     1, 2\n"
    assert [format_bytes(n) for n in (5, 1024, 3 << 20)] == ["5 B", "1.0 KiB", "3.0 MiB"]


def test_progress_is_silent_when_there_is_little(capsys):
    ProgressBar()("reading", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_threads_of_a_failed_checkpoint_are_silent(monkeypatch):
    """Beside "no space left", which is one line."""
    seen = []
    hook = lambda unraisable: seen.append(str(unraisable.exc_value))  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)
    monkeypatch.setattr(sys, "__unraisablehook__", hook)
    cli._prepare()
    for text in ("Event loop is closed", "something else"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert seen == ["something else"]
