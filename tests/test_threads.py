"""The kernels' own threads: the same bits from any number of them, from callers at the same time, and after a fork."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cropi_kernels import SketchSpec, plan_matrix, sketch_linear

PLAN = plan_matrix(SketchSpec(seed=3), "layer.weight", 192, 64)
D, A = torch.randn(300, 192), torch.randn(300, 64)
OFFSETS = torch.tensor([0, 100, 300])


def sketch() -> torch.Tensor:
    return sketch_linear(D, A, OFFSETS, PLAN, torch.zeros(2, 32768), backend="cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_callers_at_the_same_time_do_not_disturb_each_other() -> None:
    expected = sketch()
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda _: sketch(), range(200)))
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_starts_its_own_threads() -> None:
    expected = sketch()  # the parent's threads exist now; the child inherits none of them
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(sketch(), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
