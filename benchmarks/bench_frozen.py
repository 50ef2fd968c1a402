"""A scoring pass with frozen linear layers by torch and by oneDNN (`cropi_kernels.frozen`), by turns, in one process.

    python -m benchmarks.bench_frozen                  # SmolLM2-135M's shapes; writes benchmarks/results/frozen.md

The first table times single products, both directions, beside torch's; the second whole passes (forward, log-probs,
backward and sketch of 4 rows of 256 tokens), paired, with the difference of the sketches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bench_ops import SHAPES, batch, model
from benchmarks.lib.environment import describe
from benchmarks.lib.script import options, publish
from cropi_kernels import GradientSketcher, PolicyGradient, SketchSpec, frozen

Clock = Callable[[], float]


def products(rounds: int, clock: Clock) -> list[str]:
    lines = ["| out, in | torch GFLOP/s | oneDNN GFLOP/s | time ratio |", "|---|---|---|---|"]
    for rows, cols in SHAPES:
        weight, x, dy = torch.randn(rows, cols), torch.randn(1024, cols), torch.randn(1024, rows)
        there, back = frozen.pack(weight), frozen.pack(weight.t())
        times: list[tuple[float, float]] = []
        for _ in range(rounds + 1):
            marks = [clock()]
            x @ weight.t(), dy @ weight
            marks.append(clock())
            frozen.product(x, there), frozen.product(dy, back)
            marks.append(clock())
            times.append((marks[1] - marks[0], marks[2] - marks[1]))
        rates = [4e-9 * 1024 * rows * cols / statistics.median(t[i] for t in times[1:]) for i in (0, 1)]
        ratio = statistics.median(b / a for a, b in times[1:])
        lines.append(f"| {rows}, {cols} | {rates[0]:.0f} | {rates[1]:.0f} | {ratio:.2f} |")
    return lines


def scored(sketcher: GradientSketcher) -> PolicyGradient:
    inputs = batch()
    return sketcher.policy_gradient(
        **inputs, labels=inputs["input_ids"], weights=torch.ones(len(inputs["input_ids"]))
    )


def passes(rounds: int, clock: Clock) -> list[str]:
    times: dict[str, list[float]] = {"torch": [], "onednn": []}
    sketches = {}
    sketchers = {n: GradientSketcher(model(), SketchSpec(), linears=n) for n in times}  # type: ignore[arg-type]
    packed = 0
    for _ in range(rounds):
        for name, sketcher in sketchers.items():
            with sketcher:
                scored(sketcher)  # packs the weights, as the first pass of a job does
                start = clock()
                sketches[name] = scored(sketcher).sketches
                times[name].append(clock() - start)
                packed = max(packed, sketcher._linears.nbytes)
    ratio = statistics.median(b / a for a, b in zip(times["torch"], times["onednn"]))
    off = ((sketches["onednn"] - sketches["torch"]).norm() / sketches["torch"].norm()).item()
    a, b = (statistics.median(times[n]) for n in ("torch", "onednn"))
    return [
        "| torch s | oneDNN s | ratio | difference of the sketches | packed copies MB |",
        "|---|---|---|---|---|",
        f"| {a:.2f} | {b:.2f} | {ratio:.2f} | {off:.1e} | {packed / 1e6:.0f} |",
    ]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frozen.md"))
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the process's time, with 1 thread on a busy machine"
    )
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    choices = ", ".join(f"{r} x {c}: {frozen._ratio(r, c, torch.get_num_threads()):.2f}" for r, c in SHAPES)
    text = [
        "# Frozen linear layers by oneDNN",
        "",
        f"`python -m benchmarks.bench_frozen`, {args.rounds} rounds by turns, medians"
        + f"{' of processor time' if args.cpu_time else ''}. {describe()}.",
        "",
        *products(args.rounds, clock),
        "",
        *passes(args.rounds, clock),
        "",
        f'What `linears="auto"` measured here (oneDNN is taken up to 0.6): {choices}.',
    ]
    publish(args.out, text)


if __name__ == "__main__":
    main()
