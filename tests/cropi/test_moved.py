"""Imports of early scripts work, and say where the module is now."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

import cropi
from cropi._moved import MOVED


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Other tests of this process find the packages as they were: an import sets an attribute of its parent."""
    yield
    for old in MOVED:
        if sys.modules.pop(old, None) is not None:
            parent, _, name = old.rpartition(".")
            vars(sys.modules[parent]).pop(name, None)


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_module_gives_what_the_new_one_has(old: str) -> None:
    sys.modules.pop(old, None)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {MOVED[old]}; the old name goes"):
        module = importlib.import_module(old)
    new = importlib.import_module(MOVED[old])
    own = {name for name, value in vars(new).items() if getattr(value, "__module__", None) == new.__name__}
    names = own - {"__getattr__"}  # a module has its own
    assert names and all(getattr(module, name) is getattr(new, name) for name in names)
    with pytest.raises(AttributeError):
        module.never_there  # noqa: B018


@pytest.mark.long
def test_an_old_module_named_as_a_function_can_be_called() -> None:
    """``cropi.influence`` was a module, and holds the function ``influence``."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from cropi.influence import validation_means, influence\n"
        "import cropi\n"
        "try:\n    cropi.influence(None, [])\nexcept ValueError as error:\n    print(error)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_real_modules_come_first() -> None:
    assert not set(MOVED) & {f"cropi.{name}" for name in ("store", "report", "sketching", "data", "model")}
    assert cropi.__name__ == "cropi"
