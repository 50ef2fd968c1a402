"""What ``help()`` shows: every public name is explained, and every example in a docstring runs as it is written."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import cropi
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


@pytest.mark.long
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


# ------------------------------------------------------------------------------------------- the thin layer
PUBLIC_OF_CROPI = [name for name in cropi.__all__ if name != "__version__"]


def documented(name: str) -> list[Any]:
    """A public name of cropi and, of a class, its public methods that it defines itself."""
    held = cropi.__getattr__(name)  # not what an import of an old module has put there in another test
    own = vars(held).items() if inspect.isclass(held) else ()
    methods = [value for key, value in own if not key.startswith("_") and inspect.isfunction(value)]
    return [held, *methods]


@pytest.mark.parametrize("name", PUBLIC_OF_CROPI)
def test_every_public_name_of_cropi_is_explained(name: str) -> None:
    for held in documented(name):
        text = inspect.getdoc(held)
        assert text and not text.startswith(f"{name}("), held


@pytest.mark.parametrize("name", PUBLIC_OF_CROPI)
def test_examples_of_cropi_run(name: str) -> None:
    held = cropi.__getattr__(name)
    module = importlib.import_module(held.__module__)
    tests = doctest.DocTestFinder(recurse=False).find(
        held, name, module, globs={**vars(module), "torch": torch}
    )
    runs = [example for example in tests[0].examples if not example.options.get(doctest.SKIP)]
    assert runs, "a runnable example"
    runner = doctest.DocTestRunner()
    for test in tests:
        assert runner.run(test).failed == 0


@pytest.mark.long
def test_examples_of_other_modules_run() -> None:
    """Those of what is public run above; the adapters of trainers have none."""
    root, attempted = Path(cropi.__file__).parent, 0
    for file in sorted(root.rglob("*.py")):
        name = ".".join(file.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
        if ">>>" in file.read_text(encoding="utf-8") and name != "cropi.api":
            done = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
            assert not done.failed, file
            attempted += done.attempted
    assert attempted > 100


def test_the_page_of_the_api_names_what_is_public() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    table = page.split("## `import cropi`")[1].split("\n\n")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row)) == sorted(cropi.__all__)
