"""One choice of the kernels' changed at a time, the time of each beside what was calculated for it.

Each row's ``prediction_us`` is arithmetic for an H100 (3.0 TB/s of copies, 790 TFLOP/s of large products), written down
before any measurement. Nothing here changes what ships: a variant that wins is a reason to change the constant.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable
from typing import Any

import common
import sketch
import torch
from changed import changed

from cropi_kernels import (
    MatrixPlan,
    SketchSpec,
    fold_inputs,
    linear_logprob,
    logprob_and_grad,
    norm_grad,
    plan_matrix,
    sketch_linear,
    swiglu,
)
from cropi_kernels.ops._triton_segments import cut
from cropi_kernels.ops.linear_logprob import chunks
from cropi_kernels.ops.linear_logprob import triton_tiles as tiles
from cropi_kernels.ops.norm_grad import triton as norm
from cropi_kernels.ops.sketch_linear import triton as slab
from cropi_kernels.ops.swiglu import triton as gates

TOKENS, SCORED = 16384, 8192
VOCAB, HIDDEN = 151936, 1536
WIDE, NARROW = 8960, 256  # features of the fold, and of k and v
SQUARE, SEVEN = (1536, 1536), (3584, 18944)  # Qwen2.5-1.5B's o_proj and 7B's down_proj
Row = dict[str, Any]


def random(n: int, features: int) -> torch.Tensor:
    return torch.randn(n, features, device="cuda").bfloat16()


def measured(runs: list[Callable[[], Any]], prediction: float | None) -> Row:
    got = common.kernel_milliseconds(runs, calls=12)
    return {"us": got["ms"] * 1000, "eager_us": got["eager_ms"] * 1000, "prediction_us": prediction}


class Slab:
    """gate_proj of Qwen2.5-1.5B; without a fold, down_proj, or ``shape``. Tensors are made in its first row: of
    memory that runs out there is one row, and the others still run."""

    def __init__(self, width: int | None, segments: int = 16, shape: tuple[int, int] | None = None) -> None:
        self.width, self.segments = width, segments
        self.shape = shape or ((WIDE, HIDDEN) if width else (HIDDEN, WIDE))

    @functools.cached_property
    def plan(self) -> MatrixPlan:
        return plan_matrix(SketchSpec(width=self.width), "model.layers.0.mlp.gate_proj.weight", *self.shape)

    @functools.cached_property
    def d(self) -> torch.Tensor:
        return random(TOKENS, self.shape[0])

    @functools.cached_property
    def a(self) -> torch.Tensor:
        return random(TOKENS, self.plan.folded_cols)

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        return common.ragged(TOKENS, self.segments).cuda()

    @functools.cached_property
    def out(self) -> torch.Tensor:
        return torch.zeros(self.segments, 32768, device="cuda")

    def time(self, prediction: float | None, **values: Any) -> Row:
        with changed(slab, **values):
            run = lambda: sketch_linear(self.d, self.a, self.offsets, self.plan, self.out)  # noqa: E731
            return measured([run], prediction)

    def beside_mm(self, prediction: float, **values: Any) -> Row:
        """In turns with the product that it replaces: a card at work is slower, and not in all it does alike."""
        product = self.d.new_empty(self.d.shape[1], self.a.shape[1])
        with changed(slab, **values):
            runs: dict[str, Callable[[], Any]] = {
                "sketch": lambda: sketch_linear(self.d, self.a, self.offsets, self.plan, self.out),
                "mm": lambda: torch.mm(self.d.t(), self.a, out=product),
            }
            graphs = {name: common.graph_of([run], 3)[::2] for name, run in runs.items()}
            times = common.in_turns({name: graph.replay for name, (graph, _) in graphs.items()}, rounds=5)
        us = {name: statistics.median(t) / graphs[name][1] * 1000 for name, t in times.items()}
        row = {"us": us["sketch"], "prediction_us": prediction, "mm_us": us["mm"]}
        return row | {"of_mm": common.share(times["sketch"], times["mm"])}

    def shaped(self, prediction: float | None, **shape: int) -> Row:
        """By steps, with another tile, depth of the pipeline, or number of warps."""
        choose = slab.slab_config
        other = lambda *args: dataclasses.replace(choose(*args), **shape)  # noqa: E731
        return self.time(prediction, slab_config=other, takes_turns=lambda device: False)

    def in_parts(self, prediction: float | None, **values: int) -> Row:
        """By turns, with other constants."""
        wide = {"HELD": 0, "OF_SECOND": 208, "OF_COPIES": 88}
        return self.time(prediction, turns_options=lambda *args: wide | values)


def larger_groups() -> list[tuple[str, Callable[[], Row]]]:
    """Fewer programs and partial results, and tiles of D that stay.

    Predicted without a fold: 834 us of 64 segments and 804 of 16 for what the L2 gives, 0.071 us a program and its
    partial result, 65 us for every GB that the L2 lacks, of 45 MB whose oldest blocks go first. Groups of 24, 30 and 42
    pairs lack 1.6 of 64 segments and 1.7 to 3.5 of 16; 18 (about half of a row block's 35 pairs) 0.4 and 0.5, 36 (35
    are taken) 0.3: the programs of a chunk then read the same columns of A at the same time. Measured before, of 64
    segments: 18 pairs 970 us (the product 613), 24 pairs 1025 (663), 36 pairs 911 (624). With tiles of D that stay the
    L2 gives 0.74 of it, and the product is the limit (0.95 of `torch.mm`, of whole steps of 64 tokens). Of a 7B layer,
    74 pairs a row block, 24 pairs lack 2.2 GB, 36 pairs 9.2, 37 pairs 1.0.

    A layer whose slabs add to a pass's sums took 508 and 581 us of 16 and 64 segments, 1.79 and 2.05 reads, without the
    reduction that a pass has once. What a pass launches for 256 columns are slots that are added up after every launch:
    the sums are not read (94 and 151 MB), but the slots are, by four kernels more.

    Folded or not, a slab of 256 columns makes 490 to 500 TFLOP/s: what limits both is the 48 KB a step that come from
    the L2. With tiles of A that stay it is a third of that, and the product is the limit (0.9 of 790 TFLOP/s, of whole
    steps). An exchange of columns, 640 selects of every warp a pair, is taken to cost a tenth of it, and 128 KB that a
    program writes, or reads, 4 us."""
    todo: list[tuple[str, Callable[[], Row]]] = []
    layer = "qwen2.5-1.5b"
    predicted = {
        16: ((18, 907), (24, 1083), (30, 985), (36, 860), (42, 1080)),
        64: ((18, 970), (24, 1022), (30, 995), (36, 911), (42, 995)),
    }
    stay = {16: ((18, 820), (36, 785)), 64: ((18, 840), (36, 785))}
    a_stays = {16: ((18, 780), (36, 750)), 64: ((18, 880), (36, 835))}
    # Pairs a group, whether slabs add to sums, whether A stays.
    passes = {
        16: (
            (18, 0, 0, 534),
            (18, 1, 0, 508),
            (36, 0, 0, 515),
            (36, 1, 0, 495),
            (18, 1, 1, 467),
            (36, 1, 1, 455),
        ),
        64: (
            (18, 0, 0, 614),
            (18, 1, 0, 581),
            (36, 0, 0, 585),
            (36, 1, 0, 560),
            (18, 1, 1, 523),
            (36, 1, 1, 507),
        ),
    }
    for n in (16, 64):
        made = Slab(None, n)
        forms: list[tuple[str, Row, Any]] = [
            ("", {}, predicted[n]),
            (", D stays", {"HELD_FROM": 1}, stay[n]),
            (", A stays", {"A_STAYS": True}, a_stays[n]),
        ]
        for what, values, rows in forms:
            for pairs, us in rows:
                run = lambda s=made, p=us, v=values | {"MOST_PAIRS": pairs}: s.beside_mm(p, **v)  # noqa: E731
                todo.append((f"slab, no fold, {n} segments: {pairs} pairs a group{what}", run))
        for pairs, sums, stays, us in passes[n]:
            values = {"MOST_PAIRS": pairs, "WIDE_SUMS": bool(sums), "A_STAYS": bool(stays)}
            run = lambda n=n, p=us, v=values: in_a_pass(layer, n, p, **v)  # noqa: E731
            what = f"{pairs} pairs a group{', added to sums' * sums}{', A stays' * stays}"
            todo.append((f"a layer in a pass, width 256, {n} segments: {what}", run))
    for shape, pairs, held, us in (
        (SQUARE, 18, False, 149),
        (SQUARE, 18, True, 146),  # six column blocks, of which five have tiles of their own
        (SEVEN, 24, False, 3790),
        (SEVEN, 36, False, 4150),
        (SEVEN, 37, False, 3620),
        (SEVEN, 37, True, 3450),
    ):
        made = Slab(None, shape=shape)
        constants: Row = {"group_pairs": lambda cols, pairs, n=pairs: n}
        constants["HELD_FROM"] = 1 if held else slab.HELD_FROM
        run = lambda s=made, p=us, v=constants: s.beside_mm(p, **v)  # noqa: E731
        name = f"slab, no fold, {shape[0]} x {shape[1]}: {pairs} pairs a group{', D stays' if held else ''}"
        todo.append((name, run))
    return todo


def in_a_pass(model: str, segments: int, prediction: float, **values: Any) -> Row:
    with changed(slab, **values):
        row = sketch.in_a_pass(model, segments, 256, common.copy_bandwidth())
    return {"us": row["pass_ms"] * 1000, "prediction_us": prediction, "times_read": row["times_read"]}


def fold(tokens: int, prediction: float) -> Row:
    plan = plan_matrix(SketchSpec(), "model.layers.0.mlp.down_proj.weight", HIDDEN, WIDE)
    x = random(TOKENS, WIDE)
    with changed(slab, FOLD_TOKENS=tokens):
        return measured([lambda: fold_inputs(x, plan)], prediction)


def norms(chunk: int, prediction: float) -> Row:
    sets = [(random(TOKENS, HIDDEN).float(), random(TOKENS, HIDDEN)) for _ in range(2)]  # 150 MB each
    offsets = common.ragged(TOKENS, 16).cuda()
    with changed(norm, CHUNK_TOKENS=chunk):
        runs = [
            lambda x=x, dy=dy: norm_grad(x, dy, offsets, 1e-6, centered=False, with_bias=False)  # type: ignore[misc]
            for x, dy in sets
        ]
        return measured(runs, prediction)  # type: ignore[arg-type]


def biases(tokens: int, features: int, warps: int, prediction: float) -> Row:
    """Of q, k and v in one launch, as a pass makes it."""
    dys = [random(TOKENS, n) for n in (HIDDEN, NARROW, NARROW)]
    chunks = cut(common.ragged(TOKENS, 16).cuda(), TOKENS, norm.CHUNK_TOKENS, True)
    sums = torch.empty(chunks.n_slots * (HIDDEN + 2 * NARROW), device="cuda")
    places = [0, chunks.n_slots * HIDDEN, chunks.n_slots * (HIDDEN + NARROW)]
    strides = [dy.shape[1] for dy in dys]
    with changed(norm, BIAS_TOKENS=tokens, BIAS_FEATURES=features, BIAS_WARPS=warps):
        return measured([lambda: norm.add_sums(dys, strides, sums, sums, places, chunks)], prediction)


def gated(columns: int, width: int | None, prediction: float) -> Row:
    plan = (
        plan_matrix(SketchSpec(width=width), "model.layers.0.mlp.down_proj.weight", HIDDEN, WIDE)
        if width
        else None
    )
    gate, up = random(TOKENS, WIDE), random(TOKENS, WIDE)
    with changed(gates, COLUMNS=columns):
        return measured([lambda: swiglu(gate, up, plan)], prediction)


class Head:
    @functools.cached_property
    def hidden(self) -> torch.Tensor:
        return random(SCORED, HIDDEN)

    @functools.cached_property
    def weight(self) -> torch.Tensor:
        return random(VOCAB, HIDDEN) / HIDDEN**0.5

    @functools.cached_property
    def target(self) -> torch.Tensor:
        return torch.randint(0, VOCAB, (SCORED,), device="cuda")

    def both(self, chunk: int, prediction: float | None) -> Row:
        weigh = lambda p, a, b: torch.ones_like(p)  # noqa: E731
        size = chunk or None
        run = lambda: logprob_and_grad(self.hidden, self.weight, self.target, weigh, chunk_size=size)  # noqa: E731
        ms = common.milliseconds(run, repeats=3, warm=1)
        return {"us": ms * 1000, "prediction_us": prediction}

    def shaped(self, prediction: float | None, **values: Any) -> Row:
        """In one pass, with another tile; ``serves``: by the vendor's product and whole logits."""
        with changed(tiles, **values):
            return self.both(0, prediction)

    def forward(self, prediction: float | None, **values: Any) -> Row:
        """Log-probs alone."""
        with changed(tiles, **values):
            run = lambda: linear_logprob(self.hidden, self.weight, self.target)  # noqa: E731
            return {"us": common.milliseconds(run, repeats=3, warm=1) * 1000, "prediction_us": prediction}

    def product(self, float_sums: bool, prediction: float) -> Row:
        """dz times head of one chunk. A sum that is split may be added in bfloat16 unless the result is float32."""
        dz = random(chunks.default_chunk(SCORED, VOCAB, on_device=True), VOCAB)
        dtype = torch.float32 if float_sums else torch.bfloat16
        out = torch.empty(dz.shape[0], HIDDEN, device="cuda", dtype=dtype)
        kwargs = {"out_dtype": dtype} if float_sums else {}
        row = measured([lambda: torch.mm(dz, self.weight, out=out, **kwargs)], prediction)
        exact = dz[:8].double() @ self.weight.double()
        return row | {"tokens": dz.shape[0], "worst_error": float((out[:8].double() - exact).abs().max())}


