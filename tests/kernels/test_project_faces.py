"""The faces of `project`: TRAK's projectors, the torch module and the scikit-learn transformer."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cropi_kernels import (
    ProjectionSpec,
    SketchSpec,
    plan_matrix,
    plan_vector,
    project,
    project_transpose,
    reduce_sketch,
)
from cropi_kernels.projectors import (
    BasicProjector,
    ChunkedCudaProjector,
    CudaProjector,
    ProjectionType,
    RandomProjection,
)


# ----------------------------------------------------------------------------------------------------------- TRAK
def test_constructors_take_what_traks_take() -> None:
    import inspect

    trak = pytest.importorskip("trak.projectors")
    for ours in (BasicProjector, CudaProjector, ChunkedCudaProjector):
        theirs = inspect.signature(getattr(trak, ours.__name__).__init__).parameters
        names = [name for name in theirs if name not in ("self", "args", "kwargs")]
        mine = list(inspect.signature(ours.__init__).parameters)[1:]
        assert mine[: len(names)] == names


@pytest.mark.parametrize("proj_type", ["normal", "rademacher", "countsketch", "sjlt", ProjectionType.normal])
def test_norms_are_traks_unless_normalized(proj_type: str) -> None:
    grads = torch.randn(5, 2000, generator=torch.Generator().manual_seed(0))
    for normalize in (False, True):
        projector = BasicProjector(2000, 1024, 0, proj_type, "cpu", normalize=normalize)
        ratio = projector.project(grads, model_id=0).norm(dim=1) / grads.norm(dim=1)
        expected = 1.0 if normalize else 1024**0.5
        assert (ratio / expected - 1).abs().max() < 5 * (2 * 1024) ** -0.5


def test_checkpoints_seeds_and_blocks() -> None:
    grads = torch.randn(2, 500)
    make = dict(grad_dim=500, proj_dim=512, proj_type="rademacher", device="cpu")
    base = BasicProjector(seed=0, **make).project(grads, 0)
    assert torch.equal(base, BasicProjector(seed=0, block_size=7, **make).project(grads, 0))
    assert torch.equal(base, CudaProjector(seed=0, max_batch_size=8, **make).project(grads, 0))
    for other in (
        BasicProjector(seed=0, **make).project(grads, 1),
        BasicProjector(seed=100_000, **make).project(grads, 0),
    ):
        assert abs(float(torch.nn.functional.cosine_similarity(base, other)[0])) < 5 / 512**0.5


def test_default_dtype_does_not_matter() -> None:
    grads = torch.randn(2, 500)
    projector = BasicProjector(500, 64, 0, "rademacher", "cpu")
    want = projector.project(grads, 0)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert torch.equal(projector.project(grads, 0), want)
        finally:
            torch.set_default_dtype(torch.float32)


def test_dict_of_parameters_is_projected_where_it_lies() -> None:
    grads = {"w": torch.randn(3, 4, 5), "b": torch.randn(3, 7), "n": torch.randn(3)}
    flat = torch.cat([g.reshape(3, -1) for g in grads.values()], 1)
    projector = BasicProjector(28, 64, 1, "countsketch", "cpu")
    torch.testing.assert_close(projector.project(grads, 2), projector.project(flat, 2))
    assert projector(flat, 2).dtype == torch.float32 and not list(projector.parameters())
    chunks = [BasicProjector(20, 64, 1, "countsketch", "cpu"), BasicProjector(8, 64, 5, "countsketch", "cpu")]
    chunked = ChunkedCudaProjector(chunks, 20, [20, 8], 3, "cpu", torch.float32)
    want = chunks[0].project(flat[:, :20], 2) + chunks[1].project(flat[:, 20:], 2)
    torch.testing.assert_close(chunked.project(grads, 2), want)
    chunked.free_memory()


def test_projector_errors() -> None:
    projector = BasicProjector(28, 64, 1, "countsketch", "cpu")
    with pytest.raises(ValueError, match="grads have 27 coordinates but grad_dim=28"):
        projector.project(torch.zeros(1, 27), 0)
    with pytest.raises(ValueError, match="proj_type='hadamard'"):
        BasicProjector(28, 64, 1, "hadamard", "cpu")
    with pytest.raises(RuntimeError, match="device=cuda"):
        CudaProjector(28, 64, 1, "normal", "cuda", 8)
    with pytest.raises(ValueError, match="2 projectors for 1 chunks"):
        ChunkedCudaProjector([projector, projector], 28, [28], 1)
    with pytest.raises(ValueError, match=r"chunks of \[10\] coordinates but params_per_chunk=\[28\]"):
        ChunkedCudaProjector([projector], 28, [28], 1).project({"w": torch.zeros(1, 10)}, 0)


def test_traker_runs_with_our_projector(tmp_path: Path) -> None:
    trak = pytest.importorskip("trak")
    torch.manual_seed(0)
    n, model = 128, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    batch = [torch.randn(n, 12), torch.randint(0, 3, (n,))]
    projector = BasicProjector(sum(p.numel() for p in model.parameters()), 16, 0, "countsketch", "cpu")
    traker = trak.TRAKer(
        model, "image_classification", train_set_size=n, save_dir=str(tmp_path), device="cpu", projector=projector,
        use_half_precision=False, logging_level=50,
    )  # fmt: skip
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize(batch=batch, num_samples=n)
    traker.finalize_features()
    traker.start_scoring_checkpoint("test", model.state_dict(), 0, num_targets=n)
    traker.score(batch=batch, num_samples=n)
    scores = np.asarray(traker.finalize_scores("test"))
    # The influence of a sample on itself, x^T (X^T X)^-1 x times a residual: never negative.
    own = scores.diagonal()
    assert (own > 0).all() and own.mean() > 5 * abs(scores).mean()


INTEGERS = [np.int64, np.uint8, np.array, torch.tensor]


@pytest.mark.parametrize("whole", INTEGERS, ids=lambda w: w.__name__)
def test_integers_of_any_library_are_integers(whole: Any) -> None:
    """NumPy's scalars, arrays without dimensions, torch's: one spec, one text, one projection."""
    spec = ProjectionSpec(
        whole(32), kind="sjlt", nnz=whole(2), seed=whole(3), stream=whole(4), size=whole(100)
    )
    plain = ProjectionSpec(32, kind="sjlt", nnz=2, seed=3, stream=4, size=100)
    assert (
        spec == plain
        and hash(spec) == hash(plain)
        and spec.recipe == plain.recipe
        and repr(spec) == repr(plain)
    )
    assert all(
        type(getattr(spec, name)) is int for name in ("dim", "nnz", "seed", "stream", "size", "version")
    )
    x = torch.randn(2, 60)
    assert torch.equal(project(x, spec, whole(40)), project(x, plain, 40))
    assert torch.equal(
        project_transpose(x[:, :32], spec, whole(60), whole(40)), project_transpose(x[:, :32], plain, 60, 40)
    )
    assert torch.equal(RandomProjection(spec, whole(40))(x), RandomProjection(plain, 40)(x))
    for kind in ("normal", "sjlt"):
        ours = BasicProjector(
            whole(60), whole(32), whole(3), kind, "cpu", whole(7), torch.float32, whole(5), nnz=whole(2)
        )
        want = BasicProjector(60, 32, 3, kind, "cpu", 7, torch.float32, 5, nnz=2)
        assert torch.equal(ours.project(x, whole(1)), want.project(x, 1)) and ours.block_size == 7
    chunks = ChunkedCudaProjector([want], whole(60), np.array([60]), whole(2))
    assert torch.equal(chunks.project({"w": x}, whole(1)), want.project(x, 1))
    sketch = SketchSpec(whole(64), width=whole(16), vocab_width=whole(32), seed=whole(3))
    assert (
        sketch == SketchSpec(64, width=16, vocab_width=32, seed=3)
        and json.loads(sketch.recipe)["width"] == 16
    )
    assert plan_matrix(sketch, "a.weight", whole(5), whole(7)) is plan_matrix(sketch, "a.weight", 5, 7)
    assert plan_vector(sketch, "a.bias", whole(5)) is plan_vector(sketch, "a.bias", 5)
    assert torch.equal(reduce_sketch(x[:, :32], whole(8), seed=whole(3)), reduce_sketch(x[:, :32], 8, seed=3))


@pytest.mark.parametrize(
    "keep", [np.float32(0.5), np.float64(0.5), np.array(0.5), torch.tensor(0.5)], ids=type
)
def test_shares_of_any_library_are_shares(keep: Any) -> None:
    assert ProjectionSpec(32, keep=keep) == ProjectionSpec(32, keep=0.5)
    assert type(SketchSpec(64, kind="dropout", keep=keep).keep) is float
    assert ProjectionSpec(32, keep=np.int64(1)) == ProjectionSpec(32)


@pytest.mark.parametrize(
    "wrong",
    [
        True,
        np.True_,
        np.array(True),
        torch.tensor(True),
        4.0,
        np.float64(4),
        "4",
        None,
        [4],
        np.array([4]),
        torch.tensor([4]),
    ],
    ids=repr,
)
def test_what_is_no_integer_is_refused_by_name(wrong: Any) -> None:
    for field, low in (("dim", 1), ("nnz", 1), ("seed", 0), ("stream", 0)):
        with pytest.raises(ValueError, match=rf"{field}=.*: give an integer (from {low}|>= {low})"):
            ProjectionSpec(**{"dim": 16, field: wrong})
    with pytest.raises(ValueError, match="offset="):
        project(torch.zeros(1, 10), ProjectionSpec(16), wrong)
    with pytest.raises(ValueError, match="n="):
        project_transpose(torch.zeros(1, 16), ProjectionSpec(16), wrong)
    with pytest.raises(ValueError, match="proj_dim="):
        BasicProjector(28, wrong, 1, "normal")
    with pytest.raises(ValueError, match="stream="):
        BasicProjector(28, 8, 1, "normal").project(torch.zeros(1, 28), wrong)
    with pytest.raises(ValueError, match="dim=.*power of two"):
        SketchSpec(wrong)
    if wrong is not True:
        with pytest.raises(ValueError, match="keep="):
            ProjectionSpec(16, keep=True if isinstance(wrong, (int, float)) else wrong)


# --------------------------------------------------------------------------------------------------------- module
def test_module_is_linear_differentiable_and_compiles() -> None:
    spec = ProjectionSpec(32, kind="sjlt", nnz=2, size=300)
    module = RandomProjection(spec, offset=100)
    x = torch.randn(2, 3, 200, requires_grad=True)
    y = module(x)
    assert torch.equal(y.reshape(6, 32), project(x.detach().reshape(6, 200), spec, 100))
    y.sum().backward()
    assert torch.equal(x.grad.reshape(6, 200), project_transpose(torch.ones(6, 32), spec, 200, 100))
    assert module.transpose(y.detach()).shape == (2, 3, 200)
    with pytest.warns(RuntimeWarning, match="hold NaN") as said:
        module(x.detach() * math.nan)
    assert said[0].filename == __file__, "the line that called, neither ours nor torch's"
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.detach()), y)
    RandomProjection(spec, 100).load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match="saved projection"):
        RandomProjection(ProjectionSpec(32, size=300), 100).load_state_dict(module.state_dict())


# --------------------------------------------------------------------------------------------------- scikit-learn
sklearn = pytest.importorskip("sklearn")


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        dict(kind="countsketch"),
        dict(kind="rademacher"),
        dict(kind="sjlt", n_components=1),
        dict(kind="sjlt", n_components=1, nnz=4),
        dict(kind="sjlt", n_components=4, nnz=4),  # some checks set n_components=1
        dict(dense_output=False),
    ],
    ids=str,
)
def test_check_estimator(fields: dict) -> None:
    from sklearn.utils.estimator_checks import check_estimator

    from cropi.sklearn import RandomProjection as Transformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks use fewer features than components
        results = check_estimator(Transformer(**{"n_components": 3} | fields), on_skip=None)
    assert sum(r["status"] == "passed" for r in results) > 30
    assert {r["status"] for r in results} <= {"passed", "skipped"}


def test_grid_search_over_numpy_integers_fits() -> None:
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    from cropi.sklearn import RandomProjection as Transformer

    g = np.random.default_rng(0)
    x = g.normal(size=(40, 30))
    grid = {
        "randomprojection__n_components": np.array([2, 4, 30]),
        "randomprojection__nnz": np.array([1, 2]),
        "randomprojection__random_state": np.array([0, 1]),
        "randomprojection__dense_output": np.array([True, False]),
    }
    search = GridSearchCV(
        make_pipeline(Transformer(kind="sjlt"), Ridge()), grid, cv=3, error_score="raise"
    ).fit(x, x[:, 0])
    chosen = search.best_estimator_[0]
    assert type(chosen.n_components_) is int and chosen.spec_.seed >= 0


def test_more_nonzeros_than_components_are_lowered_with_a_warning() -> None:
    from sklearn.exceptions import DataDimensionalityWarning

    from cropi.sklearn import RandomProjection as Transformer

    x = np.ones((2, 9), np.float32)
    with pytest.warns(DataDimensionalityWarning, match="nnz=4 is higher than n_components=2"):
        assert Transformer(2, kind="sjlt", nnz=4).fit(x).spec_.nnz == 2
    for wrong in (2.5, True, "2"):
        with pytest.raises(ValueError, match=f"(dim|n_components)={wrong!r}: give an integer"):
            Transformer(wrong).fit(x)
        with pytest.raises(ValueError, match=f"nnz={wrong!r}: give an integer"):
            Transformer(4, kind="sjlt", nnz=wrong).fit(x)
    with pytest.raises(ValueError, match="dense_output=False with kind='gaussian'"):
        Transformer(4, kind="gaussian", dense_output=False).fit(x)


@pytest.mark.parametrize("kind", ["countsketch", "sjlt", "rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transform_is_the_product_with_components(kind: str, dtype: type) -> None:
    import scipy.sparse

    from cropi.sklearn import RandomProjection as Transformer

    x = scipy.sparse.random(30, 700, 0.2, format="csr", random_state=1, dtype=dtype)
    transformer = Transformer(50, kind=kind, nnz=5 if kind == "sjlt" else 1, random_state=0).fit(x)
    s = transformer.components_
    assert (
        s.shape == (50, 700)
        and s.dtype == np.float32
        and scipy.sparse.issparse(s) == (kind in ("countsketch", "sjlt"))
    )
    s = (s.toarray() if scipy.sparse.issparse(s) else s).astype(np.float64)
    want, magnitude = x.astype(np.float64) @ s.T, abs(x).astype(np.float64) @ abs(s.T)
    bound = (
        300 * np.finfo(dtype).eps + 2.0**-22
    ) * magnitude  # components_ is float32; normals differ by some ulps
    results = [transformer.transform(v) for v in (x, x.tocsc(), x.toarray(), np.asfortranarray(x.toarray()))]
    for y in results:
        assert y.dtype == dtype and (abs(y - want) <= bound).all()
        np.testing.assert_allclose(y, results[0], rtol=0, atol=600 * np.finfo(dtype).eps * magnitude.max())
    back = transformer.inverse_transform(results[0])
    assert back.dtype == dtype
    assert (
        abs(back - results[0].astype(np.float64) @ s) <= bound.max() + 1e-6 * abs(results[0]) @ abs(s)
    ).all()


def test_sparse_output() -> None:
    import scipy.sparse

    from cropi.sklearn import RandomProjection as Transformer

    x = scipy.sparse.random(40, 5000, 0.002, format="csr", random_state=1)
    for fields in (dict(), dict(kind="sjlt", nnz=4)):
        dense = Transformer(1000, random_state=0, **fields).fit_transform(x)
        sparse = Transformer(1000, random_state=0, dense_output=False, **fields).fit_transform(x)
        assert (
            scipy.sparse.issparse(sparse)
            and sparse.format == "csr"
            and sparse.nnz <= x.nnz * fields.get("nnz", 1)
        )
        assert np.array_equal(sparse.toarray(), dense)
        of_dense = Transformer(1000, random_state=0, dense_output=False, **fields).fit_transform(x.toarray())
        np.testing.assert_allclose(of_dense, dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["dense", "csr", "csc"])
@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
def test_a_row_that_overflows_is_named_in_every_layout(layout: str, kind: str) -> None:
    """Two numbers whose sum is not float32: the whole row is NaN and the warning names it; in float64 it is right."""
    import scipy.sparse

    from cropi.sklearn import RandomProjection as Transformer

    transformer = Transformer(1, kind=kind, random_state=0).fit(np.ones((1, 2)))
    sign = transformer.transform(np.eye(2))[:, 0]
    x = np.stack([np.array([1.0, 2.0]), 3e38 * sign, np.array([0.5, 0.0])])
    as_layout = {"dense": np.asarray, "csr": scipy.sparse.csr_matrix, "csc": scipy.sparse.csc_matrix}[layout]
    with pytest.warns(
        RuntimeWarning, match=r"1 row\(s\) of x hold NaN or infinity .*: 1; their projections are NaN"
    ):
        y = transformer.transform(as_layout(x.astype(np.float32)))
    assert np.isnan(y[1]).all() and np.isfinite(y[[0, 2]]).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(transformer.transform(as_layout(x))[1], 6e38)


@pytest.mark.parametrize("fields", [dict(), dict(kind="sjlt", nnz=2), dict(kind="gaussian")], ids=str)
def test_transformer_takes_any_layout_and_reads_it_right(fields: dict) -> None:
    import scipy.sparse

    from cropi.sklearn import RandomProjection as Transformer

    dense = scipy.sparse.random(20, 500, 0.1, format="csr", random_state=0, dtype=np.float32)
    x = dense.toarray()
    transformer = Transformer(60, random_state=3, **fields)
    y = transformer.fit_transform(x)
    assert y.dtype == np.float32 and y.shape == (20, 60)
    assert np.array_equal(y, project(torch.from_numpy(x), transformer.spec_).numpy())
    for other in (x.astype(np.float64), np.asfortranarray(x), dense, dense.tocsc(), dense.tocoo()):
        np.testing.assert_allclose(transformer.transform(other), y, rtol=2e-5, atol=2e-5)
    back = transformer.inverse_transform(y)
    assert back.shape == x.shape
    np.testing.assert_allclose((back * x).sum(), (y * y).sum(), rtol=1e-4)
    assert transformer.get_feature_names_out()[:2].tolist() == ["randomprojection0", "randomprojection1"]
    assert np.array_equal(y, Transformer(60, random_state=3, **fields).fit(x).transform(x))
    assert not np.array_equal(y, Transformer(60, random_state=4, **fields).fit(x).transform(x))


def test_transformer_dimension_by_johnson_lindenstrauss() -> None:
    from sklearn.random_projection import johnson_lindenstrauss_min_dim

    from cropi.sklearn import RandomProjection as Transformer

    x = np.random.default_rng(0).normal(size=(10, 5000)).astype(np.float32)
    transformer = Transformer(eps=0.3, random_state=0).fit(x)
    assert transformer.n_components_ == johnson_lindenstrauss_min_dim(10, eps=0.3)
    y = transformer.transform(x)
    before, after = ((v[:, None] - v[None]).reshape(100, -1) for v in (x, y))
    ratio = (after**2).sum(1)[1:9] / (before**2).sum(1)[1:9]
    assert (abs(ratio - 1) < 0.3).all()
    with pytest.raises(ValueError, match="larger than the original space with n_features=50"):
        Transformer(eps=0.1).fit(x[:, :50])
    with pytest.raises(ValueError, match="n_components='many'"):
        Transformer("many").fit(x)
    with pytest.raises(ValueError, match="dim=0"):
        Transformer(0).fit(x)
