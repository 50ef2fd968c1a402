"""The CPU kernels compile for aarch64 and by clang, without a warning, where those compilers are installed.

Found that way: GCC before 13 has no ``_Float16`` in C++ on aarch64, and none of the kernels compiled there.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
AARCH64 = shutil.which("aarch64-linux-gnu-g++")  # Debian and Ubuntu: g++-aarch64-linux-gnu
CLANG = shutil.which("clang++")
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
KERNELS = re.findall(r"csrc/cpu/\w+\.cpp", CMAKE)
# {level: flags}, as CMake has them.
FLAGS = dict(re.findall(r"set\(CROPI_FLAGS_(v\d) (-march[^)]*)\)", CMAKE))


def compile_kernel(compiler: str, source: str, level: str, *flags: str) -> None:
    names = [f"-DCROPI_ISA={level}", f"-DCROPI_ISA_{level}=1", "-DCROPI_HAVE_v1=1"]
    warnings = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    command = [compiler, "-std=c++17", "-O3", "-fPIC", *warnings, *names, "-Icsrc/include", "-Icsrc"]
    done = subprocess.run([*command, *flags, source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(AARCH64 is None, reason="aarch64-linux-gnu-g++ is not installed")
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_compile_for_aarch64(source: str, tmp_path: Path) -> None:
    assert AARCH64 is not None
    compile_kernel(AARCH64, source, "v1", "-c", "-o", str(tmp_path / "kernel.o"))


@pytest.mark.skipif(
    CLANG is None or platform.machine() != "x86_64", reason="levels of x86-64; clang++ is not installed"
)
@pytest.mark.parametrize("level", ["v1", "v3", "v4"])
def test_kernels_compile_by_clang(level: str) -> None:
    assert CLANG is not None and set(FLAGS) == {"v3", "v4"}
    if int(subprocess.run([CLANG, "-dumpversion"], capture_output=True, text=True).stdout.split(".")[0]) < 15:
        pytest.skip("clang before 15 has no _Float16 on x86-64")
    for source in KERNELS:
        compile_kernel(CLANG, source, level, "-fsyntax-only", *FLAGS.get(level, "").split())
