"""Slabs of many short segments by other forms than what ships, in turns; and a layer's slabs as a pass launches them.

Each prediction is a share of what ships, calculated before any measurement: items in the order of the grid, each to the
multiprocessor that is free first (132 of them); 0.93 us a step of 64 tokens and block pair without a fold, 0.88 with
one (1.2 with 64 columns, two programs a multiprocessor), 0.1 us a flip, 4.5 us to start a program and write its sums
(0.8 where it stays), 3.6 TB/s for the reduction. A step that is partly empty is taken to cost as much as a whole one:
where bytes from the L2 were the only limit, tails of 16 would gain nothing.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

import common
import torch
from changed import changed
from slab_short import FORMS

from cropi_kernels import SketchSpec, fold_inputs, plan_matrix
from cropi_kernels.ops._triton_segments import cut
from cropi_kernels.ops.sketch_linear import triton as slab

TOKENS = 16384
CALLS = 12  # in a graph
TAILS, STAYS, BOTH = FORMS
# Rows, columns, width, segments, and the shares that are predicted.
SHAPES: dict[str, tuple[int, int, int | None, int, dict[str, float]]] = {
    "no fold, 1536 x 8960": (1536, 8960, None, 64, {TAILS: 0.93, STAYS: 0.96, BOTH: 0.89}),
    "width 256, 8960 x 1536": (8960, 1536, 256, 64, {TAILS: 0.95, STAYS: 0.98, BOTH: 0.93}),
    "width 128, 8960 x 1536": (8960, 1536, 128, 64, {TAILS: 0.90, STAYS: 0.97, BOTH: 0.87}),
    "width 256, 1536 x 1536": (1536, 1536, 256, 64, {TAILS: 0.91, STAYS: 0.93, BOTH: 0.84}),
    "width 64, 8960 x 1536": (8960, 1536, 64, 64, {TAILS: 0.95}),
    "no fold, 1536 x 8960, 16": (1536, 8960, None, 16, {TAILS: 0.99, STAYS: 0.98, BOTH: 0.96}),
    "width 256, 8960 x 1536, 16": (8960, 1536, 256, 16, {TAILS: 0.97, STAYS: 0.98, BOTH: 0.96}),
}
# Block pairs a group, without a fold, of 64 segments: fewer partial results, longer programs.
PAIRS = {24: 0.97, 36: 0.95}
LAYER = "qwen2.5-1.5b"
LAYERS = [(width, n) for width in (128, 256, 64) for n in (16, 64)]  # and segments


def in_turns(runs: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Microseconds of a call of each."""
    graphs = {name: common.graph_of(calls, CALLS) for name, calls in runs.items()}
    times = common.in_turns({name: graph.replay for name, (graph, _, _) in graphs.items()}, rounds=5)
    return {name: statistics.median(t) / graphs[name][2] * 1000 for name, t in times.items()}


class Shape:
    def __init__(self, rows: int, cols: int, width: int | None, n_segments: int) -> None:
        self.rows, self.cols, self.width = rows, cols, width
        self.plan = plan_matrix(SketchSpec(width=width), "0.weight", rows, cols)
        n_sets = common.n_sets(TOKENS * 2 * min(rows, self.plan.folded_cols))
        make = lambda n: torch.randn(TOKENS, n, device="cuda").bfloat16()  # noqa: E731
        self.sets = [(make(rows), make(self.plan.folded_cols)) for _ in range(n_sets)]
        self.offsets = common.ragged(TOKENS, n_segments).cuda()
        self.out = torch.zeros(n_segments, self.plan.n_slabs * 32768, device="cuda")

    def call(self, d: torch.Tensor, a: torch.Tensor, form: Any) -> None:
        ships = slab.add_slabs
        try:
            slab.add_slabs = form or ships
            slab.sketch_linear(d, a, self.offsets, self.plan, self.out)
        finally:
            slab.add_slabs = ships

    def bits(self, form: Any) -> torch.Tensor:
        self.out.zero_()
        self.call(*self.sets[0], form)
        return self.out.clone()

    def calls(self, form: Any = None) -> list[Callable[[], Any]]:
        return [lambda d=d, a=a: self.call(d, a, form) for d, a in self.sets]  # type: ignore[misc]

    def row(self, predictions: dict[str, float]) -> dict[str, Any]:
        expected = self.bits(None)
        equal = {name: torch.equal(self.bits(FORMS[name]), expected) for name in predictions}
        runs = {"ships": self.calls()} | {name: self.calls(FORMS[name]) for name in predictions}
        if self.width is None:
            runs["mm"] = self.product()
        us = in_turns(runs)
        row: dict[str, Any] = {"us": us["ships"]} | ({"mm_us": us["mm"]} if "mm" in us else {})
        for name, prediction in predictions.items():
            row |= {name: us[name] / us["ships"], f"{name}, predicted": prediction}
        return row | {"ok": all(equal.values()), "finite": bool(expected.isfinite().all())}

    def product(self) -> list[Callable[[], Any]]:
        g = torch.empty(self.rows, self.cols, device="cuda", dtype=torch.bfloat16)
        return [lambda d=d, a=a: torch.mm(d.t(), a, out=g) for d, a in self.sets]  # type: ignore[misc]

    def groups(self, n_pairs: int, prediction: float) -> dict[str, Any]:
        """What ships, with other groups of block pairs: sums in another order, so not the same bits."""
        with changed(slab, group_pairs=lambda cols, pairs: n_pairs):
            us = in_turns({"other": self.calls(), "mm": self.product()})
        return {"us": us["other"], "mm_us": us["mm"], "predicted": prediction}


