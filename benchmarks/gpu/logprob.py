"""Log-probs and their gradient against the rate of one large product in turns with them, and against peers.

Products of one chunk of tokens would be a flattering baseline: they do not fill the device either. Peers, where they
are installed: Liger's fused linear cross-entropy, and cut-cross-entropy.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import Any

import common
import torch

from cropi_kernels import (
    SketchSpec,
    fold_inputs,
    linear_logprob,
    logprob_and_grad,
    plan_matrix,
    sketch_linear,
)
from cropi_kernels.ops.linear_logprob.api import logprob_and_grad_of
from cropi_kernels.ops.linear_logprob.contract import Dlogits

TOKENS, COMPARED = 8192, 64  # of a run; whose gradient a float64 product checks


def head(model: str, with_sketch: bool, large: Callable[[], Any]) -> dict[str, Any]:
    vocab, features = common.MODELS[model]["head"]
    hidden = torch.randn(TOKENS, features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, features, device="cuda", dtype=torch.bfloat16) / features**0.5
    target = torch.randint(0, vocab, (TOKENS,), device="cuda")
    offsets = common.ragged(TOKENS, 16).cuda()
    plan = plan_matrix(SketchSpec(), "lm_head.weight", vocab, features)
    out = torch.zeros(16, 32768, device="cuda")

    def sketch(begin: int, end: int, gradient: Dlogits) -> None:  # as a pass of the sketcher does it
        inputs = fold_inputs(hidden[begin:end], plan)
        if gradient.factor is not None:
            inputs = (inputs * gradient.factor[:, None]).to(inputs.dtype)
        sketch_linear(gradient.dz, inputs, offsets.clamp(begin, end) - begin, plan, out)

    def both() -> None:
        logprob_and_grad_of(
            hidden,
            weight,
            target,
            lambda p, a, b: torch.ones_like(p),
            on_gradient=sketch if with_sketch else None,
        )

    def forward() -> None:
        with torch.no_grad():
            linear_logprob(hidden, weight, target)

    # In turns with a large product, and with the plain product of the same shape.
    runs = {"large": large, "same": lambda: torch.mm(hidden, weight.t()), "forward": forward, "both": both}
    times = common.in_turns(runs)
    ms = {name: statistics.median(t) for name, t in times.items()}
    flops = 2.0 * TOKENS * vocab * features
    row: dict[str, Any] = {"model": model, "sketch": with_sketch}
    row |= {"forward_ms": ms["forward"], "both_ms": ms["both"], "same_product_ms": ms["same"]}
    row |= {"forward_tflops": flops / ms["forward"] / 1e9, "both_tflops": 2 * flops / ms["both"] / 1e9}
    row["large_product_tflops"] = common.GEMM_FLOPS / ms["large"] / 1e9
    row["forward_of_large"] = common.share(times["forward"], times["large"], flops / common.GEMM_FLOPS)
    row["both_of_large"] = common.share(times["both"], times["large"], 2 * flops / common.GEMM_FLOPS)
    row["forward_of_same"] = common.share(times["forward"], times["same"])
    return row | {
        "forward_extra_gb": common.peak_bytes(forward) / 1e9,
        "both_extra_gb": common.peak_bytes(both) / 1e9,
    }


def torch_loss() -> Callable[..., torch.Tensor]:
    return lambda hidden, weight, target: torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(hidden, weight).float(), target, reduction="sum"
    )


def liger_loss() -> Callable[..., torch.Tensor]:
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    loss = module.LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, target: loss(weight, hidden, target)


def cut_loss() -> Callable[..., torch.Tensor]:
    loss = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, target: loss(hidden, weight, target, reduction="sum")


PEERS = {"torch": torch_loss, "liger-kernel": liger_loss, "cut-cross-entropy": cut_loss}


def peer(model: str, name: str) -> dict[str, Any]:
    """Forward and gradient to hidden under a frozen head, in bfloat16: time, memory, error of 64 gradients."""
    try:
        loss = PEERS[name]()
    except ImportError as missing:
        return {"model": model, "peer": name, "note": f"not installed ({missing.name})"}
    vocab, features = common.MODELS[model]["head"]
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(TOKENS, features, device="cuda", generator=g).bfloat16()
    weight = torch.randn(vocab, features, device="cuda", generator=g).bfloat16() / features**0.5
    target = torch.randint(0, vocab, (TOKENS,), device="cuda", generator=g)
    leaf = hidden.clone().requires_grad_(True)

    def ours() -> torch.Tensor:
        return logprob_and_grad(hidden, weight, target, lambda p, a, b: torch.ones_like(p))[1]

    def theirs() -> torch.Tensor:
        leaf.grad = None
        loss(leaf, weight, target).backward()
        assert leaf.grad is not None
        return -leaf.grad

    some, head_weight = hidden[:COMPARED].double(), weight.double()
    p = torch.softmax(some @ head_weight.t(), 1)
    p[torch.arange(len(some)), target[:COMPARED]] -= 1
    exact = -(p @ head_weight)
    del p, head_weight

    def error(got: torch.Tensor) -> float:
        return float((got[:COMPARED].double() - exact).norm() / exact.norm())

    row: dict[str, Any] = {"model": model, "peer": name}
    row |= {"gradient_error": error(ours()), "peer_gradient_error": error(theirs())}
    times = common.in_turns({"ours": ours, "theirs": theirs}, rounds=5)
    row |= {"both_ms": statistics.median(times["ours"]), "peer_ms": statistics.median(times["theirs"])}
    row["times_faster"] = common.share(times["ours"], times["theirs"])
    return row | {
        "both_extra_gb": common.peak_bytes(ours) / 1e9,
        "peer_extra_gb": common.peak_bytes(theirs) / 1e9,
    }


def main() -> None:
    results, large = common.Results("logprob"), common.large_product()
    for model in common.MODELS:
        for with_sketch in (False, True):
            name = f"{model}{' with the head' + chr(39) + 's sketch' if with_sketch else ''}"
            results.attempt(name, lambda m=model, s=with_sketch: head(m, s, large))
    for model in common.MODELS:  # afterwards: two of them compile for ten seconds
        for other in PEERS:
            results.attempt(f"{model} beside {other}", lambda m=model, o=other: peer(m, o))
    results.finish()


if __name__ == "__main__":
    main()
