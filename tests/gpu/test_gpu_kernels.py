"""Runs tests/gpu/kernels: in Triton's interpreter, and compiled for two generations of GPUs. Each needs a process."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
RUNS = [(way, path.name) for path in FOLDER.glob("test_*.py") for way in ONLY.get(path.name, WAYS)]


@pytest.mark.slow
@pytest.mark.parametrize("way,file", sorted(RUNS))
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_on_cpu_tensors(way: str, file: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | WAYS[way]
    # One cache for all files and workers of this run: a kernel is compiled once a capability, not once a file. The
    # folder above a worker's base is the run's; Triton writes its entries whole and renames them.
    base = tmp_path_factory.getbasetemp()
    env["TRITON_CACHE_DIR"] = str(
        (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"triton-{way}"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)]
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
    assert launched >= {"forward_kernel", "backward_kernel", "gather_kernel", "places_kernel"}, launched