def main() -> None:
    results = common.Results("variants")
    gate, folded, whole, head = Slab(64), Slab(128), Slab(None), Head()
    todo = larger_groups()  # the only rows that no GPU has run
    for width, made in (64, gate), (128, folded), (256, Slab(256)):
        for pairs, us in ((24, 112), (12, 114), (6, 120), (3, 130)):
            run = lambda n=pairs, p=us, s=made: s.time(p, group_pairs=lambda cols, pairs: n)  # noqa: E731
            todo.append((f"slab w={width}: {pairs} pairs a group", run))
    for tokens, us in ((512, 112), (256, 116), (1024, 118)):
        todo.append((f"slab w=64: chunks of {tokens}", lambda n=tokens, p=us: gate.time(p, CHUNK_TOKENS=n)))
    for stages, us in ((4, 112), (3, 118), (5, 110)):
        run = lambda n=stages, p=us: gate.shaped(p, num_stages=n)  # noqa: E731
        todo.append((f"slab by steps w=64: {stages} stages", run))
    todo.append(("slab by steps w=64: tile of 256 rows", lambda: gate.shaped(118, BM=256)))
    for stages, us in ((4, 570), (3, 600)):
        run = lambda n=stages, p=us: whole.shaped(p, num_stages=n)  # noqa: E731
        todo.append((f"slab by steps, no fold: {stages} stages", run))
    for width, made, parts, stages in (
        (64, gate, 2, 5),
        (64, gate, 4, 8),
        (128, folded, 1, 4),
        (128, folded, 2, 6),
    ):
        run = lambda s=made, n=parts, m=stages: s.in_parts(None, PARTS=n, STAGES=m)  # noqa: E731
        todo.append((f"slab w={width}: {parts} parts, one program a multiprocessor", run))
    for tokens, us in ((16, 116), (8, 120), (32, 116), (4, 140)):
        todo.append((f"fold 8960: {tokens} tokens", lambda n=tokens, p=us: fold(n, p)))
    for chunk, us in ((128, 78), (64, 62), (32, 56), (16, 60)):
        todo.append((f"norm 1536: chunks of {chunk}", lambda n=chunk, p=us: norms(n, p)))
    for tokens, features, warps in ((32, 64, 2), (16, 256, 4), (32, 256, 4), (16, 512, 4)):
        name = f"sums of biases: {tokens} x {features}, {warps} warps"
        todo.append((name, lambda t=tokens, f=features, w=warps: biases(t, f, w, 22)))
    for columns, folded in ((1024, None), (512, None), (1024, 64), (2048, 64)):
        name = f"gated product: {columns} columns{', fold' if folded else ''}"
        todo.append((name, lambda c=columns, w=folded: gated(c, w, 295)))
    logits = {"serves": lambda *args: False}
    by_tiles: dict[str, Any] = {"takes_turns": lambda device: False}
    shapes: dict[str, tuple[dict[str, Any], float, float]] = {
        "turns": ({}, 11800.0, 5500.0),
        "turns, 3 stages": ({"STAGES": 3}, 12400.0, 5700.0),
        "tiles": (by_tiles, 12400.0, 5900.0),
        "whole logits": (logits, 16200.0, 8100.0),
        "tiles, 3 stages": (by_tiles | {"STAGES": 3}, 12700.0, 5900.0),
        "tiles, 256 x 128": (by_tiles | {"TOKENS": 256, "WORDS": 128}, 12800.0, 6000.0),
        "tiles, 128 x 128, 4 warps": (by_tiles | {"WORDS": 128, "WARPS": 4, "STAGES": 3}, 13300.0, 6800.0),
    }
    for name, (values, us, forward_us) in shapes.items():
        todo.append((f"head: {name}", lambda v=values, p=us: head.shaped(p, **v)))
        todo.append((f"log-probs alone: {name}", lambda v=values, p=forward_us: head.forward(p, **v)))
    for chunk in (1024, 1664, 2048, 2816, 4096, 8192):
        todo.append((f"head: chunks of {chunk}", lambda n=chunk: head.both(n, 18000.0)))
    todo.append(("dz times head: bfloat16 result", lambda: head.product(False, 1450)))
    todo.append(("dz times head: float32 result", lambda: head.product(True, 1450)))
    for name, run in todo:
        results.attempt(name, run)
    results.finish()


if __name__ == "__main__":
    main()
