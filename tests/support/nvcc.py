"""The CUDA kernels as nvcc compiles them, once a run: for the limits of their registers, and for the PTX emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.once import once

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = ("project_sparse", "project_dense", "api")
NVCC = shutil.which("nvcc") or next(
    (str(p) for p in [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")] if p.exists()),
    None,
)
OPTIONS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", f"-I{CSRC / 'include'}", f"-I{CSRC}"]


def compiled(factory: pytest.TempPathFactory, source: str, architecture: int) -> Path:
    """A folder with the source's PTX, its object, and in ``said.txt`` what ptxas says of each kernel."""

    def make(folder: Path) -> None:
        command = [str(NVCC), *OPTIONS, "-c", "-Werror", "all-warnings", "-Xptxas=-v"]
        command += [f"-gencode=arch=compute_{architecture},code=[compute_{architecture},sm_{architecture}]"]
        command += ["--keep", "--keep-dir", str(folder), str(CSRC / "cuda" / f"{source}.cu")]
        done = subprocess.run(
            [*command, "-o", str(folder / f"{source}.o")], capture_output=True, text=True, cwd=folder
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "said.txt").write_text(done.stderr)

    return once(factory, f"{source}-{architecture}", make)


def linked(factory: pytest.TempPathFactory, runtime: Path, architecture: int) -> tuple[Path, list[str]]:
    """The objects linked with ``runtime`` in place of CUDA's, and their modules in PTX."""
    folders = [compiled(factory, source, architecture) for source in SOURCES]

    def make(folder: Path) -> None:
        objects = [str(path) for made in folders for path in made.glob("*.o")]
        command = [str(NVCC), *OPTIONS, "-shared", "-cudart=none", *objects, str(runtime)]
        done = subprocess.run([*command, "-o", str(folder / "library.so")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    made = once(factory, f"cuda-{architecture}", make)
    return made / "library.so", [path.read_text() for folder in folders for path in folder.glob("*.ptx")]
