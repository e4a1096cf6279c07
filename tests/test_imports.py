"""The house rules that imports and attribute names can show."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxlm
from jaxlm.cli.main import COMMANDS
from jaxlm.nn.config import DecoderConfig, LSTMConfig, Seq2SeqConfig
from jaxlm.training.config import (
    DataConfig,
    DistillConfig,
    DpoConfig,
    EvalConfig,
    Experiment,
    LoraConfig,
    MeshConfig,
    OptimConfig,
    PrivacyConfig,
    PruneConfig,
    QatConfig,
    TrainConfig,
)

ROOT = Path(jaxlm.__file__).parent
TREES = {path.relative_to(ROOT.parent): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}

FLOORS = {
    "core": 0, "kernels": 0, "nn": 1, "data": 1, "compression": 1, "checkpoint": 1, "model": 2, "training": 2,
    "evaluation": 2, "inference": 2, "planning": 2, "pictures": 2, "serving": 3, "cli": 4, "__init__": 4, "__main__": 5,
}
STRANGERS = [("compression", "nn"), ("nn", "compression"), ("nn", "checkpoint"), ("data", "nn"), ("nn", "data")]
FOUNDATIONS = {"jax", "flax", "numpy"}


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules imported anywhere in the file, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", TREES, ids=str)
def test_imports_run_one_way(path):
    mine = room(path)
    for name in imports(TREES[path]):
        parts = name.split(".")
        if parts[0] == "jaxlm" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS[parts[1]] <= FLOORS[mine], f"{path} is below {name}"
            data_only = name.split(".")[2:3] == ["config"]  # what a model is, not what computes it
            allowed = data_only and (path.name == "config.py" or mine == "compression")
            assert (mine, parts[1]) not in STRANGERS or allowed, f"{path} does not know {name}"


def test_the_core_stands_on_jax_alone():
    for path, tree in TREES.items():
        if room(path) == "core":
            others = {name.split(".")[0] for name in imports(tree)} - FOUNDATIONS - {"jaxlm"} - sys.stdlib_module_names
            assert not others, f"{path} imports {others}"


def test_every_field_of_a_configuration_is_read():
    """An option that nobody reads would be a lie."""
    models = (DecoderConfig, LSTMConfig, Seq2SeqConfig)
    configs = (*models, DataConfig, EvalConfig, Experiment, MeshConfig, OptimConfig, PruneConfig, QatConfig,
               TrainConfig, DistillConfig, DpoConfig, LoraConfig, PrivacyConfig)
    read = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
                read |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    unread = {f"{config.__name__}.{field.name}" for config in configs for field in dataclasses.fields(config)
              if field.name not in read}
    assert not unread


def _modules_after(code: str) -> set[str]:
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.split())


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda words: "-".join(words) or "jaxlm")
def test_help_comes_before_jax(command):
    loaded = _modules_after(f"from jaxlm.cli.main import main; main({[*command, '--help']})")
    assert "jaxlm.cli.main" in loaded
    assert not loaded & {"jax", "numpy", "flax", "orbax", "tokenizers", "rich"}


def test_the_package_is_lazy():
    loaded = _modules_after("import jaxlm")
    assert "jaxlm" in loaded
    assert "jax" not in loaded
    assert callable(jaxlm.load) and set(jaxlm.__all__) <= set(dir(jaxlm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = jaxlm.nothing
