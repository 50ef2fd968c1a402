"""What every op costs, and a whole step: measured by pytest-benchmark.

    pytest benchmarks --benchmark-only                                   # a few minutes; -k project for some
    pytest benchmarks --benchmark-only --benchmark-json new.json         # all figures, with machine and commit
    pytest benchmarks --benchmark-only --benchmark-save=before           # and, on another commit,
    pytest benchmarks --benchmark-only --benchmark-compare='*_before' --benchmark-compare-fail=median:10%

``python -m benchmarks.bench_ops`` and ``make bench`` are the first of them. Shapes are those of a forward pass of
SmolLM2-135M over 1024 tokens in 5 ragged segments. Beside the ops stands plain torch that does the same work, or reads
the same memory. The floor of the folded sketch is one read of D and A, that of the unfolded one the products of the
weight gradient.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cropi_kernels import (
    CsrRows,
    GradientSketcher,
    ProjectionSpec,
    SketchSpec,
    bias_grad,
    fold_inputs,
    fold_outputs,
    linear_logprob,
    logprob_and_grad,
    norm_grad,
    plan_matrix,
    plan_vector,
    project,
    project_csr,
    project_csr_sparse,
    project_transpose,
    projection_of,
    quantize_rows,
    reduce_sketch,
    rms_norm,
    rms_norm_backward,
    row_products,
    sketch_embedding,
    sketch_grouped,
    sketch_linear,
    sketch_vector,
    swiglu,
    swiglu_backward,
)

TOKENS, SEGMENTS = 1024, 5
CUTS = torch.tensor([0, 137, 400, 401, 790, TOKENS])
HIDDEN, INNER, VOCAB, LAYERS, HEADS, KV_HEADS = 576, 1536, 49152, 30, 9, 3  # of SmolLM2-135M
KV = HIDDEN // HEADS * KV_HEADS
SHAPES = [(HIDDEN, HIDDEN), (KV, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]  # rows, columns of its matrices
EXPERTS = 8

Bench = Callable[..., Any]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def sketches(n: int = SEGMENTS) -> torch.Tensor:
    return torch.zeros(n, SketchSpec().dim)


def group(benchmark: Bench, name: str) -> None:
    benchmark.group = name  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------- matrices
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("width", [64, 128, None], ids=lambda w: f"width={w or 'full'}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sketch_linear(
    benchmark: Bench, shape: tuple[int, int], width: int | None, dtype: torch.dtype
) -> None:
    group(benchmark, f"weight gradient {shape}")
    d, a = randn(TOKENS, shape[0], dtype=dtype), randn(TOKENS, shape[1], seed=1, dtype=dtype)
    plan = plan_matrix(SketchSpec(width=width), "model.layers.0.mlp.up_proj.weight", *shape)
    benchmark(sketch_linear, d, fold_inputs(a, plan), CUTS, plan, sketches())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_weight_gradient(benchmark: Bench, shape: tuple[int, int]) -> None:
    group(benchmark, f"weight gradient {shape}")
    d, a, out = randn(TOKENS, shape[0]), randn(TOKENS, shape[1], seed=1), torch.empty(*shape)

    def products() -> None:
        for begin, end in itertools.pairwise(CUTS.tolist()):
            torch.mm(d[begin:end].T, a[begin:end], out=out)

    benchmark(products)


def test_sketch_grouped(benchmark: Bench) -> None:
    """Two of eight experts a token."""
    group(benchmark, "experts")
    n = 2 * TOKENS
    cuts = torch.linspace(0, n, EXPERTS * SEGMENTS + 1).long()
    plan = plan_matrix(SketchSpec(), "model.layers.0.mlp.experts.gate_up_proj", EXPERTS * INNER, HIDDEN)
    folded = fold_inputs(randn(n, HIDDEN, seed=1), plan)
    benchmark(sketch_grouped, randn(n, INNER), folded, cuts, plan, sketches())


@pytest.mark.parametrize("width", [64, 128])
def test_fold_inputs(benchmark: Bench, width: int) -> None:
    group(benchmark, "read the inputs once")
    a = randn(TOKENS, INNER)
    benchmark(fold_inputs, a, plan_matrix(SketchSpec(width=width), "a.b.c.weight", HIDDEN, INNER))


def test_copy(benchmark: Bench) -> None:
    group(benchmark, "read the inputs once")
    a = randn(TOKENS, INNER)
    benchmark(torch.empty_like(a).copy_, a)


def test_fold_outputs(benchmark: Bench) -> None:
    group(benchmark, "tied head")
    plan = plan_matrix(SketchSpec(), "model.embed_tokens.weight", VOCAB, HIDDEN, "tied")
    benchmark(fold_outputs, randn(128, VOCAB), plan)


def test_sketch_embedding(benchmark: Bench) -> None:
    group(benchmark, "tied head")
    rows = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
    plan = plan_matrix(SketchSpec(), "model.embed_tokens.weight", VOCAB, HIDDEN, "tied")
    benchmark(sketch_embedding, randn(TOKENS, HIDDEN), rows, CUTS, plan, sketches())


# -------------------------------------------------------------------------------------------------------- vectors
def test_norm_grad(benchmark: Bench) -> None:
    group(benchmark, "vectors")
    benchmark(norm_grad, randn(TOKENS, HIDDEN), randn(TOKENS, HIDDEN, seed=1), CUTS, 1e-5, centered=False)


def test_bias_grad(benchmark: Bench) -> None:
    group(benchmark, "vectors")
    benchmark(bias_grad, randn(TOKENS, INNER), CUTS)


def test_rms_norm(benchmark: Bench) -> None:
    group(benchmark, "norms")
    benchmark(rms_norm, randn(TOKENS, HIDDEN), randn(HIDDEN), 1e-5)


def test_rms_norm_backward(benchmark: Bench) -> None:
    group(benchmark, "norms")
    x, weight = randn(TOKENS, HIDDEN), randn(HIDDEN)
    scale = rms_norm(x, weight, 1e-5)[1]
    benchmark(rms_norm_backward, randn(TOKENS, HIDDEN, seed=1), x, weight, scale, CUTS)


def test_plain_rms_norm(benchmark: Bench) -> None:
    """Forward and backward by autograd, without the scale's gradient."""
    group(benchmark, "norms")
    x, weight, dy = randn(TOKENS, HIDDEN).requires_grad_(), randn(HIDDEN), randn(TOKENS, HIDDEN, seed=1)

    def both() -> None:
        y = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
        torch.autograd.grad(y, x, dy)

    benchmark(both)


