"""The machine and the versions that a table was measured on."""

from __future__ import annotations

import platform
import subprocess

import torch

from cropi_kernels import __version__, explain


def describe() -> str:
    """One line: processor, threads, kernels in use, torch, version and commit."""
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "?"
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    kernels = next(line for line in explain(torch.zeros(1, 1)).splitlines() if "serves the call" in line)
    kernels = " ".join(kernels.split())
    return (
        f"{cpu} ({platform.machine()}), {torch.get_num_threads()} threads; {kernels}; torch {torch.__version__}; "
        f"cropi-kernels {__version__} at {commit or 'unknown'}"
    )
