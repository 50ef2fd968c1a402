"""`project`: every backend computes the one matrix that the spec's integers define, for any cut of the work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import library

from cropi_kernels import ProjectionSpec, _cuda, _native, _triton, project, project_transpose, quantize_rows
from cropi_kernels.ops.project import reference
from cropi_kernels.ops.project.ops import choose
from cropi_kernels.testing import sum_error_bound

VECTORS = json.loads((Path(__file__).parent / "vectors" / "project_v1.json").read_text())
SPECS = [
    ProjectionSpec(256),
    ProjectionSpec(1024, seed=1),
    ProjectionSpec(48, stream=2),
    ProjectionSpec(7),
    ProjectionSpec(1),
    ProjectionSpec(256, kind="sjlt", nnz=4),
    ProjectionSpec(60, kind="sjlt", nnz=3),
    ProjectionSpec(512, keep=0.3),
    ProjectionSpec(200, kind="rademacher"),
    ProjectionSpec(130, kind="gaussian", keep=0.25),
]
P = 3011  # a multiple of nothing
NORMAL_ERROR = 6.0 * 8 * 2.0**-24  # largest normal (sqrt(-2 log 2^-24) < 6) times 8 roundings


def spec_id(spec: ProjectionSpec) -> str:
    return f"{spec.kind}-{spec.dim}-{spec.nnz}-{spec.keep}"


def rows(b: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_is_product(y: torch.Tensor, x: torch.Tensor, matrix: np.ndarray, spec: ProjectionSpec) -> None:
    """y = x S^T up to float32 sums: at most the number of terms, and a rounding per scale and reduction."""
    s = torch.from_numpy(matrix)
    magnitudes = x.double().abs() @ s.abs()
    terms = int((s != 0).sum(0).max()) + 16
    bound = sum_error_bound(magnitudes, terms)
    if spec.kind == "gaussian":
        bound += x.double().abs().sum(1, keepdim=True) * NORMAL_ERROR * spec.scale
    error = (y.double() - x.double() @ s).abs()
    assert (error <= bound + 1e-30).all(), float((error / (bound + 1e-30)).max())


# ------------------------------------------------------------------------------------------- the matrix itself
@pytest.mark.parametrize(
    "vector", VECTORS["sparse"], ids=lambda v: f"{v['spec']['kind']}-{v['spec']['dim']}-{v['p']}"
)
def test_buckets_and_signs_are_the_committed_integers(vector: dict, level: int) -> None:
    spec, p = ProjectionSpec.from_dict(vector["spec"]), vector["p"]
    bucket, sign = reference.coordinates(spec, np.array([p], np.uint64))
    assert bucket[:, 0].tolist() == vector["buckets"] and sign[:, 0].tolist() == vector["signs"]
    y = project(torch.ones(1, 1), spec, p)[0]
    want = torch.zeros(spec.dim)
    want[vector["buckets"]] = torch.tensor(vector["signs"]).float() * torch.tensor(
        spec.scale, dtype=torch.float32
    )
    assert torch.equal(y, want)


@pytest.mark.parametrize("vector", VECTORS["dense"], ids=lambda v: f"{v['spec']['kind']}-{v['p']}")
def test_dense_entries_are_the_committed_numbers(vector: dict, level: int) -> None:
    spec, p = ProjectionSpec.from_dict(vector["spec"]), vector["p"]
    entries = reference.dense_block(spec, np.array([p], np.uint64))[0]
    want = np.array(vector["entries"])
    tolerance = 0 if spec.kind == "rademacher" else 1e-12
    assert np.abs(entries[vector["columns"]] - want).max() <= tolerance
    y = project(torch.ones(1, 1), spec, p)[0, vector["columns"]].double().numpy() / spec.scale
    assert np.abs(y - want).max() <= (2.0**-22 if spec.kind == "rademacher" else NORMAL_ERROR)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("offset", [0, 5, 123_457, 2**31 - 1000, 2**32 - 999, 2**40 + 3])
def test_equals_the_explicit_matrix(spec: ProjectionSpec, offset: int, level: int) -> None:
    matrix = reference.matrix(spec, offset, P)
    x = rows(3, P)
    assert_is_product(project(x, spec, offset), x, matrix, spec)
    y = rows(3, spec.dim, seed=1)
    assert_is_product(project_transpose(y, spec, P, offset), y, matrix.T, spec)


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_widened_not_rounded(spec: ProjectionSpec, dtype: torch.dtype, level: int) -> None:
    x = rows(2, P, dtype)
    assert torch.equal(project(x, spec, 77), project(x.float(), spec, 77))


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_reference_backend_agrees_and_sums_in_float64(spec: ProjectionSpec) -> None:
    x, y = rows(4, P).double(), rows(4, spec.dim, seed=2).double()
    sx, sty = project(x, spec, 9, backend="reference"), project_transpose(y, spec, P, 9, backend="reference")
    assert sx.dtype == torch.float64
    torch.testing.assert_close((sx * y).sum(), (x * sty).sum(), rtol=1e-11, atol=1e-9)  # adjointness
    matrix = torch.from_numpy(reference.matrix(spec, 9, P))
    torch.testing.assert_close(sx, x @ matrix, rtol=1e-11, atol=1e-9)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of memory under /proc")
def test_draws_of_narrow_tiles_take_little_memory() -> None:
    """The buckets of 64 nonzeros with one bucket each were drawn for 2^18 columns of float64 rows at a time: 134 MB."""
    spec, x = ProjectionSpec(64, kind="sjlt", nnz=64), rows(1, 1 << 16, torch.float64)

    def peak() -> int:
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        )
        return int(status["VmHWM"].split()[0])

    project(x[:, :1], spec, backend="cpu")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = peak()
    y = project(x, spec, backend="cpu")
    assert peak() - before < 25_000  # the table of all columns: 34 MB
    right = x[:, :20_000] @ torch.from_numpy(reference.matrix(spec, 0, 20_000))
    right += project(x[:, 20_000:], spec, 20_000, backend="reference")
    torch.testing.assert_close(y, right, rtol=1e-11, atol=1e-9)


def test_sparse_kinds_give_equal_bits_on_every_instruction_set() -> None:
    native, x = _native.native(), rows(2, 70_001)
    before, got = native.current_level(), {}
    wide = rows(1, (1 << 18) + 999, torch.float64)  # more columns than are drawn at a time
    for spec in SPECS:
        for wanted in (1, 3, 4):
            native.set_level(wanted)
            if spec.sparse:
                to = rows(2, spec.dim, seed=1)
                ys = project(x, spec, 31), project(x, spec, 31, out=to), project(wide, spec, backend="cpu")
                got.setdefault(spec, []).append(ys)
    native.set_level(before)
    assert got and all(
        torch.equal(y, first)
        for results in got.values()
        for ys in results
        for y, first in zip(ys, results[0])
    )


# ---------------------------------------------------------------------------------------------- cuts of the work
@pytest.mark.parametrize(
    "spec",
    [ProjectionSpec(512), ProjectionSpec(96, kind="sjlt", nnz=2), ProjectionSpec(64, kind="gaussian")],
    ids=spec_id,
)
def test_thread_count_and_neighbours_do_not_change_a_bit(spec: ProjectionSpec) -> None:
    x = rows(33, 300_007 if spec.sparse else 20_011)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(project(x, spec, 5))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for b in (1, 7, 8):
        order = torch.randperm(33, generator=torch.Generator().manual_seed(b))[:b]
        assert torch.equal(project(x[order], spec, 5), results[0][order])


@pytest.mark.parametrize("spec", SPECS, ids=spec_id)
def test_chunks_and_shards_add_up(spec: ProjectionSpec) -> None:
    x = rows(3, P)
    out = torch.zeros(3, spec.dim)
    for begin, end in ((1000, 1001), (0, 1000), (2048, P), (1001, 2048)):
        assert project(x[:, begin:end], spec, 50 + begin, out=out) is out
    assert_is_product(out, x, reference.matrix(spec, 50, P), spec)
    halves = [project_transpose(out, spec, n, 50 + begin) for begin, n in ((0, 1234), (1234, P - 1234))]
    assert torch.equal(torch.cat(halves, 1), project_transpose(out, spec, P, 50))


def test_numbers_that_are_stored_without_their_sign() -> None:
    """The imaginary part of a conjugate is a view that PyTorch negates wherever it is read."""
    x = torch.randn(3, 1, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    out = project(x, ProjectionSpec(64), out=torch.zeros(3, 64))
    assert out.any() and torch.equal(out, project(x.clone(), ProjectionSpec(64)))


def test_strided_rows_and_columns() -> None:
    spec, big = ProjectionSpec(128), rows(6, 5000)
    rows_view, columns_view = big[::2, 100:4100], big.T[:4000:3]
    assert torch.equal(project(rows_view, spec, 3), project(rows_view.contiguous(), spec, 3))
    assert_is_product(project(columns_view, spec), columns_view, reference.matrix(spec, 0, 6), spec)
    wide = rows(3000, 3).T  # columns strided: copied piece by piece
    assert_is_product(project(wide, spec, 8), wide, reference.matrix(spec, 8, 3000), spec)
    assert project(big[:0], spec).shape == (0, 128) and not project(big[:, :0], spec).any()


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_error_does_not_jump_where_indices_pass_2_31_and_2_32(share: float) -> None:
    """Rows lie 2^31 + 7 elements apart in memory that is reserved and never touched, so b * stride passes 2^32."""
    import mmap

    spec, stride, n = ProjectionSpec(256, keep=share), 2**31 + 7, 5000
    size = 2 * (2 * stride + n)  # three bfloat16 rows
    memory = mmap.mmap(
        -1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    )
    flat = torch.frombuffer(memory, dtype=torch.bfloat16)
    x = flat.as_strided((3, n), (stride, 1))
    x.copy_(rows(3, n))
    for offset in (0, 2**31 - 2500, 2**32 - 2500, 3 * 2**32 - 2500):
        assert_is_product(project(x, spec, offset), x, reference.matrix(spec, offset, n), spec)


def test_kept_coordinates_are_a_uniform_share_of_all() -> None:
    spec = ProjectionSpec(64, keep=0.1, seed=3)
    for first in (0, 15_000_000, 2**32):
        kept = reference.kept_coordinates(spec, np.arange(200_000, dtype=np.uint64) + np.uint64(first))
        sigma = (0.1 * 0.9 / 200_000) ** 0.5
        assert abs(kept.mean() - spec.keep_count / 65536) < 5 * sigma
        lag = (kept[1:] & kept[:-1]).mean()  # neighbours are kept independently
        assert abs(lag - kept.mean() ** 2) < 5 * sigma


# ----------------------------------------------------------------------------------------- not a number, and outputs
@pytest.mark.parametrize(
    "spec",
    [ProjectionSpec(128), ProjectionSpec(64, kind="sjlt", nnz=4), ProjectionSpec(32, kind="gaussian")],
    ids=spec_id,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_named_and_the_others_are_right(
    spec: ProjectionSpec, value: float
) -> None:
    x = rows(9, P)
    want = project(x, spec)
    x[6, 1234] = value
    with pytest.warns(RuntimeWarning, match=r"1 row\(s\) of x .*offset 0\): 6;"):
        y = project(x, spec)
    assert y[6].isnan().all()
    others = [b for b in range(9) if b != 6]
    assert torch.equal(y[others], want[others])
    with pytest.raises(ValueError, match=": 6;"):
        project(x, spec, nonfinite="raise")


def test_a_row_that_failed_is_named_once_in_a_stream(recwarn: pytest.WarningsRecorder) -> None:
    spec, x = ProjectionSpec(64), rows(3, 1000)
    x[1, 5] = torch.nan
    out = torch.zeros(3, 64)
    for begin in range(0, 1000, 250):
        project(x[:, begin : begin + 250], spec, begin, out=out)
    assert out.isnan().all(1).tolist() == [False, True, False]
    assert len([w for w in recwarn if w.category is RuntimeWarning]) == 1


@pytest.mark.parametrize("dim, blocks", [(512, 4), (96, 3), (7, 7)])
def test_quantized_rows_hold_their_error_bounds(dim: int, blocks: int) -> None:
    """As in a store: a scale for every gcd(dim, 128) numbers in int8, one power of two a row in float16."""
    y = rows(4, dim) ** 3 * torch.tensor([[1e-20], [1.0], [1e20], [0.0]])
    q8, q16 = quantize_rows(y, torch.int8), quantize_rows(y, torch.float16)
    assert q8.values.dtype == torch.int8 and q16.values.dtype == torch.float16
    assert q8.scale.shape == (4, blocks) and q16.scale.shape == (4, 1)
    step = (
        y.view(4, blocks, -1).abs().amax(2, keepdim=True).expand(4, blocks, dim // blocks).reshape(4, dim)
        / 127
    )
    assert ((q8.float() - y).abs() <= step * 0.5001).all()
    largest = y.abs().amax(1, keepdim=True)
    assert ((q16.float() - y).abs() <= y.abs() * 2.0**-11 + largest * 2.0**-25).all()
    y[1, 3] = torch.inf
    broken = quantize_rows(y, torch.int8)
    bad = broken.scale.isnan()
    assert (
        bad.nonzero().tolist() == [[1, 3 * blocks // dim]]
        and not broken.values.view(4, blocks, -1)[bad].any()
    )
    assert quantize_rows(y, torch.float16).float().isnan().all(1).tolist() == [False, True, False, False]


def test_rows_on_meta_have_shapes_and_sparse_rows_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch spoke of nonzero, of autocast, or of copying out of a meta tensor; without Triton, to install it was the
    remedy."""
    monkeypatch.setattr(_triton, "import_error", lambda: "triton is not installed")
    x, spec = torch.empty(3, 100, device="meta"), ProjectionSpec(64)
    y = project(x, spec, nonfinite="raise")
    assert y.is_meta and y.shape == (3, 64)
    for dtype in (torch.int8, torch.float16):
        held = quantize_rows(y, dtype)
        assert held.values.shape == (3, 64) and held.scale.shape == (3, 1)
    assert project(x, spec, out=y) is y
    with pytest.raises(ValueError, match=r"^y: the tensor has the layout torch.sparse_coo: give a dense"):
        quantize_rows(torch.ones(2, 4).to_sparse(), torch.int8)


