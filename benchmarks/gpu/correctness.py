"""Every op on the GPU against the float64 oracle, on awkward shapes, in every dtype; repeatability; beyond 2^31.

``--small`` runs a short list of shapes once, for compute-sanitizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import common
import launches
import torch
from changed import changed

from cropi_kernels import (
    SketchSpec,
    bias_grad,
    fold_inputs,
    linear_logprob,
    logprob_and_grad,
    norm_grad,
    plan_matrix,
    plan_vector,
    sketch_embedding,
    sketch_grouped,
    sketch_linear,
    sketch_vector,
)
from cropi_kernels.ops._triton_segments import cut, reduce_partials
from cropi_kernels.ops.linear_logprob import oracle, triton_tiles
from cropi_kernels.ops.norm_grad.reference import segment_sums
from cropi_kernels.ops.sketch_grouped.reference import sketch_grouped as grouped_reference
from cropi_kernels.ops.sketch_linear import triton as slab
from cropi_kernels.testing import sketch_and_magnitudes, sum_error_bound

# rows of the matrices, cols, width, tokens of the segments, into
SLABS: dict[str, tuple[list[int], int, int | None, list[int], str]] = {
    "no fold": ([1536], 2048, None, [5, 0, 700, 64, 1], "slots"),
    "no fold, three matrices": ([512, 256, 256], 528, None, [513, 127, 1500], "slots"),
    "width 256": ([8960], 1536, 256, [600, 100, 37], "slots"),
    "width 256, two matrices": ([4864, 4864], 896, 256, [64, 1, 900], "slots"),
    "width 256, sums": ([1536, 256, 256], 1536, 256, [600, 100, 37], "sums"),
    "width 128": ([1536], 1536, 128, [600, 100, 37], "out"),
    "width 128, sums": ([2048, 512, 512], 1024, 128, [600, 100, 37], "sums"),
    "width 128, one group": ([512], 128, 128, [3, 129, 0, 512], "out"),
    "width 128, two groups": ([3584, 512], 256, 128, [64, 1, 900], "slots"),
    "no fold, 96 columns": ([1040], 96, None, [300, 20], "out"),
    "width 64": ([8960], 1536, 64, [600, 0, 100, 37], "slots"),
    "width 64, sums": ([1536, 264, 256], 1536, 64, [600, 100, 37], "sums"),
    "width 64, one group": ([520], 256, 64, [3, 129, 0, 512], "out"),
}
TURNS = ((1, 1003, 8), (64, 257, 64), (65, 151936, 1536), (700, 50257, 200), (3000, 32000, 4096))
TOKENS, SCORED = 700, 130  # of embeddings and norms, and of log-probs
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES: dict[str, tuple[int, int, int | None, int, list[int]]] = {
    "folded": (100, 96, 64, 32768, [5, 0, 70, 1]),
    "no fold": (300, 200, None, 32768, [5, 0, 700, 1]),
    "several groups": (1300, 700, None, 32768, [3, 600, 64]),
    "two slabs": (1100, 900, 128, 65536, [1100, 20]),
    "narrow": (33, 7, None, 32768, [9]),
    "odd": (1003, 517, 256, 32768, [129, 63, 513]),
}
# groups, rows, cols, width, first row, rows to the next group
GROUPED: dict[str, tuple[int, int, int, int | None, int, int]] = {
    "aligned": (4, 48, 96, 64, 0, 48),
    "odd rows": (3, 37, 40, 16, 5, 41),
    "straddling blocks": (3, 200, 300, None, 0, 200),
    "several shares": (27, 8, 9, None, 2000, 1000),
    "experts of a real layer": (64, 768, 2048, 64, 0, 768),
}


def check(error: torch.Tensor, bound: torch.Tensor) -> dict[str, Any]:
    worst = float((error / bound.clamp(min=1e-30)).max())
    return {"error": float(error.max()), "of_bound": worst, "ok": bool((error <= bound).all())}


def linear(case: str, dtype: torch.dtype) -> dict[str, Any]:
    rows, cols, width, dim, lengths = CASES[case]
    spec = SketchSpec(dim=dim, width=width)
    plan = plan_matrix(spec, "a.b.weight", rows, cols)
    offsets = torch.tensor([1, *lengths]).cumsum(0)
    n = int(offsets[-1]) + 2
    g = torch.Generator().manual_seed(0)
    d, x = torch.randn(n, rows, generator=g).to(dtype), torch.randn(n, cols, generator=g).to(dtype)
    out = torch.zeros(len(lengths), spec.base_dim, device="cuda")
    folded = fold_inputs(x.cuda(), plan, backend="triton")
    sketch_linear(d.cuda(), folded, offsets, plan, out, backend="triton")
    again = torch.zeros_like(out)
    sketch_linear(d.cuda(), folded, offsets.cuda(), plan, again, backend="triton")
    a = folded.cpu()
    exact, size = sketch_and_magnitudes(d, a, offsets, plan)
    bound = sum_error_bound(size, 2 * max(lengths) * plan.n_row_blocks * plan.n_col_blocks)
    row = check((out.cpu().double() - exact).abs(), bound + 1e-12)
    exact_fold = fold_inputs(x.double(), plan, backend="reference")
    terms = 1 if width is None else -(-cols // width)
    fold_bound = sum_error_bound(x.double().abs().sum(1, keepdim=True), terms + 1)
    fold_bound = fold_bound + torch.finfo(dtype).eps * exact_fold.abs()
    row["ok"] &= bool(((a.double() - exact_fold).abs() <= fold_bound).all()) and torch.equal(out, again)
    return row | {"repeatable": torch.equal(out, again)}


def embedding(role: str, dtype: torch.dtype, vocab: int = 1003, features: int = 300) -> dict[str, Any]:
    spec = SketchSpec(vocab_width=128)
    plan = plan_matrix(spec, "embed.weight", vocab, features, role=role)  # type: ignore[arg-type]
    offsets = torch.tensor([0, 30, 30, TOKENS])
    g = torch.Generator().manual_seed(0)
    x, ids = (
        torch.randn(TOKENS, features, generator=g).to(dtype),
        torch.randint(0, vocab, (TOKENS,), generator=g),
    )
    ids[40:90] = 7
    exact = torch.zeros(3, 32768, dtype=torch.float64)
    sketch_embedding(x.double(), ids, offsets, plan, exact, backend="reference")
    runs = [
        sketch_embedding(x.cuda(), ids.cuda(), offsets, plan, torch.zeros(3, 32768, device="cuda"))
        for _ in "ab"
    ]
    row = check((runs[0].cpu().double() - exact).abs(), sum_error_bound(x.double().abs().sum(), 4).expand(1))
    same = torch.equal(*runs)
    return row | {"repeatable": same, "ok": row["ok"] and same}


def grouped(case: str, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens sorted by group, and by segment in a group; some groups have none."""
    groups, rows, cols, width, first_row, step = GROUPED[case]
    plan = plan_matrix(SketchSpec(width=width), "a.experts.b", first_row + groups * step, cols)
    lengths = [[1, 0, 20], [0, 0, 0], [70, 0, 3], [0, 0, 5]] * groups
    offsets = torch.tensor([2, *(n for group in lengths[:groups] for n in group)]).cumsum(0)
    g = torch.Generator().manual_seed(0)
    n, where = int(offsets[-1]) + 1, {"first_row": first_row, "row_step": step}
    d, a = (torch.randn(n, m, generator=g).to(dtype) for m in (rows, plan.folded_cols))
    exact = torch.zeros(3, 32768, dtype=torch.float64)
    grouped_reference(d.double(), a.double(), offsets, plan, exact, **where)
    runs = [
        sketch_grouped(d.cuda(), a.cuda(), offsets, plan, torch.zeros(3, 32768, device="cuda"), **where)
        for _ in "ab"
    ]
    distance = float((runs[0].cpu().double() - exact).norm() / exact.norm())
    same = torch.equal(*runs)
    # Products of 16-bit numbers are exact in float32; what is left are sums of some thousand terms, at 2^-24 each.
    return {"distance": distance, "repeatable": same, "ok": distance <= 1e-5 and same}


