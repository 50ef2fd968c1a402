"""Every op as other programs run it: on a stream of the caller's, inside a CUDA graph, on a GPU that is not current."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cropi_kernels import (
    SketchSpec,
    bias_grad,
    fold_inputs,
    linear_logprob,
    logprob_and_grad,
    norm_grad,
    plan_matrix,
    plan_vector,
    project,
    projection_of,
    sketch_embedding,
    sketch_linear,
    sketch_vector,
)

Results = tuple[torch.Tensor, ...]
TOKENS, FEATURES, ROWS, VOCAB, FLAT = 2000, 1536, 8960, 5003, 100_003


def calls(device: str) -> dict[str, Callable[[], Results]]:
    """One call of every op with the same operands on any device; each returns new tensors."""
    g = torch.Generator().manual_seed(0)
    d, a = (torch.randn(TOKENS, n, generator=g).bfloat16().to(device) for n in (ROWS, FEATURES))
    head = (torch.randn(VOCAB, FEATURES, generator=g) / FEATURES**0.5).bfloat16().to(device)
    ids = torch.randint(0, VOCAB, (TOKENS,), generator=g).to(device)
    offsets = torch.tensor([0, TOKENS // 3, TOKENS // 3, TOKENS]).to(device)
    scale = torch.randn(3, FEATURES, generator=g).to(device)
    flat = torch.randn(FLAT, generator=g).to(device)
    folded = plan_matrix(SketchSpec(), "a.mlp.up_proj.weight", ROWS, FEATURES)
    whole = plan_matrix(SketchSpec(width=None), "a.mlp.down_proj.weight", FEATURES, FEATURES)
    table = plan_matrix(SketchSpec(vocab_width=1024), "embed.weight", VOCAB, FEATURES, "tied")
    vector = plan_vector(SketchSpec(), "a.norm.weight", FEATURES)
    hashed = projection_of(SketchSpec(kind="countsketch"), "w")

    def out(*shape: int) -> torch.Tensor:
        return torch.zeros(shape or (3, 32768), device=device)

    def both() -> Results:
        weight, bias = norm_grad(a, a, offsets, 1e-6, centered=True, with_bias=True)
        assert bias is not None
        return weight, bias

    def entropies() -> Results:
        got = linear_logprob(a, head, ids, return_entropy=True, chunk_size=512)
        assert isinstance(got, tuple)
        return got

    return {
        "fold_inputs": lambda: (fold_inputs(a, folded),),
        "sketch_linear, folded": lambda: (sketch_linear(d, a, offsets, folded, out()),),
        "sketch_linear, no fold": lambda: (sketch_linear(a, a, offsets, whole, out()),),
        "sketch_embedding": lambda: (sketch_embedding(a, ids, offsets, table, out()),),
        "sketch_vector": lambda: (sketch_vector(scale, vector, out()),),
        "norm_grad": both,
        "bias_grad": lambda: (bias_grad(d, offsets),),
        "project": lambda: (project(flat[None], hashed, 5, out=out(32768)[None], nonfinite="ignore"),),
        "linear_logprob": entropies,
        "logprob_and_grad": lambda: logprob_and_grad(a, head, ids, lambda p, i, j: p.exp(), chunk_size=512),
    }


def same(a: Results, b: Results) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(a, b, strict=True))


def on_a_stream(call: Callable[[], Results]) -> Results:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = call()
    torch.cuda.current_stream().wait_stream(stream)
    return got


def in_a_graph(call: Callable[[], Results]) -> Results:
    """What a replay computes; what the capture left behind is overwritten first."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call()
    for tensor in got:
        tensor.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    return got


def check(name: str) -> dict[str, Any]:
    """The same bits everywhere."""
    call = calls("cuda:0")[name]
    eager = call()
    row = {"stream": same(on_a_stream(call), eager), "graph": same(in_a_graph(call), eager)}
    devices = torch.cuda.device_count()
    if devices > 1:  # cuda:0 stays current
        row["second_device"] = same(calls("cuda:1")[name](), eager)
    return row | {"devices": devices, "ok": all(row.values())}


def refused_in_a_graph() -> dict[str, Any]:
    """Offsets on the host would have to be copied: said in words, before the capture breaks."""
    plan = plan_matrix(SketchSpec(), "a.b.weight", 64, 64)
    d, out = torch.zeros(4, 64, device="cuda"), torch.zeros(1, 32768, device="cuda")
    sketch_linear(d, d, torch.tensor([0, 4]), plan, out)
    message = ""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        out.zero_()
        try:
            sketch_linear(d, d, torch.tensor([0, 4]), plan, out)
        except RuntimeError as error:
            message = str(error)
    return {"message": message[:90], "ok": "a CUDA graph cannot record the copy" in message}
