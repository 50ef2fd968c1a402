"""The jobs of `tests/cropi/test_ray.py`, where workers can import them."""

from __future__ import annotations

from pathlib import Path

from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi_kernels import SketchSpec


def make(folder: Path, out: str) -> tuple[Policy, SketchJob]:
    """A policy by its name, and its job."""
    job = SketchJob(
        [folder / "t.jsonl"], folder / out, SketchSpec(dim=1024), tokens_per_batch=40, verify=False,
        behaviour_check="off",
    )  # fmt: skip
    return Policy(str(folder / "m"), device="cpu"), job


def of_its_own(folder: Path, out: str) -> tuple[Policy, SketchJob]:
    """Another file in every worker, with work for long enough that all workers come."""
    import os

    from support.made_data import make_records, write_lines

    policy, job = make(folder, out)
    path = write_lines(folder / f"own-{os.getpid()}.jsonl", make_records(600, seed=os.getpid() % 1000))
    return policy, SketchJob(**(vars(job) | {"trajectories": [path]}))
