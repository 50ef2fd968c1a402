"""Runs tests/gpu/kernels: compiled for a generation of GPUs, or in Triton's interpreter. Each needs a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.once import folder_of_the_run

FOLDER = Path(__file__).parent / "kernels"
WAYS = {
    "interpreted": {"TRITON_INTERPRET": "1"},
    "sm_80": {"KERNELS_FOR": "80"},
    "sm_90": {"KERNELS_FOR": "90"},
}

# The files of each process, which takes three seconds to start. All that kernels and launches make of a generation are
# the tiles of matrix products, whose size follows the shared memory of a block.
RUNS = (
    # The other tests of rows run as compiled, with the same dtypes and bounds.
    (
        "interpreted",
        "test_launches.py test_row_kernels.py::test_more_programs_than_a_second_axis_has",
    ),
    ("interpreted", "test_logprob_tiles.py"),  # by copies of descriptors, which the emulator does not have
    ("sm_90", "test_emulated_gpu.py test_far_rows.py test_row_kernels.py"),
    ("sm_90", "test_fused_kernels.py test_gpu_engine.py test_project_kernels.py"),
    ("sm_90", "test_gpu_suite.py"),
    ("sm_90", "test_grouped_kernel.py"),
    ("sm_90", "test_host_cost.py"),  # counts what a fresh process does
    ("sm_90", "test_sketch_kernels.py"),
    ("sm_90", "test_whole_model.py"),
    ("sm_80", "test_grouped_kernel.py"),
    (
        "sm_80",
        "test_sketch_kernels.py::test_sketch_linear test_sketch_kernels.py::test_matrices_in_one_launch",
    ),
)


def test_every_file_is_in_a_run() -> None:
    assert {path.name for path in FOLDER.glob("test_*.py")} == {
        name.partition("::")[0] for _, files in RUNS for name in files.split()
    }


@pytest.mark.slow
@pytest.mark.parametrize("way,files", RUNS)
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