def test_swiglu(benchmark: Bench) -> None:
    group(benchmark, "gated products")
    benchmark(swiglu, randn(TOKENS, INNER), randn(TOKENS, INNER, seed=1))


def test_swiglu_backward(benchmark: Bench) -> None:
    group(benchmark, "gated products")
    benchmark(swiglu_backward, *(randn(TOKENS, INNER, seed=seed) for seed in range(3)))


def test_plain_swiglu(benchmark: Bench) -> None:
    """Forward and backward by autograd."""
    group(benchmark, "gated products")
    gate, up, dh = (randn(TOKENS, INNER, seed=seed).requires_grad_(seed < 2) for seed in range(3))

    def both() -> None:
        torch.autograd.grad(torch.nn.functional.silu(gate) * up, (gate, up), dh)

    benchmark(both)


def test_sketch_vector(benchmark: Bench) -> None:
    group(benchmark, "vectors")
    plan = plan_vector(SketchSpec(), "model.norm.weight", HIDDEN)
    benchmark(sketch_vector, randn(SEGMENTS, HIDDEN), plan, sketches())


def test_reduce_sketch(benchmark: Bench) -> None:
    group(benchmark, "sketches")
    benchmark(reduce_sketch, randn(64, 32768), 4096)


def test_countsketch(benchmark: Bench) -> None:
    group(benchmark, "a gradient that exists")
    spec = projection_of(SketchSpec(kind="countsketch"), "a.weight")
    benchmark(project, randn(1, INNER * HIDDEN), spec, out=torch.zeros(1, spec.dim))


# ------------------------------------------------------------------------------------------------------ log-probs
@functools.cache
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1))
    return randn(TOKENS, HIDDEN), randn(VOCAB, HIDDEN, seed=1) * (3 / HIDDEN**0.5), targets


def few(benchmark: Bench, run: Callable[..., Any], *args: Any) -> None:
    """For calls of a good part of a second."""
    benchmark.pedantic(run, args=args, rounds=5, warmup_rounds=1)  # type: ignore[attr-defined]


@torch.no_grad()
def test_linear_logprob(benchmark: Bench) -> None:
    group(benchmark, "log-probs")
    few(benchmark, linear_logprob, *head())


def test_logprob_and_grad(benchmark: Bench) -> None:
    group(benchmark, "log-probs")
    few(benchmark, lambda h, w, t: logprob_and_grad(h, w, t, lambda logp, start, stop: logp), *head())


