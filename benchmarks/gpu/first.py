"""The first look at a GPU: what the device reaches, whether the kernels are right at a real model's shapes, and whether
their bits repeat."""

from __future__ import annotations

from typing import Any

import common
import correctness
import fused
import taps
import torch

from cropi_kernels import SketchSpec, fold_inputs, plan_matrix, sketch_linear

REPEATS = 500
REPEATED_TOKENS = 4096
# (name, width of the fold, rows, columns): each compiles to a kernel of its own.
SLABS = (
    ("gate_proj", 64, 8960, 1536),
    ("gate_proj", 128, 8960, 1536),
    ("gate_proj", 256, 8960, 1536),
    ("down_proj", None, 1536, 8960),
)
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


def main() -> None:
    results = common.Results("first")
    results.attempt("rates", rates)
    correctness.CASES.update(REAL)
    half = torch.bfloat16
    for case in REAL:
        results.attempt(f"sketch_linear {case}", lambda c=case: correctness.linear(c, half))
    results.attempt("a layer by the engine", taps.check)
    fused.rows(results)
    results.attempt("sketch_embedding", lambda: correctness.embedding("tied", half, VOCAB, HIDDEN))
    results.attempt("norm_grad, bias_grad, sketch_vector", lambda: correctness.norms(HIDDEN, False, half))
    results.attempt("log-probs", lambda: correctness.log_probs(VOCAB, half, None))
    for name, width, rows, cols in SLABS:
        results.attempt(
            f"bits of {name} w={width}", lambda w=width, r=rows, c=cols, n=name: repeats(w, r, c, n)
        )
    results.finish()


if __name__ == "__main__":
    main()
