"""What the scripts share: their options, and the table that they print and write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from cropi.atomic import write_atomic


def options(about: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a script's docstring as it is."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def folder(path: str) -> Path:
    """The type of ``--folder``: it is made now, and not missed after the work."""
    made = Path(path)
    made.mkdir(parents=True, exist_ok=True)
    return made


def publish(path: Path, lines: Sequence[str]) -> None:
    """Print lines of Markdown, and write them to a file."""
    text = "\n".join(lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text + "\n")
    print(text)
