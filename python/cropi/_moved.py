"""Module paths that early scripts import: each gives what the present module has, with a warning that names it."""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

MOVED = {
    "cropi.batches": "cropi.gradient.batches",
    "cropi.estimators": "cropi.gradient.estimators",
    "cropi.influence": "cropi.ranking.influence",
    "cropi.job": "cropi.sketching.job",
    "cropi.layout": "cropi.gradient.layout",
    "cropi.records": "cropi.data.records",
    "cropi.tokenize": "cropi.gradient.tokenize",
}


class MovedModule(types.ModuleType):
    """The module at the old place, which looks every name up at the new one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(importlib.import_module(MOVED[self.__name__]), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`cropi.api.influence`: an import of the old module sets the attribute ``influence`` of ``cropi``."""
        if self.__name__ != "cropi.influence":
            raise TypeError("'module' object is not callable")
        return importlib.import_module("cropi.api").influence(*args, **kwargs)


class _Finder:
    """Finder and loader in one, without the base classes: importlib.abc takes longer to import than this package."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MovedModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        new = MOVED[module.__name__]
        importlib.import_module(new)
        warnings.warn(
            f"{module.__name__} is now {new}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )


def install() -> None:
    """Let the old names be imported; asked last, after every real module."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
