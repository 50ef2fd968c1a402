"""Random projections side by side: `cropi_kernels.project` and what people use today, in one run on the CPU.

    python -m benchmarks.bench_project                 # prints the tables, a few minutes
    python -m benchmarks.bench_project --size 1e7      # a smaller first table

First table: CountSketch of [B, P] against the machine's copy bandwidth (bytes read plus bytes written), and the memory
it takes beyond input and output. The others: every peer on the same inputs, with the rms error of the cosines of its
rows beside its time. Each peer's set-up (drawing its matrix or its tables) is outside its timed
region and shown apart, except where drawing is part of every call (TRAK, dattri). Peers that are not installed are
named and left out; `pip install dattri` is needed beside the extra `bench`, because it builds a MIDI library.

Times are medians of rounds in which all candidates alternate; shares are medians of per-round ratios.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import cropi_kernels
from benchmarks.lib.memory import peak, resident
from benchmarks.lib.script import options
from cropi_kernels import ProjectionSpec, project
from cropi_kernels.testing import countsketch_variance

Run = Callable[[torch.Tensor], Any]


def seconds(run: Run, x: torch.Tensor) -> float:
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


def peak_memory(run: Run, x: torch.Tensor) -> int:
    """Bytes of resident memory that a call needs at its peak beyond what was there."""
    before = resident()
    return max(0, peak(lambda: run(x)) - before)


# ------------------------------------------------------------------------------------------------- against the floor
def bandwidth_table(size: int, rounds: int) -> None:
    specs = [
        ProjectionSpec(4096),
        ProjectionSpec(32768),
        ProjectionSpec(32768, kind="sjlt", nnz=4),
        ProjectionSpec(32768, keep=0.1),
    ]
    table: list[dict[str, Any]] = []
    for rows in (1, 8):
        x, block = torch.empty(rows, size), torch.randn(1 << 20)
        for row in x:
            for begin in range(0, size, block.numel()):
                row[begin : begin + block.numel()] = block[: min(block.numel(), size - begin)]
        copy = torch.empty_like(x)
        runs: dict[str, Run] = {"copy": copy.copy_, "sum": torch.Tensor.sum}
        for spec in specs:
            name = f"{spec.kind} dim={spec.dim} nnz={spec.nnz} keep={spec.keep}"
            runs[name] = lambda x, spec=spec: project(x, spec)  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, run in runs.items():
                times[name].append(seconds(run, x))
        copied = times["copy"][1:]  # the first round touches fresh memory
        for name, run in runs.items():
            taken = times[name][1:]
            factor = 2 if name == "copy" else 1
            table.append({
                "P": size,
                "rows": rows,
                "what": name,
                "ms": 1e3 * statistics.median(taken),
                "GB/s": factor * x.numel() * 4 / statistics.median(taken) / 1e9,
                "share of copy bandwidth": statistics.median(
                    factor * c / (2 * t) for t, c in zip(taken, copied)
                ),
                "extra MB": peak_memory(run, x) / 1e6 if name not in ("copy", "sum") else 0.0,
            })  # fmt: skip
            show(table)
    print()


# -------------------------------------------------------------------------------------------------- against the peers
@dataclasses.dataclass
class Peer:
    """``make(size, dim, seed)`` is the set-up; what it returns is timed, on float32 rows [B, size]."""

    name: str
    make: Callable[[int, int, int], Run]
    largest: int  # entries size * dim that it can be asked for


def ours(kind: str, **fields: Any) -> Callable[[int, int, int], Run]:
    def make(size: int, dim: int, seed: int) -> Run:
        spec = ProjectionSpec(dim, kind=kind, seed=seed, **fields)  # type: ignore[arg-type]
        return lambda x: project(x, spec)

    return make


def sklearn_peer(name: str) -> Callable[[int, int, int], Run]:
    def make(size: int, dim: int, seed: int) -> Run:
        import sklearn.random_projection

        fitted = getattr(sklearn.random_projection, name)(dim, random_state=seed).fit(
            np.zeros((1, size), np.float32)
        )
        fitted.components_ = fitted.components_.astype(np.float32)  # our input's dtype, and its faster way
        return lambda x: fitted.transform(x.numpy())

    return make


def trak_peer(size: int, dim: int, seed: int) -> Run:
    from trak.projectors import BasicProjector

    projector = BasicProjector(size, dim, seed, "rademacher", "cpu")
    return lambda x: projector.project(x, 0) / dim**0.5


def dattri_peer(size: int, dim: int, seed: int) -> Run:
    from dattri.func.projection import random_project

    run = random_project(
        torch.zeros(8, size), 8, dim, 32, proj_seed=seed, proj_type="rademacher", device="cpu"
    )
    return lambda x: run(x)


def index_add_peer(size: int, dim: int, seed: int) -> Run:
    g = torch.Generator().manual_seed(seed)
    bucket = torch.randint(0, dim, (size,), generator=g)
    sign = torch.randint(0, 2, (size,), generator=g).float() * 2 - 1
    return lambda x: x.new_zeros(x.shape[0], dim).index_add_(1, bucket, x * sign)


def matmul_peer(size: int, dim: int, seed: int) -> Run:
    matrix = torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)) / dim**0.5
    return lambda x: x @ matrix


PEERS = [
    Peer("project countsketch", ours("countsketch"), 1 << 50),
    Peer("project sjlt nnz=4", ours("sjlt", nnz=4), 1 << 50),
    Peer("project rademacher", ours("rademacher"), 1 << 33),
    Peer("project gaussian", ours("gaussian"), 1 << 33),
    Peer("torch index_add_", index_add_peer, 1 << 50),
    Peer("torch dense matmul", matmul_peer, 1 << 28),
    Peer("sklearn SparseRandomProjection", sklearn_peer("SparseRandomProjection"), 1 << 36),
    Peer("sklearn GaussianRandomProjection", sklearn_peer("GaussianRandomProjection"), 1 << 28),
    Peer("TRAK BasicProjector", trak_peer, 1 << 31),
    Peer("dattri rademacher", dattri_peer, 1 << 31),
]


def outlier_rows(rows: int, size: int) -> torch.Tensor:
    """Gradients as language models have them: a common direction, and a few channels 30 times as large."""
    g = torch.Generator().manual_seed(0)
    scale = torch.exp(torch.randn(576, generator=g))
    scale[torch.randperm(576, generator=g)[:4]] *= 30
    common = 0.7 * torch.randn(size, generator=g)
    x = torch.stack([common + torch.randn(size, generator=g) for _ in range(rows)])
    return x.mul_(scale.repeat(size // 576 + 1)[:size])


def cosine_error(x: torch.Tensor, y: Any) -> float:
    """rms over pairs of rows of (estimated inner product - true) / (|x| |x'|)."""
    y = torch.as_tensor(np.asarray(y)).double()
    i, j = torch.triu_indices(len(x), len(x), 1)
    dots = torch.stack([(x[a].double() * x[b].double()).sum() for a, b in zip(i.tolist(), j.tolist())])
    norm = x.norm(dim=1, dtype=torch.float64)
    return float((((y @ y.T)[i, j] - dots) / (norm[i] * norm[j])).square().mean().sqrt())


@dataclasses.dataclass
class Race:
    """Peers on the same rows: what was timed, and all that their accuracy needs afterwards."""

    dim: int
    x: torch.Tensor
    runs: dict[str, Run]
    table: list[dict[str, Any]]


def time_peers(size: int, dim: int, rounds: int) -> Race:
    x = outlier_rows(8, size)
    runs: dict[str, Run] = {}
    table: list[dict[str, Any]] = []
    for peer in PEERS:
        if size * dim > peer.largest:
            print(f"{peer.name}: left out at P * dim = {size * dim:.1e}")
            continue
        try:
            start = time.perf_counter()
            runs[peer.name] = peer.make(size, dim, 0)
        except ImportError as error:
            print(f"{peer.name}: not installed ({error})")
            continue
        setup = time.perf_counter() - start
        first = seconds(runs[peer.name], x)
        table.append(
            {"P": size, "dim": dim, "what": peer.name, "set-up s": setup, "slow": first > 1, "times": [first]}
        )
    for _ in range(rounds):
        for row in table:
            if not row["slow"]:
                # The threads of the last peer still spin, and would share the cores with this one.
                time.sleep(0.05)
                row["times"].append(seconds(runs[row["what"]], x))
    fastest = 0.0
    for row in table:
        times = row.pop("times")
        row["ms"] = 1e3 * statistics.median(times if row["slow"] else times[1:])
        fastest = fastest or row["ms"]
        row["times countsketch"] = row["ms"] / fastest
    return Race(dim, x, runs, table)


def show_errors(race: Race, seeds: int) -> None:
    """Print the table with the rms error of the cosines, over several seeds where a call is fast."""
    makers, x = {peer.name: peer.make for peer in PEERS}, race.x
    for number, row in enumerate(race.table, 1):
        name = row["what"]
        row["seeds"] = 1 if row.pop("slow") else seeds
        errors = [
            cosine_error(x, (makers[name](x.shape[1], race.dim, s) if s else race.runs[name])(x))
            for s in range(row["seeds"])
        ]
        row["rms cosine error"] = float(np.sqrt(np.mean(np.square(errors))))
        show(race.table[:number])
    unit = torch.nn.functional.normalize(x, dim=1)
    bound = (
        np.mean([countsketch_variance(unit[a], unit[b], race.dim) for a in range(4) for b in range(a)]) ** 0.5
    )
    print(f"\nbound of an ideal CountSketch at dim={race.dim}: {bound:.4f}\n")


def show(table: list[dict[str, Any]]) -> None:
    """Print the last row of a table, before the first one its head."""
    if len(table) == 1:
        print(f"| {' | '.join(table[0])} |\n|{'---|' * len(table[0])}")
    cells = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in table[-1].values())
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument(
        "--size", type=float, default=1e8, help="P of the first table (default 1e8: 6.4 GB); 0: none"
    )
    parser.add_argument("--peer-size", type=float, default=2**18, help="P of the second table")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--large", type=float, default=1e7, help="P of a third table at dim=4096; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seeds", type=int, default=5, help="for the error of peers that take less than a second"
    )
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
    print(cropi_kernels.explain(torch.zeros(1)), "\n", flush=True)
    if args.size:
        bandwidth_table(int(args.size), args.rounds)
    for dim in args.dims:
        show_errors(time_peers(int(args.peer_size), dim, args.rounds), args.seeds)
    if args.large:
        show_errors(time_peers(int(args.large), 4096, args.rounds), 1)


if __name__ == "__main__":
    main()
