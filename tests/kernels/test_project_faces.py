"""The faces of `project`: TRAK's projectors, the torch module and the scikit-learn transformer."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cropi_kernels import ProjectionSpec, project, project_transpose
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
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.detach()), y)
    RandomProjection(spec, 100).load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match="saved projection"):
        RandomProjection(ProjectionSpec(32, size=300), 100).load_state_dict(module.state_dict())


# --------------------------------------------------------------------------------------------------- scikit-learn
sklearn = pytest.importorskip("sklearn")


@pytest.mark.parametrize("kind", ["countsketch", "rademacher"])
def test_check_estimator(kind: str) -> None:
    from sklearn.utils.estimator_checks import check_estimator

    from cropi.sklearn import RandomProjection as Transformer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the checks use fewer features than components
        results = check_estimator(Transformer(3, kind=kind), on_skip=None)
    assert sum(r["status"] == "passed" for r in results) > 30
    assert {r["status"] for r in results} <= {"passed", "skipped"}


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
