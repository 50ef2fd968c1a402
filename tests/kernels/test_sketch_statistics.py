"""The sketch as a random map, over seeds: unbiased, additive, independent, with the variance of docs/sketch.md.

Every check is a z-test at 5 standard errors, whose error probability is 6e-7 for a fresh draw of seeds; the seeds are
fixed, so a run cannot fail by chance.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.tensors import normal

from cropi_kernels import (
    SketchSpec,
    fold_inputs,
    plan_matrix,
    plan_vector,
    project,
    projection_of,
    reduce_sketch,
    sketch_embedding,
    sketch_linear,
    sketch_vector,
)
from cropi_kernels.sketcher.sums.matrix import matrix_sketch
from cropi_kernels.spec import KINDS
from cropi_kernels.testing import countsketch_variance, fold_variance, slab_variance

NAME = "model.layers.0.self_attn.q_proj.weight"
Z = 5.0


def z_score(samples: list[float], expected: float) -> float:
    x = torch.tensor(samples, dtype=torch.float64)
    return float((x.mean() - expected) / (x.std() / math.sqrt(len(samples))))


def sketch(
    spec: SketchSpec, gradients: list[torch.Tensor], name: str = NAME, role: str = "linear"
) -> torch.Tensor:
    """Sketches [n, spec.dim] of gradients [rows, cols] that exist, through the kernels, reduced to ``dim``."""
    rows, cols = gradients[0].shape
    n = len(gradients)
    out = torch.zeros(n, spec.base_dim)
    index, offsets = torch.arange(rows).repeat(n), torch.arange(n + 1) * rows
    matrix_sketch(spec, name, rows, cols, role).add_rows(torch.cat(gradients), index, offsets, out)  # type: ignore[arg-type]
    return reduce_sketch(out, spec.dim, seed=spec.seed)


def inputs(kind: str, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two gradients with a positive inner product: what prompts of one task have."""
    x = normal(rows, cols, seed=1)
    y = 0.5 * x + normal(rows, cols, seed=2)
    if kind == "heavy tails":
        scale = torch.exp(1.5 * normal(rows, cols, seed=3))
        return x * scale, y * scale
    if kind == "outlier channel":
        x[:, 5] *= 30
        y[:, 5] *= 30
    if kind == "common direction":
        v = normal(cols, seed=4)
        return torch.outer(x[:, 0], v), torch.outer(y[:, 0], v)
    return x, y


# ---------------------------------------------------------------------------------------------- mean
SPECS = [
    SketchSpec(width=None),
    SketchSpec(width=64),
    SketchSpec(width=16),
    SketchSpec(width=64, dim=65536),
    SketchSpec(width=64, dim=1024),
    SketchSpec(width=None, dim=64),
    *(SketchSpec(kind=kind, dim=256, width=None) for kind in KINDS if kind != "slab"),
    SketchSpec(kind="dropout", dim=256, width=None, keep=0.3),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.kind}-{s.dim}-w{s.width}-keep{s.keep}")
@pytest.mark.parametrize("role", ["linear", "tied"])
def test_inner_products_are_unbiased(spec: SketchSpec, role: str) -> None:
    """``E <Sx, Sy> = <x, y>``, also for the squared norm."""
    # Of the slab sketch two blocks: one alone is sketched without error. Projections go row by row, and have as many
    # entries in a fifth of the rows.
    flat = spec.kind in ("countsketch", "dropout")
    x, y = inputs("heavy tails", *((60, 350) if flat else (300, 70)))
    exact = float((x * y).sum()), float((x * x).sum())
    samples: tuple[list[float], list[float]] = [], []
    for seed in range(150):
        s = sketch(dataclass_with(spec, seed, vocab_width=32), [x, y], role=role)
        samples[0].append(float(s[0] @ s[1]))
        samples[1].append(float(s[0] @ s[0]))
    for got, want in zip(samples, exact):
        assert abs(z_score(got, want)) < Z


