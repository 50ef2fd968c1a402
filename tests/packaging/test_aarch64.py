"""The CPU kernels compile for aarch64, without a warning, where a cross compiler is installed.

Found that way: GCC before 13 has no ``_Float16`` in C++ on aarch64, and none of the kernels compiled there.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("aarch64-linux-gnu-g++")  # Debian and Ubuntu: g++-aarch64-linux-gnu
KERNELS = re.findall(r"csrc/cpu/\w+\.cpp", (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"))


@pytest.mark.skipif(COMPILER is None, reason="aarch64-linux-gnu-g++ is not installed")
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_compile_for_aarch64(source: str, tmp_path: Path) -> None:
    assert COMPILER is not None
    level = ["-DCROPI_ISA=v1", "-DCROPI_ISA_v1=1", "-DCROPI_HAVE_v1=1"]
    warnings = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    done = subprocess.run(
        [COMPILER, "-std=c++17", "-O3", "-fPIC", *warnings, *level, "-Icsrc/include", "-Icsrc"]
        + ["-c", source, "-o", str(tmp_path / "kernel.o")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
