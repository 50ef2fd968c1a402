"""Finds a trainer's own classes that an adapter builds on, and checks their signatures before any training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from cropi.errors import CropiError


def base_class(what: str, module: str, name: str, methods: Mapping[str, Sequence[str]], remedy: str) -> Any:
    """A class of a trainer, whose methods take what an adapter hands to them.

    A release that keeps these names and arguments works, whatever its number is.

    Args:
        what: the adapter, for messages.
        module, name: where the class is.
        methods: by name, the arguments after ``self`` that each method must take.
        remedy: what to do where the class is another one.

    Raises:
        ModuleNotFoundError: the trainer is not installed, or one of its own dependencies.
        CropiError: it has no such class, or a method takes other arguments; names them.
    """
    package = module.partition(".")[0]
    try:
        cls = getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ModuleNotFoundError(
                f"{what} runs inside {package}, which is not installed", name=package
            ) from None
        if not str(error.name).startswith(package):
            raise  # one of the trainer's own dependencies
        raise CropiError(f"{what}: the installed {package!r} has no module {error.name}; {remedy}") from error
    except AttributeError as error:
        raise CropiError(f"{what}: {module} has no {name}; {remedy}") from error
    for method, wanted in methods.items():
        held = getattr(cls, method, None)
        if not callable(held):
            raise CropiError(f"{what}: {module}.{name} has no method {method}; {remedy}")
        try:
            inspect.signature(held).bind(None, *wanted)
        except TypeError as error:
            raise CropiError(
                f"{what}: {module}.{name}.{method} does not take ({', '.join(wanted)}): {error}; {remedy}"
            ) from error
    return cls
