"""The machine and the versions that something ran on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

import torch

import cropi_kernels

PACKAGES = (
    "torch", "triton", "numpy", "transformers", "tokenizers", "datasets", "pyarrow", "accelerate", "trl", "peft",
    "bitsandbytes", "verl", "vllm", "ray", "scikit-learn", "traker",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of what is installed of the packages that matter here."""
    held = {"cropi-kernels": cropi_kernels.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            held[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return held


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if os.path.isfile(info) else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or "unknown")


def machine() -> dict[str, str]:
    """System, processor, threads, devices, and which kernels serve a tensor of each device."""
    held = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": f"{processor()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads",
    }
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        held[f"cuda:{i}"] = (
            f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
        )
        devices.append(torch.device("cuda", i))
    for device in devices:
        lines = cropi_kernels.explain(torch.zeros(1, 1, device=device, dtype=torch.float32)).splitlines()
        serving = [" ".join(line.split()) for line in lines if "serves" in line]
        held[f"kernels on {device}"] = "; ".join(serving) or "none"
    return held
