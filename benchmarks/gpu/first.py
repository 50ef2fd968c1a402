"""The first look at a GPU, in 90 seconds: what the device reaches, whether the kernels are right at a real model's
shapes, whether their bits repeat, and where a whole pass spends its time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import common
import correctness
import model as whole
import torch

from cropi_kernels import GradientSketcher, SketchSpec, fold_inputs, plan_matrix, sketch_linear

REPEATS = 500
REPEATED_TOKENS = 4096
# (name, width of the fold, rows, columns): each compiles to a kernel of its own.
SLABS = (
    ("gate_proj", 64, 8960, 1536),
    ("gate_proj", 128, 8960, 1536),
    ("gate_proj", 256, 8960, 1536),
    ("down_proj", None, 1536, 8960),
)
PASSES = ((1, 64), (1, 1024), (4, 1024), (16, 1024))  # (rows, length); 64 tokens: the host's time alone
REAL: dict[str, tuple[int, int, int | None, int, list[int]]] = {
    "gate_proj": (8960, 1536, 64, 32768, [700, 60, 1200]),
    "down_proj": (1536, 8960, 64, 32768, [700, 60, 1200]),
    "k_proj": (256, 1536, 64, 32768, [700, 60, 1200]),
    "q_proj, no fold": (1536, 1536, None, 32768, [520, 60]),
}
VOCAB, HIDDEN = 151936, 1536


def rates() -> dict[str, Any]:
    gpu = torch.cuda.get_device_properties(0)
    return {
        "device": gpu.name,
        "multiprocessors": gpu.multi_processor_count,
        "l2_mb": gpu.L2_cache_size / 1e6,
        "copy_gb_per_s": common.copy_bandwidth() / 1e9,
        "gemm_tflops": common.gemm_rate() / 1e12,
    }


def repeats(width: int | None, rows: int, cols: int, name: str) -> dict[str, Any]:
    """Every run must give the first one's bits. A run that does not would show a race that no oracle's bound shows."""
    plan = plan_matrix(SketchSpec(width=width), f"model.layers.0.mlp.{name}.weight", rows, cols)
    make = lambda n: torch.randn(REPEATED_TOKENS, n, device="cuda").bfloat16()  # noqa: E731
    d, a, offsets = make(rows), fold_inputs(make(cols), plan), common.ragged(REPEATED_TOKENS, 8).cuda()
    first, out = (torch.zeros(8, 32768, device="cuda") for _ in range(2))
    sketch_linear(d, a, offsets, plan, first)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        sketch_linear(d, a, offsets, plan, out.zero_())
        different += (out != first).any()
    return {"repeats": REPEATS, "different": int(different), "ok": int(different) == 0}


def profiled(run: Callable[[], Any]) -> dict[str, Any]:
    """Kernels of one pass, the time between their first start and last end, and the share of it that they fill."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in recorded.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, float("-inf")
    ours: dict[str, float] = {}
    for start, end, name in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        if name in OURS:
            ours[name] = ours.get(name, 0.0) + (end - start) / 1000
    span = reached - kernels[0][0] if kernels else 0.0
    counted = {"launches": len(kernels), "span_ms": span / 1000, "busy_share": busy / span if span else 0.0}
    return counted | {f"{name}_ms": ms for name, ms in sorted(ours.items())}


OURS = {
    "slab_kernel", "fold_kernel", "reduce_partials_kernel", "norm_kernel", "rows_kernel", "vector_kernel",
    "forward_kernel", "backward_kernel",
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
    with GradientSketcher(model, SketchSpec()) as sketcher:
        step = lambda: sketcher.policy_gradient(**data, weigh=weigh)  # noqa: E731
        step()
        row["sketched_ms"] = wall(step)
        row |= {f"sketched_{k}": v for k, v in profiled(step).items()}
    return row | {"ratio": row["sketched_ms"] / row["frozen_ms"]}


def main() -> None:
    results = common.Results("first")
    results.attempt("rates", rates)
    correctness.CASES.update(REAL)
    half = torch.bfloat16
    for case in REAL:
        results.attempt(f"sketch_linear {case}", lambda c=case: correctness.linear(c, half))
    results.attempt("sketch_embedding", lambda: correctness.embedding("tied", half, VOCAB, HIDDEN))
    results.attempt("norm_grad, bias_grad, sketch_vector", lambda: correctness.norms(HIDDEN, False, half))
    results.attempt("log-probs", lambda: correctness.log_probs(VOCAB, half, None))
    for name, width, rows, cols in SLABS:
        results.attempt(
            f"bits of {name} w={width}", lambda w=width, r=rows, c=cols, n=name: repeats(w, r, c, n)
        )
    model = whole.build()
    for rows, length in PASSES:
        results.attempt(f"pass of {rows * length} tokens", lambda r=rows, n=length: passes(model, r, n))
    results.finish()


if __name__ == "__main__":
    main()
