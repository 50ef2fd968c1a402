"""The command line in this process, and the files that commands write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cropi.cli import main


def cropi(*words: object) -> int:
    """Run a command; returns its exit status."""
    return main([str(word) for word in words])


def json_lines(path: Path) -> list[Any]:
    """The JSON values of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
