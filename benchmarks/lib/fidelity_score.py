"""From collected products and sketches to the table: precision@10 %, Spearman and cosine error of the scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from cropi_kernels import reduce_sketch

from .fidelity_collect import parts_of
from .fidelity_variants import Variant

FRACTION = 0.1


@dataclasses.dataclass
class Collected:
    """Exact products and sketches of all prompts; ``train`` [prompts, parts, dim] is a list of memory maps."""

    types: list[str]
    sets: list[str]
    parts: list[tuple[int, str]]
    train: list[np.ndarray]
    valid: list[np.ndarray]
    squares: np.ndarray  # [prompts, types]
    products: np.ndarray  # [prompts, sets, types]
    valid_squares: np.ndarray  # [sets, types]

    @classmethod
    def read(
        cls, work: Path, variants: list[Variant], shapes: dict[str, tuple[str, str]], prompts: int
    ) -> Collected:
        train_files, valid_files = (
            sorted(work.glob("train-????.npz"))[:prompts],
            sorted(work.glob("valid-*.npz")),
        )
        train = [np.load(f) for f in train_files]
        valid = [np.load(f) for f in valid_files]
        return cls(
            sorted({kind for kind, _ in shapes.values()}),
            [f.stem.removeprefix("valid-") for f in valid_files],
            parts_of(variants, shapes),
            [f["sketches"] for f in train],
            [f["sketches"] for f in valid],
            np.stack([f["squares"] for f in train]),
            np.stack([f["products"] for f in train]),
            np.stack([f["squares"] for f in valid]),
        )

    def exact(self, types: list[str]) -> np.ndarray:
        """Exact cosines [prompts, sets] of the gradient restricted to these layer types."""
        chosen = [self.types.index(t) for t in types]
        norm = (
            np.sqrt(self.squares[:, chosen].sum(1))[:, None]
            * np.sqrt(self.valid_squares[:, chosen].sum(1))[None, :]
        )
        return self.products[:, :, chosen].sum(2) / np.maximum(norm, 1e-300)

    def sketched(self, chosen: list[int], dim: int, seed: int) -> np.ndarray:
        """Cosines [prompts, sets] from the sum of these parts, reduced to ``dim``."""

        def total(sketches: list[np.ndarray]) -> torch.Tensor:
            summed = torch.from_numpy(np.stack([s[chosen].sum(0, dtype=np.float64) for s in sketches]))
            return torch.nn.functional.normalize(reduce_sketch(summed, dim, seed=seed), dim=1)

        return (total(self.train) @ total(self.valid).T).numpy()


@dataclasses.dataclass
class Row:
    """Means over validation sets and seeds; ``spread`` is the standard deviation of the precision over seeds."""

    scope: str
    sketch: str
    dim: int
    precision: float
    spread: float
    spearman: float
    error: float
    work: str


def metrics(exact: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    """precision at the top 10 %, Spearman, rms error of the score; averaged over the validation sets."""
    n = max(1, int(len(exact) * FRACTION))
    top = [set(np.argsort(-column, kind="stable")[:n]) for column in exact.T]
    got = [set(np.argsort(-column, kind="stable")[:n]) for column in scores.T]
    precision = float(np.mean([len(a & b) / n for a, b in zip(top, got, strict=True)]))
    rank = float(np.mean([spearmanr(a, b).statistic for a, b in zip(exact.T, scores.T, strict=True)]))
    return precision, rank, float(np.sqrt(np.mean((exact - scores) ** 2)))


def row(
    data: Collected,
    variants: list[Variant],
    scope: str,
    labels: list[str],
    types: list[str],
    dim: int,
    work: str,
) -> Row:
    """One row: the parts whose variant has one of ``labels`` and whose type is in ``types``, seed by seed."""
    exact, results = data.exact(types), []
    for seed in sorted({v.spec.seed for v in variants}):
        chosen = [
            i
            for i, (v, kind) in enumerate(data.parts)
            if variants[v].label in labels and variants[v].spec.seed == seed and kind in types
        ]
        results.append(metrics(exact, data.sketched(chosen, dim, seed)))
    values = np.array(results)
    name = " + ".join(label.removeprefix("slab/") for label in labels if label != "slab/vector") or "vector"
    if any(label.startswith("slab") for label in labels):
        name = f"slab, {name}"
    return Row(
        scope,
        name,
        dim,
        *(float(values[:, 0].mean()), float(values[:, 0].std()), *values[:, 1:].mean(0)),
        work,
    )
