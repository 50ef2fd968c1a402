"""Scripts that are started without what they need say what that is, and do nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
# What a call without arguments is told to give.
NEEDED = {
    "install_torch.py": "constraints",
    "run_notebooks.py": "folder",
    "sanitize.sh": "address or thread",
    "site_pages.py": "out",
    "test_verl.sh": "a version of verl",
    "test_versions.sh": "lowest or newest",
    "wheels.sh": "a folder for the wheels",
}


def started(script: str, *args: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = sys.executable if script.endswith(".py") else "bash"
    return subprocess.run(
        [program, str(SCRIPTS / script), *args], cwd=folder, capture_output=True, text=True, timeout=60
    )


def test_all_scripts_are_here() -> None:
    # griffe_docstrings.py is a plug-in of mkdocstrings, which nobody starts.
    assert NEEDED.keys() | {"griffe_docstrings.py"} == {path.name for path in SCRIPTS.glob("*.*")}


@pytest.mark.parametrize("script", sorted(NEEDED))
def test_called_with_nothing(script: str, tmp_path: Path) -> None:
    done = started(script, folder=tmp_path)
    assert done.returncode and NEEDED[script] in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [name for name in NEEDED if name.endswith(".py")])
def test_help_is_no_argument(script: str, tmp_path: Path) -> None:
    """A folder of the name --help was emptied and filled with the site's pages."""
    done = started(script, "--help", folder=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {script}"), done.stderr
    assert not list(tmp_path.iterdir())


def test_wheels_for_no_interpreter(tmp_path: Path) -> None:
    done = started("wheels.sh", str(tmp_path / "out"), folder=tmp_path)
    assert done.returncode and "an interpreter" in done.stderr
