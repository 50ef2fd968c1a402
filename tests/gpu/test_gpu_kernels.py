"""Runs tests/gpu/kernels: in Triton's interpreter, and compiled for two generations of GPUs. Each needs a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.once import folder_of_the_run

FOLDER = Path(__file__).parent / "kernels"
WAYS = {
    "interpreted": {"TRITON_INTERPRET": "1"},
    "sm_80": {"KERNELS_FOR": "80"},
    "sm_90": {"KERNELS_FOR": "90"},
}

EMULATED = ["sm_80", "sm_90"]
ONLY = {
    "test_launches.py": ["interpreted"],
    "test_logprob_tiles.py": ["interpreted"],
    "test_emulated_gpu.py": EMULATED,
    "test_host_cost.py": ["sm_90"],
    "test_whole_model.py": EMULATED,
}
# A process starts in three seconds: short files share one. (test_host_cost.py counts what a fresh one does.)
TOGETHER = (
    ("test_emulated_gpu.py", "test_far_rows.py", "test_launches.py", "test_row_kernels.py"),
    ("test_fused_kernels.py", "test_gpu_engine.py", "test_project_kernels.py"),
)


def runs() -> Iterator[tuple[str, str]]:
    """A way and the files of one process."""
    alone = {path.name for path in FOLDER.glob("test_*.py")}.difference(*TOGETHER)
    for group in (*sorted((name,) for name in alone), *TOGETHER):
        for way in WAYS:
            files = [name for name in group if way in ONLY.get(name, WAYS)]
            if files:
                yield way, " ".join(files)


@pytest.mark.slow
@pytest.mark.parametrize("way,files", runs())
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_on_cpu_tensors(way: str, files: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | WAYS[way]
    # One cache for all files and workers of this run: a kernel is compiled once a capability, not once a file. Triton
    # writes its entries whole and renames them.
    env["TRITON_CACHE_DIR"] = str(folder_of_the_run(tmp_path_factory) / f"triton-{way}")
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whatever plugins are installed take a second to import
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(FOLDER / name) for name in files.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=FOLDER.parents[2])
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_host_code_with_all_tensors_elsewhere() -> None:
    """Nothing is left on the host and no number is read: on a GPU the one is an error, the other a wait."""
    pytest.importorskip("transformers")
    tests = FOLDER.parents[1]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, str(FOLDER / "elsewhere.py")], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    launched = set(done.stdout.split()[1:])
    assert launched >= {"fold_kernel", "slab_kernel", "rows_kernel", "vector_kernel", "norm_kernel"}, launched
    assert launched >= {"forward_kernel", "backward_kernel", "gather_runs_kernel", "draws_kernel"}, launched