# ------------------------------------------------------------------------------------------------ torch integration
def test_gradient_is_the_adjoint_and_operators_are_well_formed() -> None:
    spec = ProjectionSpec(48, kind="sjlt", nnz=3)
    x, y = rows(2, 200).requires_grad_(), rows(2, 48, seed=3).requires_grad_()
    (project(x, spec, 4) * y.detach()).sum().backward()
    assert torch.equal(x.grad, project_transpose(y.detach(), spec, 200, 4))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(torch.ops.cropi.project, (x, 4, spec.recipe, None), test_utils=checks)
    library.opcheck(torch.ops.cropi.project_transpose, (y, 200, 4, spec.recipe, None), test_utils=checks)


# --------------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(dim=0), "dim=0: give an integer from 1"),
        (dict(dim=8.0), "dim=8.0: give an integer"),
        (dict(dim=64, kind="srht"), "kind='srht': choose one of countsketch"),
        (dict(dim=64, nnz=2), "nnz=2 needs kind='sjlt'"),
        (dict(dim=64, kind="sjlt", nnz=3), "nnz=3 must divide dim=64"),
        (dict(dim=64, keep=0.0), r"keep=0.0: give the share .* \(0, 1\]"),
        (dict(dim=64, keep=1e-9), "keep=1e-09 rounds to 0"),
        (dict(dim=64, seed=-1), "seed=-1: give an integer >= 0"),
        (dict(dim=64, size=0), "size=0"),
        (dict(dim=64, version=2), "version=2: this build defines version 1"),
    ],
)
def test_spec_errors(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectionSpec(**fields)


@pytest.mark.parametrize(
    ("x", "offset", "message"),
    [
        (torch.zeros(2, 101), 0, "columns 0 .. 101 do not fit: the spec has size=100"),
        (torch.zeros(2, 10), 95, "columns 95 .. 105 do not fit"),
        (torch.zeros(2, 10), -1, "offset=-1"),
        (torch.zeros(2, 10), 1.5, "offset=1.5"),
        (torch.zeros(2, 10), 2**62, "stay below 2\\^62"),
        (torch.zeros(10), 0, r"shape \(10,\): it must be \[B, P\]; x\[None\] for one row"),
        (torch.zeros(2, 5, 2), 0, "flatten the parameters"),
        (torch.zeros(2, 10, dtype=torch.int64), 0, "x is torch.int64: give float32"),
        (torch.zeros(2, 10).to_sparse(), 0, "sparse layout"),
        (np.zeros((2, 10)), 0, "x is of type ndarray: give a torch.Tensor"),
    ],
)
def test_input_errors(x: torch.Tensor, offset: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project(x, ProjectionSpec(16, size=100), offset)


@pytest.mark.parametrize("name", ["x", "out"])
def test_out_is_not_touched_where_autograd_is_asked_for(name: str) -> None:
    given = {"x": torch.ones(2, 100), "out": torch.zeros(2, 64)}
    given[name].requires_grad_()
    with pytest.raises(ValueError, match=rf"out cannot take part in autograd: pass {name}.detach\(\)"):
        project(given["x"], ProjectionSpec(64), out=given["out"])
    assert not given["out"].any()


def test_other_errors() -> None:
    spec, x = ProjectionSpec(16), torch.zeros(2, 10)
    with pytest.raises(ValueError, match="spec is of type int: give a cropi_kernels.ProjectionSpec"):
        project(x, 16)  # type: ignore[call-overload]
    with pytest.raises(RuntimeError, match="no kernel of project serves this call: dtype torch.float64"):
        project(x.double(), spec)
    with pytest.raises(RuntimeError, match="serves this call: the tensor is on meta, not on a CUDA"):
        choose(x.to("meta"), spec, None)
    with pytest.raises(ValueError, match="out is torch.float32"):
        project(x, spec, out=torch.zeros(2, 8))
    with pytest.raises(ValueError, match="out is of type ndarray"):
        project(x, spec, out=np.zeros((2, 64), np.float32))  # type: ignore[arg-type]
    for wrong in ("fast", ""):
        with pytest.raises(ValueError, match=f"backend='{wrong}': choose one of"):
            project(x, spec, backend=wrong)
    with pytest.raises(ValueError, match=r"must be \[B, 16\]"):
        project_transpose(x, spec, 10)
    with pytest.raises(ValueError, match="unknown projection field 'width'"):
        ProjectionSpec.from_dict({"dim": 16, "width": 8})
    assert ProjectionSpec.from_dict(spec.to_dict()) == spec
    assert spec.fingerprint() != ProjectionSpec(16, seed=1).fingerprint()


@pytest.mark.skipif(_triton.import_error() is not None, reason="without Triton, CUDA C++ is the only one")
def test_of_two_backends_on_a_device_the_faster_one_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_cuda, _triton):
        monkeypatch.setattr(module, "unsupported", lambda *tensors: None)
    x = torch.zeros(2, 10, device="meta")
    thinned, several = ProjectionSpec(4096, keep=0.1), ProjectionSpec(4096, kind="sjlt", nnz=4)
    odd, dense = ProjectionSpec(5000), ProjectionSpec(64, kind="gaussian")
    for spec, adjoint, served_by in (
        (ProjectionSpec(4096), False, "cuda"), (ProjectionSpec(4096), True, "triton"), (thinned, False, "triton"),
        (several, False, "triton"), (odd, True, "cuda"), (dense, False, "cuda"), (dense, True, "cuda"),
    ):  # fmt: skip
        assert choose(x, spec, None, adjoint).__name__.rpartition(".")[2] == served_by, (spec, adjoint)
        assert choose(x, spec, "cuda", adjoint).__name__.endswith(".cuda"), "by name it is what was named"


def test_vectors_are_what_the_document_says() -> None:
    import subprocess
    import sys

    maker = Path(__file__).parent / "vectors" / "make_project.py"
    done = subprocess.run([sys.executable, str(maker), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
