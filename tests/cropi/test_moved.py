"""Imports of the first release still work, and say where the module is now."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import cropi
from cropi._moved import MOVED
from cropi.cli import make_parser
from cropi.cli.config import apply_config
from cropi.trainers.trl import Recording

# Names that scripts of the first release imported from each place, where it was not a package then and is one now.
PACKAGES = {
    "cropi.store": ["SketchStore"],
    "cropi.sketching": ["sketch"],
    "cropi.report": ["plot_scores", "best_and_worst", "prompt_texts"],
    "cropi.trainers.slime": ["read_dump"],
    "cropi.trainers.nemo_rl": ["read_dump"],
}


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


@pytest.mark.parametrize(("package", "names"), PACKAGES.items(), ids=list(PACKAGES))
def test_modules_that_became_packages_keep_their_names(package: str, names: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module = importlib.import_module(package)
        assert all(callable(getattr(module, name)) for name in names)


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


def test_options_of_the_first_release_are_taken_by_their_old_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parse = make_parser().parse_args
    assert parse(["convert", "dump", "--out", "t.jsonl", "--keep", "all"]).steps == "all"
    assert "cropi convert: --keep is now --steps; the old name goes" in capsys.readouterr().err
    assert parse(["select", "--scores", "s", "--out", "o", "--dataset-id=uid"]).id_key == "uid"
    assert "cropi select: --dataset-id is now --id-key; the old name goes" in capsys.readouterr().err
    config = tmp_path / "c.yaml"
    config.write_text("dataset_id: uid\n")
    args = parse(["curriculum", str(config)])
    args.words = [str(config)]
    apply_config(args)
    assert args.id_key == "uid" and "--dataset-id is now --id-key" in capsys.readouterr().err


def test_a_keyword_of_the_first_release_is_taken_by_its_old_name() -> None:
    with pytest.warns(DeprecationWarning, match="id_column of Recording is now id_key; the old name goes"):
        assert Recording(id_column="uid") == Recording(id_key="uid")  # type: ignore[call-arg]
    with pytest.raises(TypeError), pytest.warns(DeprecationWarning):
        Recording(id_column="uid", id_key="uid")  # type: ignore[call-arg]
