"""The machine and the versions that a table was measured on."""

from __future__ import annotations

import platform
import subprocess

import torch

from cropi.bench.machine import processor
from cropi_kernels import __version__, explain


def describe() -> str:
    """One line: processor, threads, kernels in use, torch, version and commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    kernels = next(line for line in explain(torch.zeros(1, 1)).splitlines() if "serves the call" in line)
    kernels = " ".join(kernels.split())
    machine = f"{processor()} ({platform.machine()}), {torch.get_num_threads()} threads"
    return f"{machine}; {kernels}; torch {torch.__version__}; cropi-kernels {__version__} at {commit or 'unknown'}"
