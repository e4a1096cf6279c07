"""Public names of a package that are imported when they are first used, so that importing the package is cheap."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

TYPE_CHECKING = False  # typing is left out of what every start of the command line imports
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["lazy"]


def lazy(package: str, **modules: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` of a package's ``__init__`` (PEP 562).

    Args:
        package: the package's ``__name__``.
        modules: for each module of the package (``a__b`` for ``a.b``) the public names that it defines, separated by
            spaces.
    """
    homes = {name: module.replace("__", ".") for module, names in modules.items() for name in names.split()}

    class Package(ModuleType):
        """A package in which a public name is never replaced by the module of the same name, when that is imported."""

        def __setattr__(self, name: str, value: Any) -> None:
            if not (name in homes and isinstance(value, ModuleType)):
                super().__setattr__(name, value)

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    sys.modules[package].__class__ = Package
    return get, names, sorted(homes)
