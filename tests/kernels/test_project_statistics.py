"""Fidelity of `project`: the error of cosines is that of theory, whatever the inputs look like."""

from __future__ import annotations

import pytest
import torch

from cropi_kernels import ProjectionSpec, project
from cropi_kernels.testing import countsketch_variance

ROWS, P = 12, 20_011


def inputs(kind: str) -> torch.Tensor:
    """Rows with a common part: Gaussian, heavy-tailed (Student t, 3 degrees) or with channels 30 times as large."""
    g = torch.Generator().manual_seed(11)
    x = torch.randn(ROWS, P, generator=g) + 0.7 * torch.randn(P, generator=g)
    if kind == "heavy-tailed":
        return x / torch.randn(3, ROWS, P, generator=g).square().mean(0).sqrt()
    if kind.startswith("outlier"):
        channels = int(kind.split("-")[1])
        scale = torch.exp(torch.randn(channels, generator=g))
        scale[torch.randperm(channels, generator=g)[:4]] *= 30
        return x * scale.repeat(P // channels + 1)[:P]
    return x


def rms_over_bound(x: torch.Tensor, specs: list[ProjectionSpec]) -> float:
    """rms error of all cosines over all seeds, divided by the bound of an ideal CountSketch."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    true, pairs = unit @ unit.T, torch.triu_indices(ROWS, ROWS, 1)
    bound = (
        sum(countsketch_variance(unit[i], unit[j], specs[0].dim) for i, j in pairs.T.tolist())
        / pairs.shape[1]
    )
    error = 0.0
    for spec in specs:
        y = project(unit.float(), spec).double()
        error += float(((y @ y.T - true)[pairs[0], pairs[1]] ** 2).mean()) / len(specs)
    return float((error / bound) ** 0.5)


@pytest.mark.parametrize("kind", ["gaussian", "heavy-tailed", "outlier-576", "outlier-1024"])
def test_countsketch_is_within_3_percent_of_its_bound(kind: str) -> None:
    ratio = rms_over_bound(inputs(kind), [ProjectionSpec(256, seed=seed) for seed in range(1000)])
    assert 0.9 < ratio < 1.03  # coordinates of one tile never collide: a little below 1


@pytest.mark.parametrize(
    ("fields", "seeds"),
    [(dict(kind="sjlt", nnz=4), 300), (dict(kind="rademacher"), 40), (dict(kind="gaussian"), 40)],
    ids=["sjlt", "rademacher", "gaussian"],
)
def test_other_kinds_have_the_error_of_their_dimension(fields: dict, seeds: int) -> None:
    ratio = rms_over_bound(
        inputs("outlier-576")[:, :4000], [ProjectionSpec(256, seed=s, **fields) for s in range(seeds)]
    )
    assert 0.85 < ratio < 1.1


UNBIASED = [
    ProjectionSpec(256),
    ProjectionSpec(256, kind="sjlt", nnz=8),
    ProjectionSpec(64, kind="gaussian"),
    ProjectionSpec(256, keep=0.5),
]


@pytest.mark.parametrize("spec", UNBIASED, ids=str)
def test_inner_products_are_unbiased(spec: ProjectionSpec) -> None:
    import dataclasses

    x, n = inputs("gaussian")[:2, :4000], 400
    true = float(x[0] @ x[1])
    estimates = []
    for seed in range(n):
        y = project(x, dataclasses.replace(spec, seed=seed))
        estimates.append(float(y[0] @ y[1]))
    sample = torch.tensor(estimates, dtype=torch.float64)
    assert abs(sample.mean() - true) < 4 * sample.std() / n**0.5
    assert abs(sample.mean() - true) < 0.05 * true  # the check above is sharp


def test_tiles_need_their_offsets() -> None:
    """The check can fail: a CountSketch without offsets folds periodic outliers onto each other."""
    x = torch.nn.functional.normalize(inputs("outlier-1024")[:, : 1024 * 19].double(), dim=1)
    true, worst = x @ x.T, []
    for seed in range(20):
        sign = torch.randint(0, 2, (x.shape[1],), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        y = (x * sign).reshape(ROWS, -1, 256).sum(1)
        worst.append(float(((y @ y.T - true) ** 2).mean()))
    assert (sum(worst) / 20) ** 0.5 > 1.5 * 256**-0.5


def test_streams_and_seeds_are_independent() -> None:
    x = inputs("gaussian")[:1]
    base = project(x, ProjectionSpec(4096))
    for other in (
        ProjectionSpec(4096, seed=1),
        ProjectionSpec(4096, stream=1),
        ProjectionSpec(4096, keep=0.999),
    ):
        y = project(x, other)
        cosine = float(torch.nn.functional.cosine_similarity(base, y))
        assert abs(cosine) < 5 / 4096**0.5 or other.keep < 1 and cosine > 0.9