def dataclass_with(spec: SketchSpec, seed: int, **changes: object) -> SketchSpec:
    return SketchSpec.from_dict({**spec.to_dict(), "seed": seed, **changes})


def test_a_wrong_mean_would_be_seen() -> None:
    """The power of the test above: an inner product off by 2 % is rejected."""
    x, y = inputs("dense", 300, 70)
    samples = []
    for seed in range(200):
        s = sketch(SketchSpec(seed=seed, width=None), [x, y])
        samples.append(float(s[0] @ s[1]))
    exact = float((x * y).sum())
    assert abs(z_score(samples, exact)) < Z < abs(z_score(samples, 1.02 * exact))


# ------------------------------------------------------------------------------------------ variance
# One column of blocks, one row of blocks, two ragged ones of each (where the exact variance takes its time).
SHAPES = [
    (1024, 64, ["dense", "heavy tails", "outlier channel", "common direction"]),
    (128, 512, ["dense", "heavy tails", "outlier channel", "common direction"]),
    (130, 260, ["common direction"]),
]
FACTOR = {"dense": 1.02, "heavy tails": 1.1, "outlier channel": 8.0, "common direction": 10.0}


@pytest.mark.long
@pytest.mark.parametrize("rows, cols, names", SHAPES, ids=["1024x64", "128x512", "130x260"])
def test_variance_of_the_slab_sketch(rows: int, cols: int, names: list[str]) -> None:
    """The variance is the derived one (`slab_variance`), and that is within a known factor of CountSketch's.

    The factor is 1 for independent entries: blocks meet 1 / k as often as an ideal hash makes entries meet. It is up to
    8 where energy sits in one column, because XORs by multiples of 8 make equal residues meet 8 times as often; and
    up to 10 for a common direction ``u v^T``, because in two blocks of one column of blocks that draw one column XOR (8
    of slab_cols) the separable column signs cancel: ``sum_j v_j v'_j`` is then squared whole, where independent signs
    give the sum of squares. That is slab_cols times as much, in a share 8 / slab_cols of cases, on top of 2 for the
    rest, where column j meets j ^ xor and back under one sign.
    """
    plan = plan_matrix(SketchSpec(width=None), NAME, rows, cols)
    kinds = {kind: inputs(kind, rows, cols) for kind in names}
    matrices = [m for pair in kinds.values() for m in pair]
    errors: dict[str, list[float]] = {kind: [] for kind in kinds}
    exact = {kind: float((x.double() * y).sum()) for kind, (x, y) in kinds.items()}
    for seed in range(250):
        s = sketch(SketchSpec(width=None, seed=seed), matrices).double()
        for i, kind in enumerate(kinds):
            errors[kind].append(float(s[2 * i] @ s[2 * i + 1]) - exact[kind])
    for kind, (x, y) in kinds.items():
        theory, ideal = slab_variance(x, y, plan), countsketch_variance(x, y, 32768)
        assert theory <= FACTOR[kind] * ideal, kind
        assert abs(z_score([e * e for e in errors[kind]], theory)) < Z, kind
        assert abs(z_score(errors[kind], 0.0)) < Z, kind


@pytest.mark.parametrize("kind", FACTOR)
def test_variance_of_the_fold(kind: str) -> None:
    x, y = inputs(kind, 30, 200)
    exact, errors = float((x.double() * y).sum()), []
    for seed in range(300):
        plan = plan_matrix(SketchSpec(width=32, seed=seed), NAME, 30, 200)
        folded = fold_inputs(x, plan).double(), fold_inputs(y, plan).double()
        errors.append(float((folded[0] * folded[1]).sum()) - exact)
    assert abs(z_score([e * e for e in errors], fold_variance(x, y, 32))) < Z
    assert abs(z_score(errors, 0.0)) < Z


