"""What is new, before everything else: whether it is right; with ``times``, how long it takes, beside what was
calculated for an H100. Slabs, experts, far log-probs and norms have run on no GPU in this form yet; the other rows were
right on an H200.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import common
import correctness
import jobs
import launches
import model as whole
import torch

import cropi
from cropi.gradient.masks import ALIGNED, handed, prefix_mask
from cropi.sketching import passes
from cropi_kernels import GradientSketcher, SketchSpec, bias_grad, norm_grad, rms_norm, rms_norm_backward
from cropi_kernels._triton import takes_turns
from cropi_kernels.ops.norm_grad.reference import segment_sums
from cropi_kernels.sketcher.model.attention import right_backward
from cropi_kernels.testing import sum_error_bound

# One matrix of 420 block pairs: rows, cols, width, tokens of the segments.
SLAB = ([1536], 8960, None, [600, 0, 37, 64])
FOLDED = ([1536, 256, 256], 1536, 256, [600, 0, 37, 64])
FORMS: dict[str, dict[str, Any]] = {
    "tiles of D that stay": {"HELD_FROM": 1},
    "36 pairs a group": {"MOST_PAIRS": 36},
    "36 pairs a group, tiles of D that stay": {"HELD_FROM": 1, "MOST_PAIRS": 36},
    "36 pairs a group, tiles of A that stay": {"A_STAYS": True, "MOST_PAIRS": 36},
}
OF_FOLDED: dict[str, dict[str, Any]] = {"": {}, ", tiles of A that stay": {"A_STAYS": True}}
EXPERTS = ("odd rows", "experts of a real layer")
NORMED = (8192, 1, 3, 18, 32, 64, 128)  # features of norms
TOKENS, EPS = 700, 1e-6
WIDE = 5_000_001  # features of a bias; a launch's second axis ends at 65535 blocks of 64
LENGTHS = (77, 1000)  # of rows with a mask
TILES = (704, 700, 640)  # of which the first has half a tile left over
# kind of the model, layout, estimator, attention. Eager attention repeats its bits.
JOBS = (
    ("llama", "padded", "cropi", "eager"),
    ("qwen2", "shared", "gspo", "eager"),
    ("qwen3_moe", "shared", "cropi", "eager"),
    ("llama", "shared", "grpo", "sdpa"),
)
BATCH = 512  # tokens of a batch of these jobs
APART = 1e-5  # of float32 passes whose sums have another order
NORMS = ((8192, 3584), (16384, 3584), (16384, 1536))
ROW, SHARING = 4096, 7  # tokens of a row in which so many responses share a prompt


# ------------------------------------------------------------------------------------------------ kernels
def normed(n: int) -> dict[str, Any]:
    """Norms of the widest rows, of rows that are narrower than a warp, or that a program takes all at once: forward,
    backward, sums."""
    offsets, worst = torch.tensor([0, 1, 34, 34, TOKENS]), {"forward": 0.0, "backward": 0.0, "sums": 0.0}
    right = True
    for dtype in correctness.DTYPES.values():
        g = torch.Generator().manual_seed(n)
        x, dy = ((torch.randn(TOKENS, n + 8, generator=g) + 1).to("cuda", dtype)[:, :n] for _ in "ab")
        weight = (torch.randn(n, generator=g) + 1).to("cuda", dtype)
        y, scale = rms_norm(x, weight, EPS)
        dx, sums = rms_norm_backward(dy, x, weight, scale, offsets)
        alone, _ = rms_norm_backward(dy, x, weight, scale)
        again = rms_norm_backward(dy, x, weight, scale, offsets)
        ones = rms_norm(x.float(), torch.ones_like(weight).float(), EPS)
        # Lanes that share a row have one scale, to the bit.
        right &= torch.equal(ones[0], x.float() * ones[1][:, None]) and torch.equal(alone, dx)
        assert sums is not None and again[1] is not None
        right &= torch.equal(again[0], dx) and torch.equal(again[1], sums)
        wide = [t.cpu().double() for t in (dy, x, weight)]
        exact, exact_scale = rms_norm(wide[1], wide[2], EPS, backend="reference")
        exact_dx, exact_sums = rms_norm_backward(*wide, exact_scale, offsets, backend="reference")
        assert exact_sums is not None
        terms, xhat = (wide[0] * wide[2]).abs(), wide[1].abs() * exact_scale[:, None]
        size = exact_scale[:, None] * (terms + xhat * (terms * xhat).mean(1, keepdim=True))
        sizes = segment_sums(wide[0].abs() * xhat, offsets)
        found: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {
            "forward": (y, exact, exact.abs()), "backward": (dx, exact_dx, size), "sums": (sums, exact_sums, sizes)
        }  # fmt: skip
        for name, (got, want, terms) in found.items():
            # Below its smallest normal number a dtype has the spacing of that one: in float16 from 6e-5 on.
            kept = torch.finfo(got.dtype)
            bound = (
                sum_error_bound(terms, TOKENS + 2 * n + 20) + want.abs().clamp(min=kept.tiny) * kept.eps / 2
            )
            of_bound = ((got.cpu().double() - want).abs() / bound.clamp(min=1e-30)).max()
            worst[name] = max(worst[name], float(of_bound))
        right &= all(bool(correctness.norms(n, centered, dtype)["ok"]) for centered in (False, True))
    return worst | {"ok": right and max(worst.values()) <= 1}


def wide_bias() -> dict[str, Any]:
    """More blocks of features than a launch's second axis has."""
    dy, offsets = torch.randn(70, WIDE, device="cuda").bfloat16(), torch.tensor([0, 3, 3, 70])
    got = bias_grad(dy, offsets)
    right, worst = bool((got[1] == 0).all()), 0.0
    for s, (a, b) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:])):
        exact, size = dy[a:b].double().sum(0), dy[a:b].double().abs().sum(0)
        worst = max(worst, float(((got[s] - exact).abs() / sum_error_bound(size, 67).clamp(min=1e-30)).max()))
    return {"features": WIDE, "of_bound": worst, "ok": right and worst <= 1}


