"""`make build` installs again where modules have moved: an editable install keeps the place of each."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("Makefile", "pyproject.toml", "CMakeLists.txt", "constraints.txt", "scripts/install_torch.py")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_a_module_that_has_become_a_folder_is_installed_again(tmp_path: Path) -> None:
    for name in (*FILES, "cropi_kernels/_version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("csrc", "python/cropi", ".venv/stamps"):
        (tmp_path / folder).mkdir(parents=True)
    module = tmp_path / "cropi_kernels" / "attach.py"
    module.touch()

    def make(option: str) -> int:
        command = ["make", option, "build", "VENV=.venv"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode

    assert make("--touch") == 0 and make("--question") == 0
    # What an editable install sees by itself.
    module.write_text("changed = True\n")
    assert make("--question") == 0
    (tmp_path / "cropi_kernels" / "attach").mkdir()
    module.rename(tmp_path / "cropi_kernels" / "attach" / "__init__.py")
    assert make("--question") == 1
