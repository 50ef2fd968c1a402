"""The figures of the ops: every public op is timed, a run writes what it measured, and an empty run is an error."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cropi_kernels

ROOT = Path(__file__).resolve().parents[2]
# Done once a parameter, or in messages.
NOT_TIMED = {"plan_matrix", "plan_vector", "canonical_name", "explain"}
# `logprob_and_grad` behind a model's forward, which the whole step has too.
OF_MODELS = {"token_logprobs"}


def bench(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.bench_ops", "-p", "no:cacheprovider", *args]
    # Of the process that runs this test: with xdist's variables pytest-benchmark measures nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)


def test_every_public_function_is_timed() -> None:
    tree = ast.parse((ROOT / "benchmarks" / "bench_ops.py").read_text())
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    functions = {name for name in cropi_kernels.__all__ if name.islower() and not name.startswith("_")}
    assert functions - NOT_TIMED - OF_MODELS <= used


def test_a_run_writes_its_figures_and_an_empty_one_fails(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "figures.json"
    quick = ("--benchmark-max-time=0.01", "--benchmark-min-rounds=2")
    done = bench("-k", "test_fold_inputs or test_project_csr", *quick, f"--benchmark-json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())["benchmarks"]
    assert len(figures) == 4 and all(0 < f["stats"]["median"] < 10 for f in figures)
    assert bench("-k", "no_such_op").returncode != 0