# ------------------------------------------------------------------------------------------------ passes
def streams() -> dict[str, Any]:
    """A pass on a stream of the caller's gives the same bits; a module on another stream than its batch is refused."""
    model = jobs.made("llama").cuda()
    model.set_attn_implementation("eager")
    ids = torch.randint(2, jobs.WORDS, (4, 50), generator=torch.Generator().manual_seed(0)).to("cuda")
    at = torch.arange(200, device="cuda").view(4, 50)[:, :-1].reshape(-1)
    data = {"input_ids": ids, "positions": at, "targets": ids[:, 1:].reshape(-1), "segments": torch.arange(4)}
    module, side, message = model.model.layers[1].mlp.up_proj, torch.cuda.Stream(), ""
    with GradientSketcher(model, SketchSpec()) as sketcher:

        def sketches() -> launches.Results:
            done = sketcher.policy_gradient(**data, weigh=lambda p, a, b: torch.ones_like(p))
            return (done.sketches,)

        want, there = sketches(), launches.on_a_stream(sketches)
        own = torch.cuda.current_stream()
        hooks = [
            module.register_forward_pre_hook(lambda *args: torch.cuda.set_stream(side)),
            module.register_forward_hook(lambda *args: torch.cuda.set_stream(own), always_call=True),
        ]
        try:
            sketches()
        except RuntimeError as error:
            message = str(error)
        for hook in hooks:
            hook.remove()
        after = sketches()
    same = [launches.same(want, other) for other in (there, after)]
    return {"same": same, "message": message[:90], "ok": all(same) and "another CUDA stream" in message}


def masks(length: int) -> dict[str, Any]:
    """Masks made on the device are the host's; attention gives the same with the one that it adds to its scores."""
    own = [0] * 20 + [1 + i * 3 // (length - 20) for i in range(length - 20)]
    blocks = torch.tensor([own, [*own[: length - 9], *[-1] * 9]])
    mask, added = prefix_mask(blocks.to("cuda")), handed(prefix_mask(blocks.to("cuda")), torch.bfloat16)
    here = prefix_mask(blocks)
    same = torch.equal(mask.cpu(), here) and torch.equal(added.cpu(), handed(here, torch.bfloat16))
    results = []
    for given in (mask, added):
        g = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, 4, length, 64, generator=g).to("cuda", torch.bfloat16).requires_grad_()
            for _ in "qkv"
        )
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=given)
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), (q, k, v))))
        exact = torch.nn.functional.scaled_dot_product_attention(
            *(x.float() for x in (q, k, v)), attn_mask=mask
        )
    forward, *gradients = zip(*results, strict=True)
    apart = max(float((a - b).float().norm() / b.float().norm()) for a, b in gradients)
    error = max(float((y.float() - exact).norm() / exact.norm()) for y in forward)
    row = {"masks": same, "forward": torch.equal(*forward), "gradients_apart": apart, "error": error}
    aligned, unit = added.stride(-2) % ALIGNED == 0, torch.finfo(torch.bfloat16).eps
    # The backward pass of attention may add in another order on every run.
    return row | {"ok": same and aligned and apart <= unit and error <= unit}


