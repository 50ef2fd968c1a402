"""The table: every op in the shapes of a real model, beside what this machine can do at most.

Floors are measured in the same run: bytes go by the rate of a copy (bytes read and written), products by that of a
large matrix product in the same dtype. ``share`` is floor / time: 1 is as fast as the machine allows.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from cropi.checked import fits
from cropi.errors import CropiError
from cropi_kernels import (
    ProjectionSpec,
    SketchSpec,
    fold_inputs,
    linear_logprob,
    logprob_and_grad,
    norm_grad,
    plan_matrix,
    project,
    sketch_embedding,
    sketch_linear,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of SmolLM2-135M on a CPU, of a model of 1.5 billion parameters on a GPU.
SHAPES = {"cpu": (1024, 576, 1536, 49152), "cuda": (4096, 1536, 8960, 151936)}

# Of what `cropi bench --out` writes (cropi.form).
FORM = {
    "machine": {"processor": str},
    "versions": {str: str},
    "table": {
        "device": str,
        "dtype": str,
        "copy": float,
        "gemm": float,
        "rows": [
            {
                "op": str,
                "shape": str,
                "seconds": lambda value: fits(value, float) and value > 0,
                "floor": float,
                "plain": (None, float),
            }
        ],
    },
}

LEAST = 0.02  # seconds of one measurement: short calls are repeated


@dataclass(frozen=True)
class Row:
    """One op: ``seconds`` its median, ``floor`` the least that its bytes and products take here, ``plain`` torch's time
    for the same result (None where torch has no such call)."""

    op: str
    shape: str
    seconds: float
    floor: float
    plain: float | None = None

    @property
    def share(self) -> float:
        """floor / time."""
        return self.floor / self.seconds


@dataclass(frozen=True)
class Op:
    op: str
    shape: str
    call: Callable[[], Any]
    bytes: float = 0.0
    flops: float = 0.0
    plain: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Table:
    """``copy`` bytes a second (read and written), ``gemm`` floating-point operations a second."""

    device: str
    dtype: str
    copy: float
    gemm: float
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @staticmethod
    def of_dict(held: dict[str, Any]) -> Table:
        """What :meth:`to_dict` gave, of the form :data:`FORM`."""
        names = ("op", "shape", "seconds", "floor", "plain")
        rows = [Row(*(row[name] for name in names)) for row in held["rows"]]
        return Table(held["device"], held["dtype"], held["copy"], held["gemm"], rows)

    def lines(self, before: dict[str, Any] | None = None) -> list[str]:
        """As text; ``before`` is :meth:`to_dict` of an earlier table, whose times are compared."""
        earlier = {(row["op"], row["shape"]): row["seconds"] for row in (before or {}).get("rows", ())}
        head = f"{'op':<34} {'shape':<22} {'ms':>9} {'floor ms':>9} {'share':>6} {'torch ms':>9}"
        rates = f"copy {self.copy / 1e9:.1f} GB/s, matrix product {self.gemm / 1e9:.0f} GFLOP/s"
        lines = [
            f"{self.device}, {self.dtype}: {rates}",
            head + (f" {'before':>9} {'ratio':>6}" if earlier else ""),
        ]
        for row in self.rows:
            plain = "" if row.plain is None else f"{row.plain * 1e3:9.3f}"
            line = f"{row.op:<34} {row.shape:<22} {row.seconds * 1e3:9.3f} {row.floor * 1e3:9.3f}"
            line += f" {row.share:6.2f} {plain:>9}"
            if (old := earlier.get((row.op, row.shape))) is not None:
                line += f" {old * 1e3:9.3f} {row.seconds / old:6.2f}"
            lines.append(line.rstrip())
        return lines


def measure(
    device: str = "cpu",
    dtype: str = "float32",
    *,
    rounds: int = 7,
    on_row: Callable[[Table], object] = lambda table: None,
) -> Table:
    """Measure every op on a device.

    Args:
        device: "cpu", "cuda", "cuda:1", ...
        dtype: of the activations: "float32" or "bfloat16".
        rounds: medians are over so many; some seconds each on a CPU, and in bfloat16 minutes on one without
            instructions for it.
        on_row: called with the table as soon as the rates are known, and after every row.

    Raises:
        CropiError: no such device or dtype.
    """
    if dtype not in DTYPES:
        raise CropiError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    try:
        where = torch.device(device)
        torch.zeros(1, device=where, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        raise CropiError(f"device {device!r} cannot be used: {error}") from error
    kind = DTYPES[dtype]
    copy, gemm = _rates(where, kind, rounds)
    table = Table(str(where), dtype, copy, gemm, [])
    on_row(table)
    with torch.no_grad():
        for op in _ops(where, kind):
            calls = [op.call] if op.plain is None else [op.call, op.plain]
            times = medians(calls, where, rounds)
            floor = max(op.bytes / copy, op.flops / gemm)
            table.rows.append(Row(op.op, op.shape, times[0], floor, times[1] if op.plain else None))
            on_row(table)
    return table


def _rates(device: torch.device, dtype: torch.dtype, rounds: int) -> tuple[float, float]:
    """Bytes a second of a copy, read and written; operations a second of a large matrix product."""
    # On a CPU without instructions for bfloat16 a product of 2048 takes 18 s, and in float32 one of 1024 has its rate.
    size, side = (1 << 26, 1024) if device.type == "cpu" else (1 << 28, 8192)
    source = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a = torch.randn(side, side, device=device, dtype=torch.float32).to(dtype)
    copied, multiplied = medians([lambda: target.copy_(source), lambda: a @ a], device, rounds)
    return 2 * size / copied, 2 * side**3 / multiplied


def _ops(device: torch.device, dtype: torch.dtype) -> list[Op]:
    tokens, hidden, inner, vocabulary = SHAPES["cuda" if device.type == "cuda" else "cpu"]
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)

    one, spec = dtype.itemsize, SketchSpec()
    cuts = torch.tensor(
        [0, tokens // 7, tokens // 3, tokens // 3 + 1, 3 * tokens // 4, tokens], device=device
    )
    out = torch.zeros(len(cuts) - 1, spec.dim, device=device, dtype=torch.float32)
    d, x, h = randn(tokens, inner), randn(tokens, hidden), randn(tokens, hidden)
    folded = plan_matrix(spec, "model.layers.0.mlp.up_proj.weight", inner, hidden)
    whole = plan_matrix(SketchSpec(width=None), "model.layers.0.mlp.up_proj.weight", inner, hidden)
    tied = plan_matrix(spec, "model.embed_tokens.weight", vocabulary, hidden, "tied")
    inputs = fold_inputs(x, folded)
    rows = torch.randint(0, vocabulary, (tokens,), generator=generator, device="cpu").to(device)
    weight, targets = randn(vocabulary, hidden) * (3 / hidden**0.5), rows.clone()
    gradients = torch.randn(8, 1_000_000, generator=generator, dtype=torch.float32, device="cpu").to(device)
    projection = ProjectionSpec(4096)
    made = torch.empty(inner, hidden, dtype=dtype, device=device)
    shape, head = f"{tokens} x {inner} x {hidden}", f"{tokens} x {vocabulary}"
    return [
        Op("fold_inputs", f"{tokens} x {hidden}", lambda: fold_inputs(x, folded), bytes=tokens * (hidden * one + 256)),
        Op("sketch_linear, folded", shape, lambda: sketch_linear(d, inputs, cuts, folded, out),
           bytes=tokens * (inner * one + inputs.shape[1] * inputs.element_size()),
           flops=2.0 * tokens * inner * inputs.shape[1]),
        Op("sketch_linear, every coordinate", shape, lambda: sketch_linear(d, x, cuts, whole, out),
           flops=2.0 * tokens * inner * hidden, plain=lambda: torch.mm(d.T, x, out=made)),
        Op("sketch_embedding", f"{tokens} x {hidden}", lambda: sketch_embedding(x, rows, cuts, tied, out),
           bytes=tokens * hidden * one),
        Op("norm_grad", f"{tokens} x {hidden}", lambda: norm_grad(x, h, cuts, 1e-5, centered=False),
           bytes=2.0 * tokens * hidden * one),
        Op("linear_logprob", head, functools.partial(linear_logprob, h, weight, targets),
           flops=2.0 * tokens * hidden * vocabulary, plain=lambda: _plain_logprobs(h, weight, targets)),
        Op("logprob_and_grad", head, lambda: logprob_and_grad(h, weight, targets, lambda logp, start, stop: logp),
           flops=4.0 * tokens * hidden * vocabulary),
        Op("project, CountSketch to 4096", "8 x 1,000,000", lambda: project(gradients, projection),
           bytes=gradients.numel() * 4.0),
    ]  # fmt: skip


def _plain_logprobs(h: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax((h @ weight.T).float(), -1).gather(1, targets[:, None])


def once(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of a call, of ``repeats`` in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / repeats


def medians(calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int) -> list[float]:
    """The median seconds of each call, over rounds in which they take turns in a rotating order."""
    repeats = []
    for call in calls:
        once(call, device, 1)  # compiles, allocates
        repeats.append(max(1, min(1000, round(LEAST / max(once(call, device, 1), 1e-7)))))
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for i in range(len(calls)):
            place = (i + turn) % len(calls)
            times[place].append(once(calls[place], device, repeats[place]))
    return [median(values) for values in times]