@torch.no_grad()
def test_plain_logprobs(benchmark: Bench) -> None:
    group(benchmark, "log-probs")

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])

    few(benchmark, plain, *head())


# -------------------------------------------------------------------------------------------------------- project
@functools.cache
def gradients() -> torch.Tensor:
    return randn(8, 1_000_000)


@pytest.mark.parametrize(
    "spec",
    [
        ProjectionSpec(4096),
        ProjectionSpec(1000),
        ProjectionSpec(4096, keep=0.1),
        ProjectionSpec(4096, kind="sjlt", nnz=4),
        ProjectionSpec(64, kind="rademacher"),
        ProjectionSpec(64, kind="gaussian"),
    ],
    ids=lambda s: f"{s.kind}-{s.dim}" + (f"-keep={s.keep}" if s.keep < 1 else ""),
)
def test_project(benchmark: Bench, spec: ProjectionSpec) -> None:
    group(benchmark, "8 rows of 1,000,000")
    benchmark(project, gradients(), spec)


def test_read_the_rows(benchmark: Bench) -> None:
    group(benchmark, "8 rows of 1,000,000")
    benchmark(torch.sum, gradients())


def test_project_transpose(benchmark: Bench) -> None:
    group(benchmark, "8 rows of 1,000,000")
    benchmark(project_transpose, randn(8, 4096), ProjectionSpec(4096), 1_000_000)


@functools.cache
def text() -> CsrRows:
    g, per_row = np.random.default_rng(0), 100
    columns = torch.from_numpy(g.integers(0, 100_000, 2000 * per_row).astype(np.int32))
    return CsrRows(
        torch.arange(0, len(columns) + 1, per_row, dtype=torch.int32), columns, randn(len(columns)), 100_000
    )


@pytest.mark.parametrize("run", [project_csr, project_csr_sparse], ids=lambda f: f.__name__)
def test_project_csr(benchmark: Bench, run: Callable[..., Any]) -> None:
    group(benchmark, "2000 rows of 100 in 100,000")
    benchmark(run, text(), ProjectionSpec(1000))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16], ids=str)
def test_quantize_rows(benchmark: Bench, dtype: torch.dtype) -> None:
    group(benchmark, "sketches")
    benchmark(quantize_rows, randn(64, 32768), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_row_products(benchmark: Bench, dtype: torch.dtype) -> None:
    group(benchmark, "512 sketches of 4096 with 8 directions")
    benchmark(row_products, randn(512, 4096, dtype=dtype), randn(8, 4096))


def test_plain_row_products(benchmark: Bench) -> None:
    group(benchmark, "512 sketches of 4096 with 8 directions")
    rows, directions = randn(512, 4096), randn(8, 4096)
    benchmark(lambda: rows @ directions.T)


# ------------------------------------------------------------------------------------------------------ whole step
@functools.cache
def model() -> Any:
    """SmolLM2-135M's shapes with drawn weights: what a step costs does not depend on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, vocab_size=VOCAB, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
        max_position_embeddings=2048, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


ROWS, LENGTH = 4, 256


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    return dict(input_ids=ids, segments=torch.arange(ROWS)[:, None].expand(-1, LENGTH))


def test_step_with_sketch(benchmark: Bench) -> None:
    group(benchmark, f"step of {ROWS} x {LENGTH} tokens")
    inputs, at = batch(), torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[:, :-1].reshape(-1)
    targets = inputs["input_ids"][:, 1:].reshape(-1)
    sketcher = GradientSketcher(model(), SketchSpec())

    def step() -> None:
        with sketcher:
            sketcher.policy_gradient(
                **inputs, positions=at, targets=targets, weigh=lambda logp, start, stop: torch.ones_like(logp)
            )

    few(benchmark, step)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen weights", "weight gradients"])
def test_step_of_plain_torch(benchmark: Bench, trained: bool) -> None:
    group(benchmark, f"step of {ROWS} x {LENGTH} tokens")
    ids, net = batch()["input_ids"], model()

    def step() -> None:
        net.requires_grad_(trained).zero_grad(set_to_none=True)
        embedded = net.get_input_embeddings()(ids)
        embedded = embedded if trained else embedded.requires_grad_(True)
        logp = torch.log_softmax(net(inputs_embeds=embedded).logits[:, :-1], -1)
        logp.gather(2, ids[:, 1:, None]).sum().backward()

    few(benchmark, step)
    net.requires_grad_(True).zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, "--benchmark-only", *sys.argv[1:]]))
