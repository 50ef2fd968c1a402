"""Log-probs and their gradient against the rate of one large product on the same device.

Products of one chunk of tokens would be a flattering baseline: they do not fill the device either.
"""

from __future__ import annotations

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

TOKENS = 8192


def head(model: str, with_sketch: bool, rate: float) -> dict[str, Any]:
    vocab, features = common.MODELS[model]["head"]
    hidden = torch.randn(TOKENS, features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, features, device="cuda", dtype=torch.bfloat16) / features**0.5
    target = torch.randint(0, vocab, (TOKENS,), device="cuda")
    offsets = common.ragged(TOKENS, 16).cuda()
    plan = plan_matrix(SketchSpec(), "lm_head.weight", vocab, features)
    out = torch.zeros(16, 32768, device="cuda")

    def sketch(begin: int, end: int, dz: torch.Tensor) -> None:
        sketch_linear(dz, fold_inputs(hidden[begin:end], plan), offsets.clamp(begin, end) - begin, plan, out)

    def both() -> None:
        logprob_and_grad(
            hidden,
            weight,
            target,
            lambda p, a, b: torch.ones_like(p),
            on_dlogits=sketch if with_sketch else None,
        )

    def forward() -> None:
        with torch.no_grad():
            linear_logprob(hidden, weight, target)

    forward_ms, both_ms = common.milliseconds(forward, repeats=5), common.milliseconds(both, repeats=5)
    flops = 2.0 * TOKENS * vocab * features
    row: dict[str, Any] = {
        "model": model,
        "sketch": with_sketch,
        "forward_ms": forward_ms,
        "both_ms": both_ms,
    }
    row |= {"forward_tflops": flops / forward_ms / 1e9, "both_tflops": 2 * flops / both_ms / 1e9}
    row |= {"gemm_ms": flops / rate * 1000, "forward_of_gemm": flops / rate * 1000 / forward_ms}
    row["both_of_gemm"] = 2 * flops / rate * 1000 / both_ms
    return row | {
        "forward_extra_gb": common.peak_bytes(forward) / 1e9,
        "both_extra_gb": common.peak_bytes(both) / 1e9,
    }


def main() -> None:
    results, rate = common.Results("logprob"), common.gemm_rate()
    results.add(name="gemm rate", tflops=rate / 1e12)
    for model in common.MODELS:
        for with_sketch in (False, True):
            name = f"{model}{' with the head' + chr(39) + 's sketch' if with_sketch else ''}"
            results.attempt(name, lambda m=model, s=with_sketch: head(m, s, rate))
    results.finish()


if __name__ == "__main__":
    main()