def compiled(
    rows: int, cols: int, width: int | None, n_segments: int, forms: dict[str, float]
) -> dict[str, Any]:
    made = Shape(rows, cols, width, n_segments)
    made.bits(None)
    for name in forms:
        made.bits(FORMS[name])
    return {}


def warm() -> None:
    """What is timed is compiled by several processes before."""
    global TOKENS
    TOKENS = 64
    results = common.Results("warm_short")
    for name, shape in SHAPES.items():
        if shape[3] == 64:  # other numbers of segments have the same kernels
            results.attempt(name, lambda s=shape: compiled(*s))
    for width in (64, 128, 256):
        results.attempt(f"a layer, width {width}", lambda w=width: layer(w, 2))
    results.finish()


def layer(width: int, n_segments: int) -> dict[str, Any]:
    """q, k and v in one launch, gate and up too, all into the sums of a pass, over one read of the operands.

    The table of chunks and the reduction, once a pass, are left out."""
    offsets, bandwidth = common.ragged(TOKENS, n_segments).cuda(), common.copy_bandwidth()
    shapes = {name: (rows, cols) for name, rows, cols in common.MODELS[LAYER]["linears"]}
    spec, launches, read, folds = SketchSpec(width=width), [], 0, []
    for names in ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"):
        members = [name for name in names.split() if name in shapes]
        if not members:
            continue
        plans = tuple(plan_matrix(spec, f"0.{name}.weight", *shapes[name]) for name in members)
        x = torch.randn(TOKENS, shapes[members[0]][1], device="cuda").bfloat16()
        ds = [torch.randn(TOKENS, shapes[name][0], device="cuda").bfloat16() for name in members]
        stack = slab.stack_of(plans, x.device, x.dtype)
        folds.append(lambda x=x, plan=plans[0]: fold_inputs(x, plan))
        launches.append((stack, ds, fold_inputs(x, plans[0])))
        read += 2 * (x.numel() + sum(d.numel() for d in ds))
    chunks = cut(offsets, TOKENS, launches[0][0].chunk, True)
    groups = max(stack.groups for stack, _, _ in launches)
    partial = torch.zeros(chunks.n_slots, groups, 32768, device="cuda")

    def slabs() -> None:
        for stack, ds, a in launches:
            slab.add_slabs(stack, ds, None, a, a.stride(0), partial, partial, chunks, "sums")

    us = in_turns({"slabs": [slabs], "folds": [lambda: [fold() for fold in folds]]})
    read_us = read / bandwidth * 1e6
    total = us["slabs"] + us["folds"]
    return {
        "width": width,
        "segments": n_segments,
        "us": total,
        "fold_us": us["folds"],
        "read_us": read_us,
        "times_read": total / read_us,
    }


def main() -> None:
    results = common.Results("variants_short")
    for name, (rows, cols, width, n, predictions) in SHAPES.items():
        results.attempt(name, lambda s=(rows, cols, width, n), p=predictions: Shape(*s).row(p))
    for width, n in LAYERS:
        results.attempt(f"a layer in a pass, width {width}, {n}", lambda w=width, n=n: layer(w, n))
    rows, cols, width, n, _ = SHAPES["no fold, 1536 x 8960"]
    for pairs, share in PAIRS.items():
        name = f"no fold, 1536 x 8960: {pairs} pairs a group"
        results.attempt(name, lambda k=pairs, p=share: Shape(rows, cols, width, n).groups(k, p))
    results.finish()


if __name__ == "__main__":
    warm() if sys.argv[1:] == ["warm"] else main()