def norm_bounds(
    x: torch.Tensor, dy: torch.Tensor, offsets: torch.Tensor, centered: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """What float32 may do to the sums over tokens, and to a row's statistics: sums of 64 numbers a lane and a tree.

    A mean that is wrong by some roundings of |x| moves every xhat of its row by as much, whatever xhat is.
    """
    shifted = x - x.mean(1, keepdim=True) if centered else x
    xhat = shifted * torch.rsqrt(shifted.square().mean(1, keepdim=True) + 1e-6)
    weight = segment_sums(dy.abs() * (xhat.abs() + x.abs()), offsets)
    return sum_error_bound(weight, TOKENS + 80), sum_error_bound(segment_sums(dy.abs(), offsets), TOKENS)


def norms(n: int, centered: bool, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(TOKENS, n, generator=g) + 2).to(dtype), torch.randn(TOKENS, n, generator=g).to(dtype)
    offsets = torch.tensor([1, 5, 5, TOKENS - 10])
    how = {"centered": centered, "with_bias": True}
    got = norm_grad(x.cuda(), dy.cuda(), offsets, 1e-6, **how)
    exact = norm_grad(x.double(), dy.double(), offsets, 1e-6, **how, backend="reference")
    assert got[1] is not None and exact[1] is not None
    bounds = norm_bounds(x.double(), dy.double(), offsets, centered)
    rows = [
        check((a.cpu().double() - b).abs(), bound)
        for a, b, bound in zip(got, exact, bounds)
        if a is not None and b is not None
    ]
    bias = bias_grad(dy.cuda(), offsets).cpu().double()
    plan = plan_vector(SketchSpec(), "a.bias", n)
    out = sketch_vector(got[1], plan, torch.zeros(3, 32768, device="cuda")).cpu()
    want = sketch_vector(got[1].cpu(), plan, torch.zeros(3, 32768))
    ok = (
        all(r["ok"] for r in rows)
        and bool(((bias - exact[1]).abs() <= bounds[1]).all())
        and torch.allclose(out, want)
    )
    return rows[0] | {"ok": ok}


def log_probs(vocab: int, dtype: torch.dtype, softcap: float | None, scale: float = 1 / 6) -> dict[str, Any]:
    """Error against plain torch in the same dtype: at most twice its own (and the gradient's, likewise).

    ``scale``: of the head; with large logits, most targets are far below the largest, and tiles are done again.
    """
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(SCORED, 256, generator=g).to(dtype)
    head = (torch.randn(vocab, 256, generator=g) * scale).to(dtype)
    target, weight = torch.randint(0, vocab, (SCORED,), generator=g), torch.randn(SCORED, generator=g)
    target[3] = -100
    right = oracle.linear_logprob(hidden, head, target, softcap=softcap)
    _, gradient = oracle.gradients(weight.double(), hidden, head, target, softcap=softcap)
    args, chunk = (hidden.cuda(), head.cuda(), target.cuda()), SCORED // 2 - 1
    runs = [
        logprob_and_grad(*args, lambda _, a, b: weight[a:b].cuda(), softcap=softcap, chunk_size=chunk)
        for _ in "ab"
    ]
    logp, dhidden, _ = (t.cpu().double() for t in runs[0])
    forward, entropy = linear_logprob(*args, softcap=softcap, return_entropy=True, chunk_size=chunk)
    h = args[0].clone().requires_grad_()
    z = h @ args[1].t()
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    plain = torch.log_softmax(z, -1).gather(1, args[2].clamp(min=0)[:, None])[:, 0]
    (plain * weight.cuda() * (args[2] >= 0)).sum().backward()
    assert h.grad is not None
    theirs = float((plain.detach().cpu().double() - right.logp)[target >= 0].abs().max())
    their_gradient = float((h.grad.cpu().double() - gradient).abs().max())
    error, gradient_error = float((logp - right.logp).abs().max()), float((dhidden - gradient).abs().max())
    ok = (
        error <= 2 * theirs + 1e-4 and gradient_error <= 2 * their_gradient + 1e-4 and bool((logp <= 0).all())
    )
    ok &= bool(((forward.cpu().double() - right.logp).abs() <= 2 * theirs + 1e-4).all())
    ok &= bool(((entropy.cpu().double() - right.entropy).abs() <= 20 * theirs + 1e-3).all())
    same = all(torch.equal(a, b) for a, b in zip(*runs))
    return {
        "error": error,
        "gradient_error": gradient_error,
        "torch_gradient_error": their_gradient,
        "entropy_error": float((entropy.cpu().double() - right.entropy).abs().max()),
        "highest": float(logp.max()),
        "torch_error": theirs,
        "repeatable": same,
        "ok": ok and same,
    }


def by_turns(n: int, vocab: int, features: int, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Any]:
    """Whether `turns_kernel` gives the bits of `tiles_kernel`, whose values the other cases and the tests hold.

    ``scale``: of the head; with large logits, most targets are far below the largest, and tiles are done again.
    """
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 2 * features, generator=g).to("cuda", dtype)[:, :features]  # rows apart
    head = (torch.randn(vocab, features, generator=g) * scale / features**0.5).to("cuda", dtype)
    bias, target = torch.randn(vocab, generator=g).cuda(), torch.randint(0, vocab, (n,), generator=g).cuda()
    target[n // 2] = -100

    def results(turns: bool) -> list[torch.Tensor]:
        with changed(triton_tiles, takes_turns=lambda device: turns):
            both = linear_logprob(hidden, head, target, bias=bias, temperature=0.7, return_entropy=True)
            with_gradient = logprob_and_grad(
                hidden, head, target, lambda p, a, b: p.exp(), chunk_size=3 * n // 5 + 1
            )
        return [*both, *with_gradient]

    same = [torch.equal(a, b) for a, b in zip(results(True), results(False))]
    finite = all(bool(x.isfinite().all()) for x in results(True))
    return {"same": same, "ok": all(same) and finite}


def slabs_by_turns(
    rows: list[int],
    cols: int,
    width: int | None,
    lengths: list[int],
    dtype: torch.dtype,
    into: str,
    **values: Any,
) -> dict[str, Any]:
    """Whether `slab_turns_kernel` gives the bits of `slab_kernel`, of one matrix or of some with the same inputs.
    ``values``: other constants than what ships. `slab_stay_kernel` adds the tokens of a long chunk in another order, so
    its numbers are such that no sum is rounded."""
    g = torch.Generator().manual_seed(0)
    plans = tuple(plan_matrix(SketchSpec(width=width), f"{n}.weight", r, cols) for n, r in enumerate(rows))
    n = sum(lengths)
    some = lambda x: (x * 4).round() / 4 if values.get("A_STAYS") else x  # noqa: E731
    wide = some(torch.randn(n, sum(rows) + 64, generator=g)).to("cuda", dtype)
    ds = list(wide.split([*rows, 64], 1)[:-1])  # rows apart
    ds[1::2] = [d.contiguous() for d in ds[1::2]]
    a = some(torch.randn(n, cols, generator=g)).to("cuda", dtype)
    if plans[0].col_fold is not None:
        a = fold_inputs(a, plans[0])
    offsets = torch.tensor([0, *lengths]).cumsum(0).cuda()

    def results(turns: bool) -> torch.Tensor:
        with changed(slab, takes_turns=lambda device: turns, **values):
            stack = slab.stack_of(plans, a.device, dtype)
        assert bool(stack.turns) == turns
        always = into != "out" or stack.groups > 1 or stack.wide
        chunks = cut(offsets, n, stack.chunk, always)
        out = torch.ones(len(lengths), 32768, device="cuda")
        partial = torch.full((chunks.n_slots, stack.groups, out.shape[1]), 2.0, device="cuda")
        strides = [d.stride(0) for d in ds]
        how = "slots" if into == "out" and always else into
        slab.add_slabs(stack, ds, strides, a, a.stride(0), out, partial, chunks, how)
        reduce_partials(partial, out, chunks, stack.groups)
        return out

    once, again, by_steps = results(True), results(True), results(False)
    ok = torch.equal(once, again) and torch.equal(once, by_steps) and bool(once.isfinite().all())
    return {
        "far": float((once - by_steps).abs().max()),
        "ok": ok and not torch.equal(once, torch.ones_like(once)),
    }


def beyond_int32_sketch() -> dict[str, Any]:
    """D with more than 2^31 elements: the last tokens' sketch must be that of a small copy of them."""
    n, rows = 16384, 152064
    d = torch.empty(n, rows, dtype=torch.bfloat16, device="cuda").zero_()
    a = torch.randn(n, 64, device="cuda").to(torch.bfloat16)
    d[-200:] = torch.randn(200, rows, device="cuda")
    plan = plan_matrix(SketchSpec(), "lm_head.weight", rows, 64)
    out, small = torch.zeros(2, 32768, device="cuda"), torch.zeros(1, 32768, device="cuda")
    sketch_linear(d, a, torch.tensor([0, n - 200, n]), plan, out)
    sketch_linear(d[-200:].clone(), a[-200:].clone(), torch.tensor([0, 200]), plan, small)
    return {"elements": d.numel(), "ok": torch.equal(out[1], small[0]) and bool((out[0] == 0).all())}


def beyond_int32_fold() -> dict[str, Any]:
    x = torch.zeros(140_000, 16_384, dtype=torch.bfloat16, device="cuda")
    x[-5:] = torch.randn(5, 16_384, device="cuda")
    plan = plan_matrix(SketchSpec(), "a.b.weight", 8, 16_384)
    full, part = fold_inputs(x, plan), fold_inputs(x[-5:].clone(), plan)
    return {"elements": x.numel(), "ok": torch.equal(full[-5:], part) and bool((full[:-5] == 0).all())}


def beyond_int32_logits() -> dict[str, Any]:
    """One chunk of 16384 x 152064 logits (10 GB)."""
    n, vocab = 16384, 152064
    hidden, head = (
        torch.randn(n, 64, device="cuda").bfloat16(),
        torch.randn(vocab, 64, device="cuda").bfloat16(),
    )
    target = torch.randint(0, vocab, (n,), device="cuda")
    big = logprob_and_grad(hidden, head, target, lambda p, a, b: torch.ones_like(p), chunk_size=n)
    small = logprob_and_grad(hidden[-99:], head, target[-99:], lambda p, a, b: torch.ones_like(p))
    ok = torch.allclose(big[0][-99:], small[0], atol=1e-4) and torch.allclose(
        big[1][-99:], small[1], atol=2e-2
    )
    return {"elements": n * vocab, "ok": ok}


def refusals() -> dict[str, Any]:
    plan = plan_matrix(SketchSpec(), "a.b.weight", 64, 64)
    d = torch.zeros(4, 64, device="cuda")
    out, offsets, said = torch.zeros(1, 32768, device="cuda"), torch.tensor([0, 4]), []
    for bad in (dict(d=d.double()), dict(a=d.cpu()), dict(offsets=torch.tensor([0, 9])), dict(out=out.cpu())):
        args = dict(d=d, a=d, offsets=offsets, out=out) | bad
        try:
            sketch_linear(args["d"], args["a"], args["offsets"], plan, args["out"], backend="triton")
            said.append("")
        except (ValueError, RuntimeError) as error:
            said.append(str(error)[:90])
    return {"messages": said, "ok": all(said)}


def main() -> None:
    small = "--small" in sys.argv
    results = common.Results("sanitizer_" + sys.argv[-1] if small else "correctness")
    for name, dtype in DTYPES.items():
        if not small or name != "fp16":
            in_dtype(lambda what, run, name=name: results.attempt(f"{what} {name}", run), dtype, small)
    if not small:
        for op in launches.calls("cpu"):
            results.attempt(f"{op}: streams, graphs, devices", partial(launches.check, op))
        results.attempt("host offsets in a graph", launches.refused_in_a_graph)
        results.attempt("refusals", refusals)
        results.attempt("sketch beyond 2^31 elements", beyond_int32_sketch)
        results.attempt("fold beyond 2^31 elements", beyond_int32_fold)
        results.attempt("logits beyond 2^31 elements", beyond_int32_logits)
    results.finish()


def in_dtype(
    attempt: Callable[[str, Callable[[], dict[str, Any]]], Any], dtype: torch.dtype, small: bool
) -> None:
    for case in ("folded", "several groups", "odd") if small else CASES:
        attempt(f"sketch_linear {case}", partial(linear, case, dtype))
    for role in ("embedding", "tied"):
        attempt(f"sketch_embedding {role}", partial(embedding, role, dtype))
    for case in ("aligned", "odd rows") if small else GROUPED:
        attempt(f"sketch_grouped {case}", partial(grouped, case, dtype))
    sizes = ((24, False), (1536, True)) if small else ((1, False), (128, True), (1536, False), (8192, True))
    for n, centered in sizes:
        attempt(f"norm_grad {n}", partial(norms, n, centered, dtype))
    for vocab in (1003,) if small else (1, 127, 1003, 50257, 151936):
        for cap in (None, 30.0):
            attempt(f"log-probs V={vocab} cap={cap}", partial(log_probs, vocab, dtype, cap))
    attempt("log-probs of far targets", partial(log_probs, 1003, dtype, None, 3.0))
    if dtype != torch.bfloat16 or not triton_tiles.takes_turns(torch.device("cuda:0")):
        return
    for case in ("no fold, 96 columns",) if small else SLABS:
        rows, cols, width, lengths, into = SLABS[case]
        run = partial(slabs_by_turns, rows, cols, width, lengths, dtype, into)
        attempt(f"slabs by turns, {case}", run)
    for case in () if small else ("no fold", "no fold, three matrices"):
        rows, cols, width, lengths, into = SLABS[case]
        run = partial(slabs_by_turns, rows, cols, None, lengths, dtype, into, HELD_FROM=1)
        attempt(f"slabs by turns, {case}, tiles of D stay", run)
    for n, vocab, features in ((130, 1003, 72),) if small else TURNS:
        attempt(
            f"log-probs by turns {n} x {vocab} x {features}", partial(by_turns, n, vocab, features, dtype)
        )
    attempt("log-probs by turns, far", partial(by_turns, 130, 1003, 256, dtype, 48.0))


if __name__ == "__main__":
    main()
