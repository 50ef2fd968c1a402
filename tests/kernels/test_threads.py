"""The kernels' own threads: the same bits from any number of them, from callers at the same time, and after a fork."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from cropi_kernels import SketchSpec, plan_matrix, sketch_linear

PLAN = plan_matrix(SketchSpec(seed=3), "layer.weight", 192, 64)
D, A = torch.randn(300, 192), torch.randn(300, 64)
OFFSETS = torch.tensor([0, 100, 300])


def sketch() -> np.ndarray:
    """Through numpy: torch's own OpenMP threads do not survive a fork."""
    out = torch.from_numpy(np.zeros((2, 32768), np.float32))
    return sketch_linear(D, A, OFFSETS, PLAN, out, backend="cpu").numpy()


@pytest.fixture(autouse=True)
def two_threads(surroundings: None) -> None:
    torch.set_num_threads(2)


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    expected = sketch()
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda _: sketch(), range(200)))
    assert all(np.array_equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_starts_its_own_threads() -> None:
    expected = sketch()  # the parent's threads exist now; the child inherits none of them
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(sketch(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


COUNT = """
import os, torch
from cropi_kernels import ProjectionSpec, project
torch.set_num_threads(2)
x = torch.randn(1, 1 << 20)
x.exp()
before = len(os.listdir("/proc/self/task"))
project(x, ProjectionSpec(1024))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads under /proc")
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch without OpenMP")
def test_torch_and_the_kernels_share_their_threads() -> None:
    """Threads of our own would fight for the cores with torch's, which spin after every operation."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
