"""Rules of the code base that imports, names and sizes of files can show."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import jaxlm
from jaxlm.cli import COMMANDS
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

# The packages and modules of jaxlm. Each may import those before it and none after it.
ORDER = (
    "core nn data checkpoint compression inference hf evaluation model compress training planning pictures serving "
    "harness cli __main__"
).split()
# The folders of a package, in the same way. (Files beside the folders may be below them, above them, or between.)
WINGS = {
    "compression": ["quantize", "prune", "fit"],
    "data": ["phrasebook", "sources", "tokenizers", "batches"],
    "hf": ["families", "quantized", "gguf", "peft"],
    "nn": ["attention", "moe"],
    "serving": ["protocol", "routes"],
    "training": ["optimizers", "objectives", "multihost", "run"],
}
# Compression knows parameters by their paths, and what a model is (its configuration), but not what computes it.
STRANGERS = [("compression", "nn"), ("nn", "compression"), ("data", "nn"), ("nn", "data")]
MOST_LINES, MOST_FILES = 400, 15
FOUNDATIONS = {"jax", "flax", "numpy", "regex"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules imported anywhere in the file: inside functions too, and for type checkers alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(path: Path) -> str:
    """The package or module of jaxlm to which a file belongs: an entry of ORDER."""
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", TREES, ids=str)
def test_imports_run_one_way(path):
    mine = package_of(path)
    for name in imports(TREES[path]):
        parts = name.split(".")
        if parts[0] != "jaxlm" or len(parts) == 1 or parts[1] not in ORDER or mine == "__init__":
            continue
        assert ORDER.index(parts[1]) <= ORDER.index(mine), f"{path} is below {name}"
        data_only = parts[2:3] == ["config"]  # what a model is, not what computes it
        assert (mine, parts[1]) not in STRANGERS or (data_only and mine == "compression"), f"{path} and {name}"
        wings = WINGS.get(mine, [])
        if parts[1] == mine and len(parts) > 2 and {parts[2], path.parts[2]} <= {*wings}:
            assert wings.index(parts[2]) <= wings.index(path.parts[2]), f"{path} is below {name}"


def test_the_tables_name_the_packages_and_folders_that_exist():
    packages = {package_of(path) for path in TREES} - {"__init__"}
    assert set(ORDER) == packages and len(ORDER) == len(packages)
    folders = {(path.parts[1], path.parts[2]) for path in TREES if len(path.parts) > 3}
    listed = {(package, folder) for package, names in WINGS.items() for folder in names}
    assert listed <= folders, "a folder that does not exist"
    alone = {package for package, count in Counter(package for package, _ in folders).items() if count == 1}
    assert {(package, folder) for package, folder in folders if package not in alone} <= listed


def _public_lists() -> dict[str, ast.Module]:
    """The ``__init__`` files that list public names, by package."""
    return {
        ".".join(path.parent.parts): tree for path, tree in TREES.items()
        if path.name == "__init__.py" and any(name == "jaxlm.core.lazy.lazy" for name in imports(tree))
    }


@pytest.mark.parametrize("package", _public_lists())
def test_public_names_are_the_same_for_type_checkers_and_at_run_time(package):
    checked = {}
    for node in ast.walk(_public_lists()[package]):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for each in node.body:
                checked |= {alias.asname or alias.name: each.module for alias in each.names}
    module = importlib.import_module(package)
    assert sorted(checked) == module.__all__ and set(module.__all__) <= set(dir(module))
    for name, home in checked.items():
        assert home.startswith(package), f"{package} lists {name}, which is in {home}"
        assert getattr(module, name) is getattr(importlib.import_module(home), name), f"{package}.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_no_modules_import_each_other():
    modules = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): tree for path, tree in TREES.items()}
    arrows = {}
    for name, tree in modules.items():
        named = {other for other in imports(tree) if other in modules and other != name}
        # "from package import module" needs the module, whatever else the package lists.
        arrows[name] = {other for other in named if not name.startswith(f"{other}.")}
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_rooms_are_small():
    for path in TREES:
        lines = (ROOT.parent / path).read_text().count("\n")
        assert lines <= MOST_LINES, f"{path} has {lines} lines: it is two things"
    for folder, count in Counter(path.parent for path in TREES).items():
        assert count <= MOST_FILES or folder.name == "phrasebook", f"{folder} has {count} files: it needs subfolders"


def test_the_core_stands_on_jax_alone():
    for path, tree in TREES.items():
        if package_of(path) == "core":
            others = {name.split(".")[0] for name in imports(tree)} - FOUNDATIONS - {"jaxlm"} - sys.stdlib_module_names
            assert not others, f"{path} imports {others}"


def test_processes_are_started_in_one_way():
    """``core.processes`` keeps them from importing modules of the working directory."""
    def names(tree: ast.AST) -> set[str]:
        return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}

    starters = [path for path, tree in TREES.items() if {"executable", "multiprocessing"} & (names(tree) | {
        name.split(".")[0] for name in imports(tree)})]
    assert starters == [Path("jaxlm/core/processes.py")]


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


def test_help_comes_before_jax():
    """Of every command, one after another in a process that would keep what one of them has loaded."""
    words = [["--help"], *([name, "--help"] for name in COMMANDS)]
    heavy = {"jax", "numpy", "flax", "orbax", "tokenizers", "rich"}
    code = f"""if True:
        import sys
        from jaxlm.cli import main
        for words in {words}:
            try:
                main(words)
            except SystemExit as end:
                print(*words, end.code, *sorted(set(sys.modules) & {heavy}), file=sys.stderr)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines() == [" ".join([*each, "0"]) for each in words]
    assert done.stdout.count("usage: jaxlm") == len(words)


def test_packages_are_lazy():
    packages = ", ".join(_public_lists())
    loaded = _modules_after(f"import {packages}, jaxlm.nn.config")
    assert set(_public_lists()) <= loaded
    assert not loaded & {"jax", "numpy", "flax"}
