"""What `make quick` runs: one case of a test, the same one every time, and tests of every package."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import quick

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "sketcher", "cropi", "trainers", "packaging")
LEFT_OUT = re.compile(rf"(?m)^@pytest\.mark\.(?:{'|'.join(quick.LEFT_OUT)})\b")


@dataclass(frozen=True)
class Item:
    """As much of pytest's as the choice looks at."""

    nodeid: str
    marks: tuple[str, ...]

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None


def chosen(*nodeids: str, long: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """The tests of these that run, and those that are left out."""
    left: list[Any] = []
    items: list[Any] = [Item(nodeid, ("long",) if nodeid in long else ()) for nodeid in nodeids]
    config: Any = SimpleNamespace(hook=SimpleNamespace(pytest_deselected=lambda items: left.extend(items)))
    quick.choose(config, items)
    return [one.nodeid for one in items], [one.nodeid for one in left]


def test_one_case_of_a_test_runs_and_no_long_one() -> None:
    runs, left = chosen(
        "f.py::a[1]", "f.py::a[2]", "f.py::b", "f.py::c[1]", "f.py::C::a[1]", long=("f.py::c[1]",)
    )
    assert [name.partition("[")[0] for name in runs] == ["f.py::a", "f.py::b", "f.py::C::a"]
    assert sorted(runs + left) == sorted(
        ["f.py::a[1]", "f.py::a[2]", "f.py::b", "f.py::c[1]", "f.py::C::a[1]"]
    )


def test_the_case_is_the_same_every_time_and_another_one_for_other_tests() -> None:
    cases = [f"f.py::test_{i}[{case}]" for i in range(60) for case in ("cpu", "reference", "triton")]
    runs, _ = chosen(*cases)
    assert chosen(*cases)[0] == runs and len(runs) == 60
    assert {name.partition("[")[2] for name in runs} == {"cpu]", "reference]", "triton]"}


def test_a_file_that_is_long_as_a_whole_is_not_imported(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(getoption=lambda name, default: name == "quick")
    for text, ignored in [
        ("pytestmark = pytest.mark.long\n", True),
        ("pytestmark = [\n    pytest.mark.slow,\n    pytest.mark.gpu,\n]\n", True),
        ("pytestmark = pytest.mark.gpu\n\n\n@pytest.mark.long\ndef test() -> None: ...\n", None),
    ]:
        (tmp_path / "test_it.py").write_text(text)
        assert quick.pytest_ignore_collect(tmp_path / "test_it.py", config) is ignored


@functools.cache
def counts(folder: str) -> list[tuple[Path, int, int]]:
    """(file, tests, those that `make quick` runs) of every file of a folder of tests."""
    counted = []
    for path in sorted((ROOT / "tests" / folder).glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        tests, marks = len(re.findall(r"(?m)^def test_", text)), len(LEFT_OUT.findall(text))
        counted.append((path, tests, 0 if quick.WHOLE_FILE.search(text) else tests - marks))
    return counted


@pytest.mark.parametrize("folder", FOLDERS)
def test_most_tests_of_every_folder_are_short(folder: str) -> None:
    counted = [(tests, short) for _, tests, short in counts(folder)]
    tests, short = map(sum, zip(*counted))
    assert 3 * short >= 2 * tests, f"`make quick` runs {short} of {tests} tests in tests/{folder}"


def test_every_package_has_short_tests() -> None:
    """Ops by their names, sub-packages of `cropi` by an import or by their command."""
    files = [path for name in FOLDERS for path, _, short in counts(name) if short]
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    ops = [path.parent.name for path in (ROOT / "cropi_kernels" / "ops").glob("*/__init__.py")]
    layer = [path.parent.name for path in (ROOT / "python" / "cropi").glob("*/__init__.py")]
    assert len(ops) > 5 and len(layer) > 8
    missing = [name for name in ops if not re.search(rf"\b{name}\b", text)]
    missing += [f"cropi.{name}" for name in layer if not re.search(rf'(?:cropi\.|\["){name}\b', text)]
    assert not missing, f"no test that `make quick` runs is of {missing}"