def block_variance(x: torch.Tensor, y: torch.Tensor, block: int) -> float:
    """Variance of ``<Sx, Sy>`` where blocks of ``block`` numbers are added under XORs by multiples of 8, signs apart.

    Two numbers meet with probability ``8 / block`` if they are equal mod 8 and in different blocks: the sum of
    ``(x_p y_q + x_q y_p)^2`` over such pairs, from the squares' sums per block and residue.
    """
    size = -(-len(x) // block) * block
    padded = torch.zeros(2, size, dtype=torch.float64)
    padded[:, : len(x)] = torch.stack([x, y])
    u, v = padded.reshape(2, -1, block // 8, 8)
    a, b, c = (m.sum(1) for m in (u * u, v * v, u * v))  # [blocks, residues]
    total = 0.0
    for i in range(len(a)):
        for j in range(i):
            total += float((a[i] * b[j] + b[i] * a[j] + 2 * c[i] * c[j]).sum())
    return total * 8 / block


@pytest.mark.long
def test_vectors_are_exact_or_have_the_derived_variance() -> None:
    """Up to 32768 numbers never meet; a bias of a large vocabulary has its blocks added up."""
    for size in (1, 7, 576, 32768):
        x = torch.stack([normal(size, seed=1), normal(size, seed=2)])
        plan, out = plan_vector(SketchSpec(), "model.norm.weight", size), torch.zeros(2, 32768)
        s = sketch_vector(x, plan, out).double()
        assert torch.allclose(s @ s.T, x.double() @ x.double().T, rtol=0, atol=1e-12 * size)
    x = torch.stack([normal(70000, seed=1), normal(70000, seed=2) + 0.5 * normal(70000, seed=1)]).double()
    x[:, 3] *= 50
    exact, errors = float(x[0] @ x[1]), []
    for seed in range(300):
        plan = plan_vector(SketchSpec(seed=seed), "lm_head.bias", 70000)
        s = sketch_vector(x, plan, torch.zeros(2, 32768, dtype=torch.float64))
        errors.append(float(s[0] @ s[1]) - exact)
    assert abs(z_score(errors, 0.0)) < Z
    assert abs(z_score([e * e for e in errors], block_variance(x[0], x[1], 32768))) < Z


# ----------------------------------------------------------------------------------------- halving
@pytest.mark.long
def test_halving_has_the_derived_variance_and_nests() -> None:
    dense = torch.stack([normal(2048, seed=1), normal(2048, seed=2) + 0.5 * normal(2048, seed=1)]).double()
    spiky = dense.clone()
    spiky[:, 100] *= 20

    def error(x: torch.Tensor, dim: int, seed: int) -> float:
        s = reduce_sketch(x, dim, seed=seed)
        return float(s[0] @ s[1]) - float(x[0] @ x[1])

    half = [error(spiky, 1024, seed) for seed in range(250)]
    assert abs(z_score(half, 0.0)) < Z
    assert abs(z_score([e * e for e in half], block_variance(spiky[0], spiky[1], 1024))) < Z
    # Five halvings in a row are a CountSketch to 64 numbers where no entry stands out.
    deep = [error(dense, 64, seed) for seed in range(250)]
    assert abs(z_score(deep, 0.0)) < Z
    assert abs(z_score([e * e for e in deep], countsketch_variance(dense[0], dense[1], 64))) < Z
    assert torch.equal(reduce_sketch(dense, 256), reduce_sketch(reduce_sketch(dense, 512), 256))


def test_a_smaller_dim_is_the_reduced_larger_one() -> None:
    x = normal(40, 90)
    whole = sketch(SketchSpec(), [x])
    for dim in (16384, 1024, 64):
        assert torch.equal(sketch(SketchSpec(dim=dim), [x]), reduce_sketch(whole, dim))


# --------------------------------------------------------------------------- different names and seeds
@pytest.mark.parametrize("kind", KINDS)
def test_other_names_and_seeds_are_uncorrelated(kind: str) -> None:
    """``E <S x, S' x> = 0``: the sum over two parameters keeps both inner products apart. q and k share their fold."""
    x = normal(40, 90)
    k_proj = NAME.replace("q_proj", "k_proj")
    by_name, by_seed = [], []
    for seed in range(200):
        spec = SketchSpec(kind=kind, dim=1024, width=32 if kind == "slab" else None, seed=seed)  # type: ignore[arg-type]
        s = sketch(spec, [x])[0]
        by_name.append(float(s @ sketch(spec, [x], k_proj)[0]))
        by_seed.append(float(s @ sketch(dataclass_with(spec, seed + 1000), [x])[0]))
    size = float((x * x).sum()) / math.sqrt(1024)
    for got in (by_name, by_seed):
        assert abs(z_score(got, 0.0)) < Z
        assert torch.tensor(got).std() < 5 * size  # and small: what an inner product of strangers should be


# --------------------------------------------------------------------------------------- additivity
def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Sums of these are exact, so that parts must add up to the bit."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("role", ["linear", "tied", "embedding"])
def test_row_shards_add_up(role: str) -> None:
    """A shard sketches its own rows under the whole matrix's plan."""
    rows, cols = 1000, 100
    plan = plan_matrix(SketchSpec(width=32, vocab_width=128), NAME, rows, cols, role)  # type: ignore[arg-type]
    g = whole_numbers(rows, cols)
    whole, parts = torch.zeros(1, 32768), torch.zeros(1, 32768)
    sketch_linear(torch.eye(rows), g, torch.tensor([0, rows]), plan, whole)
    for begin, end in ((0, 1), (1, 400), (400, 401), (401, 1000)):
        offsets = torch.tensor([0, end - begin])
        sketch_embedding(g[begin:end], torch.arange(begin, end), offsets, plan, parts)
    assert torch.equal(whole, parts) and whole.any()


def test_shards_of_a_formed_gradient_add_up() -> None:
    spec = projection_of(SketchSpec(kind="dropout", dim=256, width=None, keep=0.25), NAME)
    x, parts = whole_numbers(1, 1003), torch.zeros(1, 256)
    for begin, end in ((0, 1), (1, 6), (6, 777), (777, 1003)):
        project(x[:, begin:end], spec, begin, out=parts)
    assert torch.equal(project(x, spec), parts) and parts.any()


def test_micro_batches_add_up() -> None:
    plan = plan_matrix(SketchSpec(width=16), NAME, 33, 50)
    d, a = whole_numbers(700, 33, seed=1), whole_numbers(700, 50, seed=2)
    whole, parts = torch.zeros(2, 32768), torch.zeros(2, 32768)
    sketch_linear(d, a, torch.tensor([0, 300, 700]), plan, whole)
    for begin, end, cut in ((0, 257, 257), (257, 300, 43), (300, 301, 0), (301, 700, 0)):
        sketch_linear(d[begin:end], a[begin:end], torch.tensor([0, cut, end - begin]), plan, parts)
    assert torch.equal(whole, parts) and whole.any(dim=1).all()


# ------------------------------------------------------------------------------------- which side to fold
def test_folding_inputs_moves_scores_less_than_folding_outputs() -> None:
    """Gradients with a common input direction, folded to 16 features: an error that all share moves no cosine."""
    direction = normal(256, seed=9)
    prompts = [
        torch.outer(normal(256, seed=s), direction) + 0.3 * normal(256, 256, seed=100 + s) for s in range(12)
    ]
    flat = torch.stack([p.reshape(-1) for p in prompts])

    def cosines(x: torch.Tensor) -> torch.Tensor:
        x = x / x.norm(dim=1, keepdim=True)
        return (x @ x.T)[torch.triu_indices(12, 12, 1).unbind()]

    error = {"linear": 0.0, "tied": 0.0}
    for seed in range(5):
        spec = SketchSpec(width=16, vocab_width=16, seed=seed)
        for role in error:
            error[role] += float((cosines(sketch(spec, prompts, role=role)) - cosines(flat)).square().mean())
    assert error["linear"] < 0.2 * error["tied"]
