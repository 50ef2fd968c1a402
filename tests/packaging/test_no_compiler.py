"""A build on a machine without a C++ compiler ends in an error that says what to install; the next one finds it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def configure(build: Path, compiler: str, *options: str) -> tuple[int, str]:
    """CMake's exit status and all that it said, in one line."""
    done = subprocess.run(
        [str(CMAKE), "-S", str(ROOT), "-B", str(build), *options],
        env=os.environ | {"CXX": compiler},
        capture_output=True,
        text=True,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
def test_the_error_names_the_compiler_to_install(tmp_path: Path) -> None:
    status, said = configure(tmp_path, "no-such-compiler")
    assert status != 0 and "no C++ compiler: install g++ 12 or newer" in said, said
    assert "(now: no-such-compiler)" in said, said


# pip keeps the folder of a build that failed, and CMake in it what was not found.
@pytest.mark.long
@pytest.mark.skipif(CMAKE is None or shutil.which("c++") is None, reason="cmake and c++ are not installed")
def test_a_compiler_that_was_installed_since_is_found(tmp_path: Path) -> None:
    configure(tmp_path, "no-such-compiler")
    # What comes behind the compiler takes time, and is left out.
    _, said = configure(tmp_path, "c++", "-D", "CMAKE_DISABLE_FIND_PACKAGE_Python=ON")
    assert "no C++ compiler" not in said and "The CXX compiler identification is" in said, said
