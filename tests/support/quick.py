"""What `make quick` runs: one case of every test that takes less than half a second.

A test that takes longer (processor time of one case, on one core) is marked `long`, or `slow` beyond ten seconds. Of a
parametrised test one case runs. The checksum of the test's name says which one, so that every run takes the same case,
and all dtypes, instruction sets and backends occur among the tests.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest

LEFT_OUT = ("slow", "long")
# A file that is left out as a whole is not even imported: collecting takes as long as a quarter of the tests.
WHOLE_FILE = re.compile(r"^pytestmark = (?:\[\s*)?pytest\.mark\.(?:slow|long)\b", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="one case of every test of less than half a second")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A test file whose tests are all left out; None lets the other rules decide."""
    if not config.getoption("quick", False) or collection_path.suffix != ".py":
        return None
    return bool(WHOLE_FILE.search(collection_path.read_text(encoding="utf-8"))) or None


def choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one case of every short test in ``items``, in their order."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not any(item.get_closest_marker(name) for name in LEFT_OUT):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = {cases[zlib.crc32(name.encode()) % len(cases)] for name, cases in tests.items()}
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = [item for item in items if item in chosen]
