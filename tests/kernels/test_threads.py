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
    out = torch.zeros(2, 32768)
    return sketch_linear(D, A, OFFSETS, PLAN, out, backend="cpu").numpy()


@pytest.fixture(autouse=True)
def two_threads(surroundings: None) -> None:
    torch.set_num_threads(2)


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    expected = sketch()
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda _: sketch(), range(200)))
    assert all(np.array_equal(result, expected) for result in results)


FORK = """
import os, signal, sys, warnings
import numpy as np, torch
from transformers import LlamaConfig, LlamaForCausalLM
from cropi_kernels import *

torch.set_num_threads(2)
torch.manual_seed(0)
x, spec = torch.randn(2, 1 << 18), ProjectionSpec(1 << 17)
hidden, head, targets = torch.randn(800, 256), torch.randn(4000, 256), torch.arange(800)
d, zeros = hidden[:, :192].contiguous(), lambda *n: torch.from_numpy(np.zeros(n, np.float32))
plan, offsets = plan_matrix(SketchSpec(), "layer.weight", 192, 256), torch.tensor([0, 100, 800])
csr = CsrRows(torch.tensor([0, 1 << 17, 1 << 18]), torch.arange(1 << 18), torch.randn(1 << 18), 1 << 18)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=512,
))
# In a child, torch's own operators hang: what the calls take is made here.
ids, positions = torch.randint(0, 2000, (4, 200)), torch.arange(799)


def gradient():
    with GradientSketcher(model, linears="torch") as sketcher:
        return sketcher.policy_gradient(ids, segments=torch.arange(4), labels=ids, weights=torch.ones(4)).sketches


run = {
    "policy_gradient": gradient,
    "token_logprobs": lambda: token_logprobs(model, ids, positions=positions, targets=ids.flatten()[1:]),
    "project": lambda: project(x, spec),
    "project, out": lambda: project(x, spec, out=zeros(2, 1 << 17)),
    "project_transpose": lambda: project_transpose(x[:, : 1 << 17], spec, 1 << 18),
    "project_csr": lambda: project_csr(csr, spec),
    "logprob_and_grad": lambda: logprob_and_grad(hidden, head, targets, lambda p, a, b: p.exp())[1],
    "linear_logprob": lambda: linear_logprob(hidden, head, targets),
    "sketch_linear": lambda: sketch_linear(d, hidden, offsets, plan, zeros(2, 32768)),
    "reference": lambda: sketch_linear(d, hidden, offsets, plan, zeros(2, 32768), backend="reference"),
    "reduce_sketch": lambda: reduce_sketch(x, 4096),
    "quantize_rows": lambda: quantize_rows(x, torch.int8).float(),
}
want = {name: f() for name, f in run.items()}
for name, f in run.items():
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # ends a child that hangs
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            first, second = f(), f()
        told = [str(w.message) for w in said if w.category is RuntimeWarning]
        right = torch.equal(first, second) and torch.get_num_threads() == 1
        right = right and torch.allclose(first, want[name], rtol=1e-4, atol=1e-3)
        os._exit(0 if right and len(told) == 1 and "method 'spawn'" in told[0] else 7)
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit(f"{name}: {os.waitstatus_to_exitcode(status)}")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_runs_on_one_thread() -> None:
    """The parent's threads are not copied, and GNU's OpenMP waits for them for ever: each of these once hung."""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads under /proc")
def test_a_child_of_a_process_that_had_no_threads_keeps_its_own() -> None:
    code = """
import os, torch, warnings
import cropi_kernels
from cropi_kernels import ProjectionSpec, project
child = os.fork()
if child == 0:
    warnings.simplefilter("error")
    torch.set_num_threads(2)
    project(torch.randn(1, 1 << 20), ProjectionSpec(1 << 17))
    os._exit(0 if torch.get_num_threads() == 2 else 7)
assert os.waitpid(child, 0)[1] == 0
"""
    # numpy's OpenBLAS starts threads when it is imported, and they are not told from torch's.
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=env)
    assert done.returncode == 0, done.stderr


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


@pytest.mark.long
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads under /proc")
@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch without OpenMP")
def test_torch_and_the_kernels_share_their_threads() -> None:
    """Threads of our own would fight for the cores with torch's, which spin after every operation."""
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
