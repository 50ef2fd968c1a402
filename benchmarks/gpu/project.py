"""`project` at P = 1e9 against a copy on the device, and beside index_add_, fast_jl and sjlt where they are installed.

The floor of a sparse projection is reading its input once: a share of 1 means that input arrives at the rate (bytes
read plus bytes written) of a plain copy. Every peer's set-up is outside its timed region.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import common
import torch
from project_correctness import backends

from cropi_kernels import ProjectionSpec, project, project_transpose

P, PEER_P = 1_000_000_000, 100_000_000
S = ProjectionSpec
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPECS = {
    "countsketch 4096": S(4096),
    "countsketch 32768": S(32768),
    "countsketch 65536": S(65536),
    "sjlt 4096 nnz=4": S(4096, kind="sjlt", nnz=4),
    "sjlt 32768 nnz=4": S(32768, kind="sjlt", nnz=4),
    "countsketch 32768 keep=0.1": S(32768, keep=0.1),
}


def filled(rows: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers that repeat after 2^24, an odd number of tiles of no spec."""
    block = torch.randn(rows, min(n, (1 << 24) + 12345), device="cuda").to(dtype)
    return block.repeat(1, n // block.shape[1] + 1)[:, :n].contiguous()


def ours(x: torch.Tensor, spec: ProjectionSpec, backend: str, bandwidth: float) -> dict[str, Any]:
    out = torch.zeros(x.shape[0], spec.dim, device="cuda")
    run = lambda: project(x, spec, out=out, nonfinite="ignore", backend=backend)  # noqa: E731
    ms = common.milliseconds(run, repeats=5, warm=1)
    size = x.numel() * x.element_size()
    row = {"rows": x.shape[0], "P": x.shape[1], "backend": backend, "ms": ms, "gb_per_s": size / ms / 1e6}
    extra = (common.peak_bytes(run)) / 1e6
    return row | {"of_copy": size / ms * 1000 / bandwidth, "extra_mb": extra}


def adjoint(spec: ProjectionSpec, backend: str, bandwidth: float) -> dict[str, Any]:
    y = torch.randn(1, spec.dim, device="cuda")
    ms = common.milliseconds(lambda: project_transpose(y, spec, P, backend=backend), repeats=3, warm=1)
    return {"P": P, "backend": backend, "ms": ms, "of_copy": P * 4 / ms * 1000 / bandwidth}


def peers(x: torch.Tensor, dim: int) -> dict[str, Callable[[], Any]]:
    """Those that import; what they need before a call is made here."""
    n, runs = x.shape[1], {}
    bucket = torch.randint(0, dim, (n,), device="cuda")
    sign = (torch.randint(0, 2, (n,), device="cuda") * 2 - 1).to(x.dtype)
    out = torch.zeros(x.shape[0], dim, device="cuda", dtype=x.dtype)
    runs["torch index_add_"] = lambda: out.index_add_(1, bucket, x * sign)
    try:
        fast_jl, half = importlib.import_module("fast_jl"), x.half()
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        runs["fast_jl rademacher"] = lambda: fast_jl.project_rademacher_8(half, dim, 0, sms)
    except ImportError:
        pass
    try:
        made = importlib.import_module("sjlt").SJLTProjection(n, dim, c=1, device="cuda")
        runs["sjlt c=1"] = lambda: made(x)
    except ImportError:
        pass
    return runs


def beside_peers(name: str, bandwidth: float) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    x = filled(8, PEER_P, torch.bfloat16)
    size = x.numel() * 2

    def timed(run: Callable[[], Any]) -> dict[str, Any]:
        ms = common.milliseconds(run, repeats=3, warm=1)
        return {"rows": 8, "P": PEER_P, "ms": ms, "of_copy": size / ms * 1000 / bandwidth}

    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        (f"{name} beside peers {backend}", lambda b=backend: ours(x, SPECS[name], b, bandwidth))
        for backend in backends(SPECS[name])
    ]
    return jobs + [
        (f"peer {label}", lambda r=run: timed(r)) for label, run in peers(x, SPECS[name].dim).items()
    ]


def main() -> None:
    results = common.Results("project")
    bandwidth = common.copy_bandwidth()
    results.add(name="copy bandwidth", gb_per_s=bandwidth / 1e9)
    x = torch.empty(0)

    for label, rows in (("bf16", 1), ("bf16", 8), ("fp32", 1)):
        x = torch.empty(0)  # frees the one before
        x = filled(rows, P, DTYPES[label])
        for name, spec in SPECS.items():
            for backend in backends(spec):
                results.attempt(
                    f"{name} {label} B={rows} {backend}",
                    lambda x=x, s=spec, b=backend: ours(x, s, b, bandwidth),
                )
    x = torch.empty(0)
    torch.cuda.empty_cache()
    for backend in backends(S(4096)):
        results.attempt(f"adjoint 32768 {backend}", lambda b=backend: adjoint(S(32768), b, bandwidth))
    for name, run in beside_peers("countsketch 4096", bandwidth):
        results.attempt(name, run)
    torch.cuda.empty_cache()
    y = filled(8, 2_000_000, torch.bfloat16)
    for spec in (S(4096, kind="rademacher"), S(4096, kind="gaussian")):
        for backend in backends(spec):
            results.attempt(f"{spec.kind} 4096 {backend}", lambda s=spec, b=backend: ours(y, s, b, bandwidth))
    results.finish()


if __name__ == "__main__":
    main()