def low_scores(length: int) -> dict[str, Any]:
    """The gradient of queries whose scores are all near -120, with a mask: by the attention that torch chooses, and by
    what a pass leaves it to choose from."""
    device, mask = torch.empty(0, device="cuda").device, prefix_mask(torch.zeros(1, length).long().to("cuda"))
    g = torch.Generator().manual_seed(0)
    q, k, v = (
        (torch.randn(1, 1, length, 64, generator=g) * size).to("cuda", torch.bfloat16)
        for size in (0.1, 0.1, 1)
    )
    q[..., 0], k[..., 0] = 1.0, -120 * 8.0
    finite, leaf = [], q.requires_grad_()
    for around in (contextlib.nullcontext(), right_backward(device, length)):
        with around:
            y = torch.nn.functional.scaled_dot_product_attention(leaf, k, v, attn_mask=mask)
            (gradient,) = torch.autograd.grad(y.float().square().sum(), leaf)
        finite.append(bool(gradient.isfinite().all()))
    return {"finite_by_choice": finite[0], "finite": finite[1], "ok": finite[1]}


@contextlib.contextmanager
def watched(waits: Counter[str], full: int | None = None) -> Iterator[None]:
    """Counts how often the host waits in passes from the fourth on, by line of code; pass ``full`` finds no memory."""
    compute, fetch, count = GradientSketcher.policy_gradient, passes.fetch, 0

    def noted(run: Any, *args: Any, **kwargs: Any) -> Any:
        if count < 4:
            return run(*args, **kwargs)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return run(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                waits.update(f"{w.filename}:{w.lineno}" for w in seen if "synchronizing" in str(w.message))

    def one(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == full:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return noted(compute, *args, **kwargs)

    try:
        GradientSketcher.policy_gradient = one  # type: ignore[method-assign]
        passes.fetch = lambda *args: noted(fetch, *args)  # type: ignore[assignment]
        yield
    finally:
        GradientSketcher.policy_gradient, passes.fetch = compute, fetch  # type: ignore[method-assign]


def ahead(kind: str, layout: str, estimator: str, attention: str) -> dict[str, Any]:
    """A job whose passes are launched ahead beside one whose are not, also where memory runs out in between."""
    data, model = jobs.records(jobs.PROMPTS, jobs.WORDS, jobs.LONGEST), jobs.made(kind).cuda()
    for record in data:
        record["logprobs"] = [[-7.0] * len(ids) for ids in record["response_ids"]]
    model.set_attn_implementation(attention)
    policy = cropi.Policy(model)
    options = {"layout": layout, "estimator": estimator, "behaviour": "file", "tokens_per_batch": BATCH}
    devices, got = passes.AHEAD, {}
    waits: Counter[str] = Counter()
    try:
        for full in (None, 3):
            for there in (devices, ()):
                passes.AHEAD = there
                with watched(waits if there else Counter(), full):
                    got[full, bool(there)] = jobs.sketched(policy, data, verify=False, **options)
    finally:
        passes.AHEAD = devices
    same = [torch.equal(got[full, True], got[full, False]) for full in (None, 3)]
    apart = max(jobs.apart(x, got[None, False]) for x in got.values())
    row = {"same": same, "apart": apart, "waits": dict(waits.most_common(4))}
    return row | {"ok": apart <= APART and (attention != "eager" or all(same))}


# ------------------------------------------------------------------------------------------------ times
def norms(tokens: int, features: int, predicted: float) -> dict[str, Any]:
    """Of bfloat16."""
    sets = [
        [torch.randn(tokens, features, device="cuda").bfloat16() for _ in "ab"]
        for _ in range(common.n_sets(4 * tokens * features))
    ]
    offsets = common.ragged(tokens, 16).cuda()
    got = common.kernel_milliseconds([
        lambda x=x, dy=dy: norm_grad(x, dy, offsets, EPS, centered=False, with_bias=False)  # type: ignore[misc]
        for x, dy in sets
    ])  # fmt: skip
    return {"us": got["ms"] * 1000, "prediction_us": predicted}


def shared_rows(model: Any) -> dict[str, Any]:
    """A pass over rows of which several responses share a prompt: with the mask that attention adds, and with the bool
    one, of which attention makes such a mask in every layer and keeps it."""
    rows, size = 4, ROW // (SHARING + 1)
    own = torch.arange(ROW) // size
    blocks = own.expand(rows, ROW).contiguous()
    places = torch.arange(ROW) - (own - 1).clamp_min(0) * size
    ids = torch.randint(0, whole.SHAPE["vocab_size"], (rows, ROW), generator=torch.Generator().manual_seed(0))
    at = torch.arange(rows * ROW).view(rows, ROW)[:, size:-1].reshape(-1)
    device = torch.empty(0, device="cuda").device
    data = {
        "input_ids": ids, "positions": at, "targets": ids.view(-1)[at + 1], "position_ids": places.expand(rows, ROW)
    }  # fmt: skip
    there = {name: whole.sent(device, x.contiguous()) for name, x in data.items()}
    there["segments"], blocks = torch.arange(rows), blocks.to("cuda")
    weigh = lambda p, a, b: torch.ones_like(p)  # noqa: E731

    with GradientSketcher(model, SketchSpec(), verify=False) as sketcher:

        def run(added: torch.dtype | None) -> torch.Tensor:
            mask = handed(prefix_mask(blocks), added)
            return sketcher.policy_gradient(**there, attention_mask=mask, weigh=weigh).sketches

        runs = {"added": lambda: run(model.dtype), "bool": lambda: run(None)}
        apart = jobs.apart(*(make().double().cpu() for make in runs.values()))
        times = common.in_turns(runs, rounds=3)
        peaks = {name: common.peak_bytes(make) / 1e9 for name, make in runs.items()}
    layers = whole.SHAPE["num_hidden_layers"]
    row = {f"{name}_ms": sorted(t)[1] for name, t in times.items()}
    row |= {"saved_gb": peaks["bool"] - peaks["added"], "saved_gb_predicted": layers * 2e-9 * rows * ROW**2}
    row |= {"saved_ms_predicted": layers * 9 * rows * ROW**2 / 3e9, "apart": apart}
    return row | {"ok": apart <= 0.05}  # gradients in bfloat16, with attention that may add in another order


def times() -> None:
    results = common.Results("new_times")
    model = functools.cache(lambda: whole.build().eval())

    def ran_ahead() -> dict[str, Any]:
        return jobs.running_ahead(model()) | {"times_faster_predicted": 1.1}

    for tokens, features in NORMS:
        name, bytes_us = f"norm {tokens} x {features}", 4 * tokens * features / 3e6
        results.attempt(name, lambda t=tokens, f=features, us=bytes_us: norms(t, f, us * 1.4))
    results.attempt("rows that share a prompt, by their mask", lambda: shared_rows(model()))
    results.attempt("passes launched ahead", ran_ahead)  # last: it takes a minute
    results.finish()


def main() -> None:
    if sys.argv[1:] == ["times"]:
        return times()
    results = common.Results("new")
    # Only these take turns in multiplying and copying.
    for name, values in FORMS.items() if takes_turns(torch.device("cuda:0")) else ():
        results.attempt(
            f"slabs: {name}",
            lambda v=values: correctness.slabs_by_turns(*SLAB, torch.bfloat16, "out", **v),
        )
    for name, values in OF_FOLDED.items() if takes_turns(torch.device("cuda:0")) else ():
        results.attempt(
            f"slabs folded to 256, into sums{name}",
            lambda v=values: correctness.slabs_by_turns(*FOLDED, torch.bfloat16, "sums", **v),
        )
    for case in EXPERTS:
        results.attempt(f"experts: {case}", lambda c=case: correctness.grouped(c, torch.bfloat16))
    # Tiles that are done again take their words from the mark: not beside those of `tiles_kernel`, whose are done again
    # by the same kernel.
    results.attempt(
        "log-probs of far targets", lambda: correctness.log_probs(1003, torch.bfloat16, None, 3.0)
    )
    for length in TILES:
        results.attempt(f"low scores of {length} tokens", lambda n=length: low_scores(n))
    for length in LENGTHS:
        results.attempt(f"masks of {length} tokens", lambda n=length: masks(n))
    for n in NORMED:
        results.attempt(f"norms of {n}", lambda n=n: normed(n))
    results.attempt("a bias of millions", wide_bias)
    results.attempt("streams", streams)
    for given in JOBS:  # last: they compile most
        results.attempt(f"passes launched ahead: {', '.join(given)}", lambda g=given: ahead(*g))
    results.finish()


if __name__ == "__main__":
    main()
