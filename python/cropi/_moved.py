"""Names of the first release that have changed: modules and keywords work by them once more, with a warning."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

MOVED = {
    "cropi.advantages": "cropi.data.rewards",
    "cropi.batches": "cropi.gradient.batches",
    "cropi.behaviour": "cropi.gradient.behaviour",
    "cropi.curriculum.command": "cropi.commands",
    "cropi.curriculum.in_process": "cropi.trainers.trl.in_process",
    "cropi.estimators": "cropi.gradient.estimators",
    "cropi.export": "cropi.data.export",
    "cropi.fingerprint": "cropi.model.fingerprint",
    "cropi.influence": "cropi.ranking.influence",
    "cropi.interrupt": "cropi.sketching.interrupt",
    "cropi.job": "cropi.sketching.job",
    "cropi.layout": "cropi.gradient.layout",
    "cropi.manifest": "cropi.store.manifest",
    "cropi.model_sources": "cropi.model.sources",
    "cropi.models": "cropi.model.load",
    "cropi.prompt_ids": "cropi.data.prompt_ids",
    "cropi.records": "cropi.data.records",
    "cropi.scan": "cropi.data.scan",
    "cropi.selection": "cropi.ranking.selection",
    "cropi.shards": "cropi.store.shards",
    "cropi.summary": "cropi.sketching.summary",
    "cropi.tokenize": "cropi.gradient.tokenize",
    "cropi.trainers.checkpoints": "cropi.trainers.trl.checkpoints",
    "cropi.trainers.grouping": "cropi.trainers.dumps.rollout",
    "cropi.trainers.options": "cropi.trainers.trl.options",
    "cropi.trainers.pickled": "cropi.trainers.dumps.pickled",
    "cropi.trainers.ranks": "cropi.trainers.trl.ranks",
    "cropi.trainers.rollout_log": "cropi.trainers.trl.rollout_log",
    "cropi.trainers.scoring": "cropi.trainers.trl.scoring",
    "cropi.trainers.verl.batch": "cropi.trainers.dumps.verl_batch",
    "cropi.trainers.verl.dumps": "cropi.trainers.dumps.verl",
    "cropi.trajectories": "cropi.data.readers",
}
# Where the rest of a module is that has been split.
REST = {
    "cropi.advantages": "cropi.gradient.estimators",
    "cropi.manifest": "cropi.store.differences",
    "cropi.tokenize": "cropi.gradient.template",
    "cropi.trajectories": "cropi.data.writers",
}


class MovedModule(types.ModuleType):
    """The module at the old place, which looks every name up at the new one.

    It can be called where the module of that name held a function of that name: an import of the old module
    ``cropi.influence`` sets the attribute ``influence`` of ``cropi``, and that is the function `cropi.api.influence`.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        new = importlib.import_module(MOVED[self.__name__])
        if not hasattr(new, name) and self.__name__ in REST:
            new = importlib.import_module(REST[self.__name__])
        return getattr(new, name)

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(MOVED[self.__name__]))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.__name__ == "cropi.influence":
            return importlib.import_module("cropi.api").influence(*args, **kwargs)
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


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


def renamed(**names: str) -> Callable[[type[T]], type[T]]:
    """A decorator of a class, by ``old="new"``: it is made with keywords of the first release too, with a warning."""

    def decorate(cls: type[T]) -> type[T]:
        init: Any = vars(cls)["__init__"]

        @functools.wraps(init)
        def made(self: T, *args: Any, **kwargs: Any) -> None:
            now: dict[str, Any] = {}
            for old, new in names.items():
                if old in kwargs:
                    warnings.warn(
                        f"{old} of {cls.__name__} is now {new}; the old name goes with the next release",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    now[new] = kwargs.pop(old)
            init(self, *args, **kwargs, **now)

        cls.__init__ = made  # type: ignore[method-assign,assignment]
        return cls

    return decorate


def install() -> None:
    """Let the old names be imported; asked last, after every real module."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def moved_names(package: str, new: str) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package where a module of the first release was: its names are in ``new``."""

    def get(name: str) -> Any:
        held = None if name.startswith("_") else getattr(importlib.import_module(new), name, None)
        if held is None:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        warnings.warn(
            f"{package}.{name} is now {new}.{name}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return held

    return get
