"""Where whole passes of a model of Qwen2.5-1.5B's shape spend their time, from 64 to 16k tokens: launches, share of the
time in which the device is busy, and by how much a sketched pass is longer than a plain one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import common
import model as whole
import torch

from cropi_kernels import GradientSketcher, SketchSpec

PASSES = ((1, 64), (1, 1024), (4, 1024), (16, 1024))  # (rows, length); 64 tokens: the host's time alone


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of one pass, the time between their first start and last end, and the share of it that they fill."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in recorded.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached, last = 0.0, float("-inf"), ""
    ours: dict[str, float] = {}
    idle: list[tuple[float, str]] = []
    for start, end, name in kernels:
        if last and start > reached:
            idle.append(((start - reached) / 1000, f"{short(last)} -> {short(name)}"))
        busy += max(0.0, end - max(start, reached))
        if end > reached:
            reached, last = end, name
        if name in OURS:
            ours[name] = ours.get(name, 0.0) + (end - start) / 1000
    span = reached - kernels[0][0] if kernels else 0.0
    counted: dict[str, Any] = {
        "launches": len(kernels),
        "span_ms": span / 1000,
        "busy_share": busy / span if span else 0.0,
    }
    counted["longest_idle"] = "; ".join(
        f"{ms:.2f} ms {where}" for ms, where in sorted(idle, reverse=True)[:LONGEST]
    )
    return counted | {f"{name}_ms": ms for name, ms in sorted(ours.items())}


def short(name: str) -> str:
    """A kernel's name without its template's arguments."""
    return name.removeprefix("void ").split("<")[0].split("(")[0][-40:]


LONGEST = 8  # spans without a kernel that a row names
OURS = {
    "slab_kernel", "slab_turns_kernel", "fold_kernel", "reduce_partials_kernel", "norm_kernel", "sums_kernel",
    "rows_kernel", "vector_kernel", "tail_kernel", "chunks_kernel", "forward_kernel", "backward_kernel", "own_kernel",
    "tiles_kernel", "turns_kernel", "again_kernel", "combine_kernel", "rescale_kernel", "scale_kernel", "rms_kernel",
    "rms_backward_kernel", "swiglu_kernel", "swiglu_fold_kernel", "swiglu_backward_kernel",
}  # fmt: skip


def wall(run: Callable[[], Any], repeats: int = 3) -> float:
    """Milliseconds of a pass as a caller sees them, the least of some."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    return min(times)


def passes(model: Any, rows: int, length: int) -> dict[str, Any]:
    """A plain pass with frozen weights and a sketched one of the same tokens."""
    data = whole.batch(rows, length)
    weigh = lambda logp, start, stop: torch.ones_like(logp)  # noqa: E731
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    plain = lambda: whole.plain_step(model, data)  # noqa: E731
    plain()
    row: dict[str, Any] = {"tokens": rows * length, "frozen_ms": wall(plain)}
    row |= {f"frozen_{k}": v for k, v in profiled(plain).items()}
    model.requires_grad_(True)
    with GradientSketcher(model, SketchSpec(), verify=False) as sketcher:
        step = lambda: sketcher.policy_gradient(**data, weigh=weigh)  # noqa: E731
        step()
        row["sketched_ms"] = wall(step)
        row |= {f"sketched_{k}": v for k, v in profiled(step).items()}
    return row | {"ratio": row["sketched_ms"] / row["frozen_ms"]}


def main() -> None:
    results = common.Results("passes")
    start = time.monotonic()
    model = whole.build()
    results.add(name="the model is built", seconds=time.monotonic() - start)
    for rows, length in PASSES:
        results.attempt(f"pass of {rows * length} tokens", lambda r=rows, n=length: passes(model, r, n))
    results.finish()


if __name__ == "__main__":
    main()
