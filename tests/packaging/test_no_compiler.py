"""A build on a machine without a C++ compiler ends in an error that says what to install."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")
def test_the_error_names_the_compiler_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path)],
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "no C++ compiler: install g++ 12 or newer" in said, said
    assert "(now: no-such-compiler)" in said, said
