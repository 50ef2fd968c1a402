"""The slab sketch against the plain weight-gradient products that it replaces, and against one read of its operands."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import common
import torch

from cropi_kernels import MatrixPlan, SketchSpec, fold_inputs, plan_matrix, sketch_linear
from cropi_kernels.ops._triton_segments import cut, reduce_partials
from cropi_kernels.ops.sketch_linear import triton as slab

TOKENS = 16384
SEGMENTS = (4, 16, 64)
LENGTHS = (16, 64, 128, 512, 2048, 8192)
CALLS = 12  # in a graph


def operands(rows: int, cols: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sets of (D, A) to rotate over."""
    make = lambda n: torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    return [(make(rows), make(cols)) for _ in range(common.n_sets(TOKENS * 2 * min(rows, cols)))]


def timed(runs: list[Callable[[], Any]]) -> dict[str, float]:
    return common.kernel_milliseconds(runs, calls=CALLS, replays=3)


def one_map(plan: MatrixPlan, offsets: torch.Tensor, out: torch.Tensor, fold: bool) -> dict[str, float]:
    """Milliseconds of the fold, of the sketch, and where nothing is folded of the products that it replaces."""
    sets = operands(plan.rows, plan.cols)
    on_device = offsets.cuda()
    kept = [(d, fold_inputs(a, plan)) for d, a in sets]
    sketch = timed([lambda d=d, a=a: sketch_linear(d, a, on_device, plan, out) for d, a in kept])  # type: ignore[misc]
    folds = {"ms": 0.0, "eager_ms": 0.0}
    if fold:
        folds = timed([lambda a=a: fold_inputs(a, plan) for _, a in sets])  # type: ignore[misc]
    got = {
        "fold": folds["ms"],
        "sketch": sketch["ms"],
        "eager": folds["eager_ms"] + sketch["eager_ms"],
        "bytes": TOKENS * 2.0 * (plan.rows + (plan.cols if fold else 0)),
        "flops": 2.0 * TOKENS * plan.rows * plan.folded_cols,
    }
    if plan.col_fold is None:
        g = torch.empty(plan.rows, plan.cols, device="cuda", dtype=torch.bfloat16)
        bounds = list(zip(offsets.tolist(), offsets.tolist()[1:]))
        products = [lambda d=d, a=a: torch.mm(d.t(), a, out=g) for d, a in sets]  # type: ignore[misc]
        by_segment = [
            lambda d=d, a=a: [torch.mm(d[b:e].t(), a[b:e], out=g) for b, e in bounds]  # type: ignore[misc]
            for d, a in sets
        ]
        sketches = [lambda d=d, a=a: sketch_linear(d, a, on_device, plan, out) for d, a in kept]  # type: ignore[misc]
        in_turns = {"sketch": sketches, "mm": products, "mm_loop": by_segment}
        graphs = {name: common.graph_of(runs, CALLS) for name, runs in in_turns.items()}
        times = common.in_turns({name: graph.replay for name, (graph, _, _) in graphs.items()}, rounds=3)
        got |= {name: statistics.median(t) / graphs[name][2] for name, t in times.items()}
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
        "eager_ms": total["eager"],
    }
    row |= {"tflops": total["flops"] / total["sketch"] / 1e9, "read_ms": read_ms, "times_read": ms / read_ms}
    if width is None:
        row |= {"mm_ms": total["mm"], "mm_loop_ms": total["mm_loop"]}
        row |= {"of_mm_rate": total["mm"] / ms, "of_mm_loop_rate": total["mm_loop"] / ms}
    return row


def in_a_pass(model: str, n_segments: int, width: int, bandwidth: float) -> dict[str, Any]:
    """The layer as a pass launches it: matrices that read the same inputs in one launch, into the pass's sums or, where
    they cannot add to these, into slots that are added up after it. What a pass does once is left out: the table of
    chunks, and the reduction of its sums."""
    shapes = {name: (rows, cols) for name, rows, cols in common.MODELS[model]["linears"]}
    spec, offsets = SketchSpec(width=width), common.ragged(TOKENS, n_segments).cuda()
    made, folds, size = [], [], 0.0
    for group in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"):
        names = [name for name in group.split() if name in shapes]
        if not names:
            continue
        plans = tuple(plan_matrix(spec, f"model.layers.0.{name}.weight", *shapes[name]) for name in names)
        x, *ds = (
            torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16)
            for n in (shapes[names[0]][1], *(shapes[name][0] for name in names))
        )
        folds.append(lambda x=x, plan=plans[0]: fold_inputs(x, plan))  # type: ignore[misc]
        made.append((slab.stack_of(plans, x.device, x.dtype), ds, folds[-1]()))
        size += 2.0 * sum(t.numel() for t in (x, *ds))
    chunks = cut(offsets, TOKENS, made[0][0].chunk, True)
    most, out = max(stack.groups for stack, _, _ in made), torch.zeros(n_segments, 32768, device="cuda")
    sums = torch.zeros(chunks.n_slots, most, 32768, device="cuda")

    def slabs() -> None:
        for stack, ds, a in made:
            own = stack.into == "slots"
            partial = sums.new_empty(chunks.n_slots, stack.groups, 32768) if own else sums
            slab.add_slabs(stack, ds, None, a, a.stride(0), out, partial, chunks, stack.into)
            if own:
                reduce_partials(partial, out, chunks, stack.groups)

    fold_ms, slab_ms = timed([lambda: [fold() for fold in folds]])["ms"], timed([slabs])["ms"]
    row = {
        "model": model,
        "segments": n_segments,
        "width": width,
        "pass_ms": fold_ms + slab_ms,
        "fold_ms": fold_ms,
    }
    read_ms = size / bandwidth * 1000
    return row | {"read_ms": read_ms, "times_read": (fold_ms + slab_ms) / read_ms}


def lengths(length: int) -> dict[str, Any]:
    """Segments of one length, gate_proj of Qwen2.5-1.5B folded to 64: short ones pay for partly filled tiles."""
    plan = plan_matrix(SketchSpec(), "model.layers.0.mlp.gate_proj.weight", 8960, 1536)
    sets = operands(8960, 64)[:1]  # one D alone is six times the L2
    offsets = torch.arange(0, TOKENS + 1, length, device="cuda")
    out = torch.zeros(offsets.numel() - 1, 32768, device="cuda")
    got = timed([lambda d=d, a=a: sketch_linear(d, a, offsets, plan, out) for d, a in sets])  # type: ignore[misc]
    return {"length": length, **got, "gb_per_s": TOKENS * 8960 * 2 / got["ms"] / 1e6}


def main() -> None:
    results = common.Results("sketch")
    bandwidth = common.copy_bandwidth()
    results.add(name="copy bandwidth", gb_per_s=bandwidth / 1e9)
    todo: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for width in (64, 128, 256, None):
        for model in common.MODELS:
            for n in SEGMENTS if model == "qwen2.5-1.5b" else (16,):
                todo.append(
                    (f"{model} w={width} S={n}", lambda m=model, n=n, w=width: layer(m, n, w, bandwidth))
                )
    for width in (64, 128, 256):
        for n in SEGMENTS:
            name = f"qwen2.5-1.5b in a pass w={width} S={n}"
            todo.append((name, lambda n=n, w=width: in_a_pass("qwen2.5-1.5b", n, w, bandwidth)))
    todo += [(f"segments of {n}", lambda n=n: lengths(n)) for n in LENGTHS]
    for name, run in todo:
        results.attempt(name, run)
    results.finish()


if __name__ == "__main__":
    main()
