"""Compiles what the timed parts launch, in several processes: a kernel takes the compiler a second or two, and a part
that compiles its own spends most of its time on that.

What one process compiles, all others find in Triton's cache. Shapes are the parts' own where a kernel depends on them
(dtypes, the width of the fold, the width of a norm); tokens are few, since no kernel depends on their number.
"""

from __future__ import annotations

from typing import Any

import common
import first
import fused
import model as whole
import sketch
import taps
import torch

from cropi_kernels import GradientSketcher, SketchSpec, linear_logprob, logprob_and_grad

TOKENS = 64


def one_pass(width: int, fused: bool = False) -> dict[str, Any]:
    """A layer of the whole model, with its embedding and head."""
    model, data = whole.build(), whole.batch(1, TOKENS)
    whole.plain_step(model, data)
    with GradientSketcher(model, SketchSpec(width=width), verify=False, fused=fused) as sketcher:
        sketcher.policy_gradient(**data, weigh=lambda logp, start, stop: torch.ones_like(logp))
    return {}


def maps(width: int | None) -> dict[str, Any]:
    """The ops of `sketch`, alone."""
    for name in common.MODELS:
        sketch.layer(name, 2, width, 1e12)
    return {}


def head() -> dict[str, Any]:
    for vocab, features in {made["head"] for made in common.MODELS.values()}:
        hidden, weight = (torch.randn(n, features, device="cuda").bfloat16() for n in (TOKENS, vocab))
        target = torch.zeros(TOKENS, dtype=torch.int64, device="cuda")
        linear_logprob(hidden, weight, target)
        logprob_and_grad(hidden, weight, target, lambda p, a, b: torch.ones_like(p))
    return {}


def main() -> None:
    results = common.Results("warm")
    whole.SHAPE = whole.SHAPE | {"num_hidden_layers": 1}
    sketch.TOKENS = TOKENS
    for width in whole.WIDTHS:
        results.attempt(f"pass, width {width}", lambda w=width: one_pass(w))
    results.attempt("pass, fused", lambda: one_pass(whole.WIDTHS[0], True))
    fused.TOKENS = TOKENS
    fused.rows(results)
    for width in (64, 128, 256, None):
        results.attempt(f"maps, width {width}", lambda w=width: maps(w))
    results.attempt("log-probs", head)
    results.attempt("taps", taps.check)
    results.attempt("rows of an embedding", lambda: first.correctness.embedding("tied", torch.bfloat16))
    results.finish()


if __name__ == "__main__":
    main()
