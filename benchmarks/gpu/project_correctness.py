"""`project` on the GPU against the CPU kernels: every cut, every dtype, both backends; repeatability; beyond 2^32.

``--small`` runs a short list once, for compute-sanitizer.
"""

from __future__ import annotations

import sys
from typing import Any

import common
import torch

from cropi_kernels import ProjectionSpec, _cuda, project, project_transpose
from cropi_kernels.testing import PROJECTION_CASES, projection_magnitudes, sum_error_bound

S = ProjectionSpec
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = ("odd offset", "pieces of a tile", "keep", "sjlt, groups of four", "rademacher", "gaussian")


def backends(spec: ProjectionSpec) -> list[str]:
    built = _cuda.unsupported(torch.zeros(1, device="cuda")) is None
    return (["cuda"] if built else []) + (["triton"] if spec.sparse else [])


def within(got: torch.Tensor, x: torch.Tensor, spec: ProjectionSpec, offset: int) -> dict[str, Any]:
    terms = 2 * (x.shape[1] * (spec.nnz if spec.sparse else spec.dim) // spec.dim + 300)
    bound = 2 * sum_error_bound(projection_magnitudes(x, spec, offset), terms) + 1e-30
    error = (got.cpu().double() - project(x.cpu(), spec, offset).double()).abs()
    return {
        "error": float(error.max()),
        "of_bound": float((error / bound).max()),
        "ok": bool((error <= bound).all()),
    }


def case(name: str, dtype: torch.dtype, backend: str) -> dict[str, Any]:
    spec, n, offset = PROJECTION_CASES[name]
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    on_device = x.cuda()
    got = project(on_device, spec, offset, backend=backend)
    row = within(got, x, spec, offset)
    repeatable = torch.equal(got, project(on_device, spec, offset, backend=backend))
    alone = torch.equal(got[1:2], project(on_device[1:2], spec, offset, backend=backend))
    one = torch.zeros(3, n)
    one[torch.arange(3), torch.tensor([0, n // 2, n - 1])] = 1.0
    exact = spec.kind == "gaussian" or torch.equal(
        project(one.cuda(), spec, offset, backend=backend).cpu(), project(one, spec, offset)
    )
    y = torch.randn(3, spec.dim, generator=torch.Generator().manual_seed(1))
    back = project_transpose(y.cuda(), spec, n, offset, backend=backend).cpu()
    want = project_transpose(y, spec, n, offset)
    size = y.double().norm(1, dim=1, keepdim=True) * spec.scale * (6 if spec.kind == "gaussian" else 1)
    adjoint = bool(((back - want).abs() <= 2 * sum_error_bound(size, 2 * spec.dim + 16)).all())
    row["ok"] &= repeatable and alone and exact and adjoint
    return row | {"repeatable": repeatable, "alone": alone, "integers": exact, "adjoint": adjoint}


def strided_and_chunks(backend: str) -> dict[str, Any]:
    spec, big = S(512), torch.randn(6, 50_000, generator=torch.Generator().manual_seed(2)).bfloat16()
    device, same = big.cuda(), []
    for first in (104, 103):  # 16-byte loads, and single ones
        view = device[::2, first : first + 40_000]
        got = project(view, spec, first, backend=backend)
        same.append(torch.equal(got, project(view.contiguous(), spec, first, backend=backend)))
    out = torch.zeros(6, 512, device="cuda")
    for begin, end in ((40_961, 50_000), (0, 1001), (1001, 40_961)):
        project(device[:, begin:end], spec, 50 + begin, out=out, backend=backend)
    row = within(out, big, spec, 50)
    return row | {"strided": same, "ok": row["ok"] and all(same)}


def streams_and_graphs(backend: str) -> dict[str, Any]:
    spec, x = S(4096), torch.randn(2, 3_000_000, device="cuda").bfloat16()
    out = torch.zeros(2, 4096, device="cuda")
    first = project(x, spec, nonfinite="ignore", backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = project(x, spec, nonfinite="ignore", backend=backend)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(project(x, spec, nonfinite="ignore", backend=backend))
    out.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    same = torch.equal(first, other), torch.equal(first, out)
    return {"stream": same[0], "graph": same[1], "ok": all(same)}


def beyond_2_32(backend: str, spec: ProjectionSpec) -> dict[str, Any]:
    """Three rows of 1.5e9 bfloat16: mostly zeros, so that a short run of the row must give the same sums."""
    n, tail = 1_500_000_000, 200_000
    x = torch.zeros(3, n, dtype=torch.bfloat16, device="cuda")
    x[:, n - tail :] = torch.randn(3, tail, device="cuda")
    x[0, :100] = 1.0  # must not reach the others
    offset = 16 if spec.nnz == 1 else 11  # 16-byte loads, and single ones
    got = project(x, spec, offset, backend=backend)
    row = within(got[1:], x[1:, n - tail :], spec, offset + n - tail)
    return row | {"elements": x.numel()}


def main() -> None:
    small = "--small" in sys.argv
    results = common.Results("sanitizer_project_" + sys.argv[-1] if small else "project_correctness")
    torch.cuda.init()
    if backends(S(16)) == ["triton"]:
        results.add(name="cuda", note=f"not run: {_cuda.unsupported(torch.zeros(1, device='cuda'))}")
    for name in SMALL if small else PROJECTION_CASES:
        for backend in backends(PROJECTION_CASES[name][0]):
            for label, dtype in DTYPES.items():
                if not small or label == "bf16":
                    results.attempt(
                        f"{name} {label} {backend}", lambda c=name, t=dtype, b=backend: case(c, t, b)
                    )
    for backend in [] if small else backends(S(16)):
        results.attempt(f"strided rows, chunks {backend}", lambda b=backend: strided_and_chunks(b))
        results.attempt(f"streams and graphs {backend}", lambda b=backend: streams_and_graphs(b))
        for spec in (S(4096), S(32768, kind="sjlt", nnz=4)):
            name = f"4.5e9 elements {spec.kind} {backend}"
            results.attempt(name, lambda b=backend, s=spec: beyond_2_32(b, s))
    results.finish()


if __name__ == "__main__":
    main()
