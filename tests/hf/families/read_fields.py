"""Makes jaxlm/hf/families/read_fields.json: what transformers reads of config.json, by family, and of
tokenizer_config.json.

    python -m tests.hf.families.read_fields        # where transformers is installed; torch is not needed

The sources are parsed, not run. A model reads a field where

- its configuration class declares it, takes it out of the keyword arguments or asks itself for it;
- ``attribute_map`` gives it as another name of a field (an alias: where a file has both, the alias counts);
- the modeling code that its language model reaches says ``config.NAME`` or ``getattr(config, "NAME")``;
- the code that all models share does (``SHARED``): rotary positions, masks, caches, generation.

Each field stands with the default that transformers takes for it, null where that is no constant.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from jaxlm.hf.families.known_fields import FILE
from jaxlm.hf.families.registry import FAMILIES

# The code beside the models' own that reads their configurations.
SHARED = (
    "cache_utils.py", "generation/utils.py", "masking_utils.py", "modeling_utils.py",
    "integrations/heterogeneity/configuration_utils.py",
)
ROPE_FIELDS = ("original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "rope_type", "type")
ROPE = "modeling_rope_utils.py"  # for the families with rotary positions


def transformers_source() -> Path:
    """The folder of the installed transformers."""
    return Path(importlib.util.find_spec("transformers").origin).parent


def read_fields(source: Path) -> dict[str, Any]:
    """The content of the table, by the sources of transformers."""
    rope_tree = _parse(source / ROPE)
    base = _definitions(_parse(source / "configuration_utils.py"))["PreTrainedConfig"]
    rope = _definitions(rope_tree)["RotaryEmbeddingConfigMixin"]
    methods = {*_methods(base), *_methods(rope), *_class_attributes(base), *_class_attributes(rope)}

    def without_methods(fields: dict[str, Any], names: set[str], declared: Collection[str] = ()) -> dict[str, Any]:
        private = {name for name in fields if name.startswith("_") and name not in declared}
        return {name: fields[name] for name in sorted(fields) if name not in names | private}

    every = _config_reads(*(_parse(source / file) for file in SHARED)) | _self_reads(_methods(base)["__post_init__"])
    every = without_methods(every | _declared(base), methods | {"rope_parameters", "rope_theta"})
    table: dict[str, Any] = {
        "transformers": importlib.metadata.version("transformers"), "tokenizer": _tokenizer_reads(source),
        "rope": _rope_reads(rope_tree), "every": every,
    }
    for model_type, family in FAMILIES.items():
        config, modeling = _sources(source, model_type)
        declared, renamed = _declared(config), _class_attributes(config).get("attribute_map", {})
        aliases = {name: own for name, own in renamed.items() if name not in declared}
        code = [*_reached(modeling, family.architecture), *([rope_tree] if "rope_parameters" in declared else [])]
        reads = _config_reads(*code) | _configuration_reads(config, _methods(rope))
        reads = {name: value for name, value in reads.items() if name not in every}
        reads = dict.fromkeys(renamed.values()) | reads | declared
        fields = without_methods(reads, {*(methods - {"rope_scaling"}), *_methods(config), *aliases}, declared)
        table[model_type] = {"fields": fields, "aliases": aliases}
        own_rope = _rope_parameters(*_reached(modeling, family.architecture)) - set(ROPE_FIELDS)
        table[model_type] |= {"rope": sorted(own_rope)} if own_rope else {}
    return table


def _sources(source: Path, model_type: str) -> tuple[ast.ClassDef, ast.Module]:
    """The configuration class of a family, and its modeling code."""
    file, config = next(
        (file, node) for file in sorted(source.glob("models/*/configuration_*.py")) for node in _parse(file).body
        if isinstance(node, ast.ClassDef) and _class_attributes(node).get("model_type") == model_type
    )
    bases = [ast.unparse(base) for base in config.bases]
    if bases != ["PreTrainedConfig"]:
        raise SystemExit(f"{config.name} descends from {bases}: teach this script to follow them")
    return config, _parse(file.with_name(file.name.replace("configuration", "modeling")))


def _configuration_reads(config: ast.ClassDef, rope: dict[str, ast.FunctionDef]) -> dict[str, Any]:
    """What the methods of a configuration class read; ``rope`` has those that it inherits for rotary positions."""
    own = _methods(config)
    reads = _self_reads(*(method for name, method in own.items() if name != "to_dict"))
    if "rope_parameters" not in _declared(config):
        return reads
    convert = own.get("convert_rope_params_to_dict")
    inherited = _self_reads(rope["standardize_rope_params"])
    if convert is None or _calls_super(convert):
        return inherited | _self_reads(rope["convert_rope_params_to_dict"]) | reads
    # What the conversion sets, standardizing no longer takes from the fields that all families have.
    for node in ast.walk(convert):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".setdefault"):
            inherited.pop(_constant(node.args[0]), None)
    return inherited | reads


def _rope_reads(tree: ast.Module) -> dict[str, list[str]]:
    """The fields of ``rope_parameters`` that each type of scaling reads."""
    functions = {name: node for name, node in _definitions(tree).items() if name.startswith("_compute_")}
    kinds = next(
        node.value for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and "ROPE_INIT_FUNCTIONS" in ast.unparse(node).split(" = ")[0]
    )
    found = {}
    for kind, function in zip(kinds.keys, kinds.values, strict=True):
        found[_constant(kind)] = sorted(_rope_parameters(functions[ast.unparse(function)]))
    return found


def _rope_parameters(*nodes: ast.AST) -> set[str]:
    """The fields of ``rope_parameters`` that code reads."""
    names = set()
    for node in itertools.chain(*map(ast.walk, nodes)):
        if isinstance(node, ast.Subscript) and "rope_parameters" in ast.unparse(node.value):
            names.add(_constant(node.slice))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("rope_parameters.get", "_dict.get")):
            names.add(_constant(node.args[0]))
    return names - {None}


def _tokenizer_reads(source: Path) -> list[str]:
    """The fields of tokenizer_config.json that any tokenizer reads: they become its keyword arguments."""
    files = [*source.glob("tokenization_*.py"), *source.glob("models/*/tokenization_*.py")]
    mappings = ("kwargs", "init_kwargs", "self.init_kwargs", "config", "tokenizer_config")
    names = set()
    for node in itertools.chain(*(ast.walk(_parse(file)) for file in files)):
        names |= _lookups(node, mappings, ()).keys()
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names |= {each.arg for each in [*node.args.args, *node.args.kwonlyargs]} - {"self"}
    return sorted(name for name in names if not name.startswith("_") and name)


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _definitions(tree: ast.Module) -> dict[str, ast.stmt]:
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def _methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}


def _class_attributes(node: ast.ClassDef) -> dict[str, Any]:
    """What is assigned in the body of a class and is not a field."""
    values = {}
    for each in node.body:
        if isinstance(each, ast.Assign):
            values |= {target.id: _constant(each.value) for target in each.targets if isinstance(target, ast.Name)}
        elif isinstance(each, ast.AnnAssign) and "ClassVar" in ast.unparse(each.annotation):
            values[each.target.id] = None
    return values


def _declared(node: ast.ClassDef) -> dict[str, Any]:
    """The fields of a configuration class."""
    return {
        each.target.id: _constant(each.value) for each in node.body
        if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each.annotation)
    }


def _constant(node: ast.expr | None) -> Any:
    """The value of an expression without names; null for any other, and ``interval(...)(default=VALUE)`` is VALUE."""
    if isinstance(node, ast.Call):
        node = next((each.value for each in node.keywords if each.arg == "default"), None)
    try:
        return None if node is None else eval(ast.unparse(node), {"__builtins__": {}})
    except (NameError, TypeError):
        return None


def _calls_super(method: ast.FunctionDef) -> bool:
    return f"super().{method.name}(" in ast.unparse(method)


def _self_reads(*methods: ast.FunctionDef) -> dict[str, Any]:
    """What methods of a configuration take out of ``kwargs`` or ask ``self`` for."""
    found = {}
    for node in itertools.chain(*map(ast.walk, methods)):
        found = _lookups(node, ("kwargs",), ("self",), ("pop", "get", "setdefault")) | found
    return found


def _config_reads(*nodes: ast.AST) -> dict[str, Any]:
    """What code asks ``config``, ``self.config`` and the like for."""
    found = {}
    configs = ("config", "self.config", "text_config", "effective_config", "layer_config")
    for node in itertools.chain(*map(ast.walk, nodes)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in configs and isinstance(node.ctx, ast.Load):
            found.setdefault(node.attr, None)
        found = _lookups(node, (), configs) | found
    return found


def _lookups(
    node: ast.AST, mappings: tuple[str, ...], objects: tuple[str, ...], methods: tuple[str, ...] = ("pop", "get")
) -> dict[str, Any]:
    """``MAPPING.METHOD("NAME", DEFAULT)``, ``getattr(OBJECT, "NAME", DEFAULT)`` and ``hasattr``."""
    if not isinstance(node, ast.Call):
        return {}
    called, arguments = ast.unparse(node.func), node.args
    if called in ("getattr", "hasattr") and arguments and ast.unparse(arguments[0]) in objects:
        arguments = arguments[1:]
    elif called not in [f"{each}.{method}" for each in mappings for method in methods]:
        return {}
    if not arguments or not isinstance(arguments[0], ast.Constant):
        return {}
    return {arguments[0].value: _constant(arguments[1]) if len(arguments) > 1 else None}


def _reached(tree: ast.Module, start: str) -> Iterator[ast.stmt]:
    """The definitions of a module that the class ``start`` needs."""
    nodes: dict[str, ast.stmt] = {**_definitions(tree)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            nodes |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    waiting, seen = [start], set()
    while waiting:
        name = waiting.pop()
        if name in nodes and name not in seen:
            seen.add(name)
            node = nodes[name]
            if isinstance(node, ast.ClassDef):  # initial weights are not those of a file
                node.body = [each for each in node.body if getattr(each, "name", "") != "_init_weights"]
            yield node
            waiting += [each.id for each in ast.walk(node) if isinstance(each, ast.Name)]


def text(table: dict[str, Any]) -> str:
    """The table as JSON, a line for each family and its aliases."""
    lines = []
    for name, value in table.items():
        if isinstance(value, dict) and "aliases" in value:
            inner = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(part)}" for key, part in value.items())
            lines.append(f"{json.dumps(name)}: {{\n  {inner}}}")
        else:
            lines.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(text(read_fields(transformers_source())), encoding="utf-8")
    print(FILE)
