"""`cropi.sklearn.RandomProjection` beside scikit-learn's `SparseRandomProjection`: ``transform`` of rows.

    python -m benchmarks.bench_sklearn             # a minute; writes benchmarks/results/sklearn.md

Sparse shapes are those of text: many columns, a hundred numbers a row. Both transform the same matrix by turns; the
table holds medians; the ratio is the median of the ratios of a round. scikit-learn's components are cast to the
input's dtype beforehand, which makes its product faster. The last table has dims that are not a multiple of 16.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.random_projection import SparseRandomProjection

from benchmarks.cost.timing import alternate
from benchmarks.lib.environment import describe
from benchmarks.lib.script import options, publish
from cropi.sklearn import RandomProjection
from cropi_kernels import ProjectionSpec, project

# (rows, columns, density, n_components)
TEXT = [
    (1000, 100_000, 1e-3, 256),
    (10_000, 100_000, 1e-3, 100),
    (2000, 100_000, 1e-3, 1000),
    (5000, 20_000, 5e-3, 300),
    (2000, 1 << 20, 1e-4, 512),
    (1000, 100_000, 1e-2, 1024),
    (2000, 100_000, 1e-3, 4096),
    (50, 1 << 20, 1e-4, 100),
]
DENSE = [(64, 100_000, 1.0, 256), (8, 1 << 20, 1.0, 1000)]


def rows_of(rows: int, columns: int, density: float, dtype: type) -> Any:
    g = np.random.default_rng(0)
    if density == 1.0:
        return g.normal(size=(rows, columns)).astype(dtype)
    starts = np.concatenate([[0], np.cumsum(g.poisson(columns * density, rows))]).astype(np.int32)
    content = (
        g.random(starts[-1]).astype(dtype),
        g.integers(0, columns, starts[-1]).astype(np.int32),
        starts,
    )
    x = scipy.sparse.csr_matrix(content, shape=(rows, columns))
    x.sum_duplicates()
    return x


def by_turns(runs: dict[str, Callable[[], Any]], rounds: int, kind: str) -> dict[str, list[float]]:
    """Of each run the ``seconds`` or ``processor`` seconds of every round."""
    costs = alternate({name: lambda _, run=run: run() for name, run in runs.items()}, rounds)  # type: ignore[misc]
    return {name: [getattr(cost, kind) for cost in each] for name, each in costs.items()}


def beside_sklearn(shapes: list[tuple[int, int, float, int]], rounds: int, kind: str) -> list[str]:
    lines = [
        "| rows | columns | density | n_components | dtype | result | scikit-learn ms | here ms | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for dtype in (np.float32, np.float64):
        for shape in shapes:
            x, dim = rows_of(*shape[:3], dtype), shape[3]
            for dense_output in (True, False) if scipy.sparse.issparse(x) else (True,):
                theirs = SparseRandomProjection(dim, dense_output=dense_output, random_state=0).fit(x)
                theirs.components_ = theirs.components_.astype(dtype)
                ours = RandomProjection(dim, dense_output=dense_output, random_state=0).fit(x)
                runs = {"theirs": partial(theirs.transform, x), "ours": partial(ours.transform, x)}
                times = by_turns(runs, rounds, kind)
                ratio = statistics.median(a / b for a, b in zip(times["ours"], times["theirs"]))
                a, b = (1e3 * statistics.median(times[name]) for name in ("theirs", "ours"))
                result = "dense" if dense_output else "sparse"
                lines.append(
                    f"| {shape[0]} | {shape[1]} | {shape[2]:g} | {dim} | {np.dtype(dtype).name} | {result} | {a:.2f} | "
                    f"{b:.2f} | {ratio:.2f} |"
                )
                print(lines[-1], flush=True)
    return lines


def by_dim(rounds: int, kind: str) -> list[str]:
    """Dims that share no factor with 16 beside the multiples of 16 next to them: the same rows of float32."""
    x = torch.randn(8, 1_000_000)
    lines = ["| dim | ms | multiple of 16 | ms | ratio |", "|---|---|---|---|---|"]
    for dim, near in ((50, 48), (100, 96), (250, 256), (252, 256), (300, 304), (1000, 1008), (4098, 4096)):
        specs = {name: ProjectionSpec(d) for name, d in (("odd", dim), ("near", near))}
        times = by_turns({n: partial(project, x, s) for n, s in specs.items()}, rounds, kind)
        ratio = statistics.median(a / b for a, b in zip(times["odd"], times["near"]))
        odd, even = (1e3 * statistics.median(times[name]) for name in ("odd", "near"))
        lines.append(f"| {dim} | {odd:.2f} | {near} | {even:.2f} | {ratio:.2f} |")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sklearn.md"))
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's time, with 1 thread on a busy machine"
    )
    args = parser.parse_args()
    how = args.rounds, "processor" if args.cpu_time else "seconds"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = [beside_sklearn(TEXT, *how), beside_sklearn(DENSE, *how), by_dim(*how)]
    text = [
        "# `transform` of scikit-learn's random projections",
        "",
        f"`python -m benchmarks.bench_sklearn`, {args.rounds} rounds by turns, medians"
        + f"{' of processor time' if args.cpu_time else ''}. {describe()}.",
        "",
        "Sparse rows (CSR), numbers at random columns:",
        "",
        *tables[0],
        "",
        "Dense rows:",
        "",
        *tables[1],
        "",
        "`project` of 8 float32 rows of 1,000,000 numbers, dims that are no multiple of 16 beside their neighbours:",
        "",
        *tables[2],
    ]
    publish(args.out, text)


if __name__ == "__main__":
    main()
