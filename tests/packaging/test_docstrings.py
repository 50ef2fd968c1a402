"""What ``help()`` shows: every public name is explained, and every example in a docstring runs as it is written."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch

import cropi_kernels

PUBLIC = [name for name in cropi_kernels.__all__ if name != "__version__"]


def modules() -> list[ModuleType]:
    """Every module that needs no Triton."""
    names = [m.name for m in pkgutil.walk_packages(cropi_kernels.__path__, "cropi_kernels.")]
    return [
        importlib.import_module(n)
        for n in names
        if "triton" not in n.split(".")[-1] and not n.endswith("._C")
    ]


def test_examples_run() -> None:
    """After ``import torch`` and ``from cropi_kernels import *``."""
    known = {"torch": torch, **{name: getattr(cropi_kernels, name) for name in PUBLIC}}
    results = [doctest.testmod(module, extraglobs=known) for module in modules()]
    assert sum(r.failed for r in results) == 0
    assert sum(r.attempted for r in results) > 20


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_explained(name: str) -> None:
    text = inspect.getdoc(getattr(cropi_kernels, name))
    assert text and not text.startswith(f"{name}("), (
        "a docstring of its own, not the one that dataclasses write"
    )
