"""The slab sketch against the plain weight-gradient products that it replaces, and against one read of its operands."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import common
import torch

from cropi_kernels import MatrixPlan, SketchSpec, fold_inputs, plan_matrix, sketch_linear

TOKENS = 16384
SEGMENTS = (4, 16, 64)
LENGTHS = (16, 64, 128, 512, 2048, 8192)
BUDGET_S = 100.0


def operands(rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    make = lambda n: torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return make(rows), make(cols)


def one_map(plan: MatrixPlan, offsets: torch.Tensor, out: torch.Tensor, fold: bool) -> dict[str, float]:
    """Milliseconds of the fold, of the sketch, and where nothing is folded of the products that it replaces."""
    d, a = operands(plan.rows, plan.cols)
    on_device, kept = offsets.cuda(), fold_inputs(a, plan)
    got = {
        "fold": common.milliseconds(lambda: fold_inputs(a, plan)) if fold else 0.0,
        "sketch": common.milliseconds(lambda: sketch_linear(d, kept, on_device, plan, out)),
        "bytes": d.numel() * 2.0 + (a.numel() * 2 if fold else 0),
        "flops": 2.0 * TOKENS * plan.rows * plan.folded_cols,
    }
    if plan.col_fold is None:
        g = torch.empty(plan.rows, plan.cols, device="cuda", dtype=torch.bfloat16)
        bounds = list(zip(offsets.tolist(), offsets.tolist()[1:]))
        got["mm"] = common.milliseconds(lambda: torch.mm(d.t(), a, out=g))
        got["mm_loop"] = common.milliseconds(
            lambda: [torch.mm(d[b:e].t(), a[b:e], out=g) for b, e in bounds], repeats=5
        )
    return got


def layer(model: str, n_segments: int, width: int | None, bandwidth: float) -> dict[str, Any]:
    """One decoder layer, map by map; inputs that several maps share are folded once, as the taps do."""
    spec, offsets = SketchSpec(width=width), common.ragged(TOKENS, n_segments)
    out = torch.zeros(n_segments, 32768, device="cuda")
    total: Counter[str] = Counter()
    folded_for: set[str] = set()
    for name, rows, cols in common.MODELS[model]["linears"]:
        plan = plan_matrix(spec, f"model.layers.0.mlp.{name}.weight", rows, cols)
        group = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(name, name)
        total.update(one_map(plan, offsets, out, plan.col_fold is not None and group not in folded_for))  # type: ignore[arg-type]
        folded_for.add(group)
    ms, read_ms = total["sketch"] + total["fold"], total["bytes"] / bandwidth * 1000
    row: dict[str, Any] = {
        "model": model,
        "segments": n_segments,
        "width": width,
        "ms": ms,
        "fold_ms": total["fold"],
    }
    row |= {"tflops": total["flops"] / total["sketch"] / 1e9, "read_ms": read_ms, "times_read": ms / read_ms}
    if width is None:
        row |= {"mm_ms": total["mm"], "mm_loop_ms": total["mm_loop"]}
        row |= {"of_mm_rate": total["mm"] / ms, "of_mm_loop_rate": total["mm_loop"] / ms}
    return row


def lengths(length: int) -> dict[str, Any]:
    """Segments of one length, gate_proj of Qwen2.5-1.5B folded to 64: short ones pay for partly filled tiles."""
    plan = plan_matrix(SketchSpec(), "model.layers.0.mlp.gate_proj.weight", 8960, 1536)
    d, a = operands(8960, 64)
    offsets = torch.arange(0, TOKENS + 1, length, device="cuda")
    out = torch.zeros(offsets.numel() - 1, 32768, device="cuda")
    ms = common.milliseconds(lambda: sketch_linear(d, a, offsets, plan, out))
    return {"length": length, "ms": ms, "gb_per_s": d.numel() * 2 / ms / 1e6}


def main() -> None:
    results, start = common.Results("sketch"), time.monotonic()
    bandwidth = common.copy_bandwidth()
    results.add(name="copy bandwidth", gb_per_s=bandwidth / 1e9)
    todo: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for width in (64, 128, 256, None):
        for model in common.MODELS:
            for n in SEGMENTS if model == "qwen2.5-1.5b" else (16,):
                todo.append(
                    (f"{model} w={width} S={n}", lambda m=model, n=n, w=width: layer(m, n, w, bandwidth))
                )
    todo += [(f"segments of {n}", lambda n=n: lengths(n)) for n in LENGTHS]
    for name, run in todo:
        if time.monotonic() - start > BUDGET_S:
            results.add(name=name, error="not run: the part's time was up")
            continue
        results.attempt(name, run)
    results.finish()


if __name__ == "__main__":
    main()
