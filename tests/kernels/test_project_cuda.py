"""The CUDA kernels of `project` without a GPU: the same source on the host, block after block, and compiled by nvcc.

The emulation (csrc/cuda/emulate.cpp) runs every kernel's own code through the Python wrapper: indices, draws, shared
memory, the order of the sums and the launches are those of the GPU. Races: tools/ptx_emulator.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import nvcc
from support.once import once

import cropi_kernels
from cropi_kernels import ProjectionSpec, _cuda, _native, project, project_transpose
from cropi_kernels.ops.project import cuda, reference
from cropi_kernels.ops.project.ops import contiguous_columns
from cropi_kernels.testing import PROJECTION_CASES, projection_magnitudes, sum_error_bound

# The emulation is compiled first.
pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
INCLUDES = ["-std=c++17", f"-I{CSRC / 'include'}", f"-I{CSRC}"]


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler to build the emulation with (CXX names one)")

    def make(folder: Path) -> None:
        command = [compiler, "-O1", "-shared", "-fPIC", *INCLUDES, str(CSRC / "cuda" / "emulate.cpp")]
        done = subprocess.run([*command, "-o", str(folder / "emulate.so")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]

    return _cuda.load(once(tmp_path_factory, "emulation", make) / "emulate.so")


@pytest.fixture
def emulated(emulation: Any, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> Callable[..., torch.Tensor]:
    """`project` as on a GPU, on CPU tensors; fresh memory starts as NaN."""
    monkeypatch.setattr(_cuda, "kernels", lambda: emulation)

    def run(
        x: torch.Tensor, spec: ProjectionSpec, offset: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = torch.zeros(x.shape[0], spec.dim) if out is None else out
        for start, piece in contiguous_columns(x):
            cuda.project(piece, spec, out, offset + start)
        return out

    return run


def rows(b: int, n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(b, n, generator=torch.Generator().manual_seed(n)).to(dtype)


def assert_same_map(got: torch.Tensor, x: torch.Tensor, spec: ProjectionSpec, offset: int) -> None:
    """Equal to the CPU kernel up to the order of the float32 sums: the same terms, each with two roundings."""
    size = projection_magnitudes(x, spec, offset)
    # Rounded up generously.
    terms = 2 * (x.shape[1] if not spec.sparse else x.shape[1] * spec.nnz // spec.dim + 200) + 20
    error = (got.double() - project(x, spec, offset).double()).abs()
    assert (error <= 2 * sum_error_bound(size, terms) + 1e-30).all(), float(error.max())


@pytest.mark.parametrize("case", PROJECTION_CASES)
def test_emulated_kernel_is_the_cpu_kernel(case: str, emulated: Callable[..., torch.Tensor]) -> None:
    spec, n, offset = PROJECTION_CASES[case]
    x = rows(3 if n < 100_000 else 1, n)
    got = emulated(x, spec, offset)
    assert_same_map(got, x, spec, offset)
    for dtype in (torch.bfloat16, torch.float16):
        half = x[:1, : min(n, 20_000)].to(dtype)
        assert torch.equal(emulated(half, spec, offset), emulated(half.float(), spec, offset)), (
            "the order of the sums"
        )


@pytest.mark.parametrize("case", PROJECTION_CASES)
def test_emulated_adjoint_is_the_cpu_adjoint(case: str, emulated: Callable[..., torch.Tensor]) -> None:
    spec, n, offset = PROJECTION_CASES[case]
    n = min(n, 10_000)
    y, got = rows(9, spec.dim), torch.full((9, n), torch.nan)
    cuda.transpose(y, spec, got, offset)
    want = project_transpose(y, spec, n, offset)
    if spec.sparse:
        assert torch.equal(got, want)
    else:
        size = y.double().abs().sum(1, keepdim=True) * spec.scale * (6 if spec.kind == "gaussian" else 1)
        assert ((got - want).abs() <= 2 * sum_error_bound(size, spec.dim + 16)).all()


def test_buckets_and_signs_to_the_bit(emulated: Callable[..., torch.Tensor]) -> None:
    """One coordinate at a time has no order of sums: every bucket and every sign must be the CPU's."""
    for spec, n, offset in PROJECTION_CASES.values():
        x = torch.zeros(40, min(n, 2000))
        at = torch.randint(0, x.shape[1], (40,), generator=torch.Generator().manual_seed(0))
        x[torch.arange(40), at] = 1.0
        if spec.kind != "gaussian":
            assert torch.equal(emulated(x, spec, offset), project(x, spec, offset))


def test_cuts_of_the_call_change_no_bit_of_a_row(emulated: Callable[..., torch.Tensor]) -> None:
    spec, big = ProjectionSpec(512), rows(6, 5000, torch.bfloat16)
    view = big[::2, 104:4104]  # strided, 16-byte loads; from 103 on: single loads
    assert torch.equal(emulated(view, spec, 8), emulated(view.contiguous(), spec, 8))
    odd = big[:, 103:4103]
    assert torch.equal(emulated(odd, spec, 7), emulated(odd.contiguous(), spec, 7))
    assert torch.equal(emulated(big[2:3], spec, 7), emulated(big, spec, 7)[2:3])
    wide = rows(3000, 3).T
    assert_same_map(emulated(wide, spec, 8), wide.contiguous(), spec, 8)
    out = rows(6, 512)
    assert torch.equal(emulated(big, spec, 3, out.clone()), out + emulated(big, spec, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alignment_changes_no_bit_of_wide_tiles(
    dtype: torch.dtype, emulated: Callable[..., torch.Tensor]
) -> None:
    spec, x = ProjectionSpec(3088, keep=0.7), rows(2, 3088 * 40 + 5, dtype)
    even, odd = (torch.zeros(2, 3088 * 41, dtype=dtype)[:, i : i + x.shape[1]].copy_(x) for i in (0, 1))
    assert torch.equal(emulated(odd, spec, 32), emulated(even, spec, 32))


def test_a_part_of_more_tiles_than_have_their_places_at_once(emulated: Callable[..., torch.Tensor]) -> None:
    """Sums of small integers are exact in any order."""
    spec, n, offset = ProjectionSpec(1040 * 64, kind="sjlt", nnz=64), 1040 * 16 * 67, 1040 * 5  # 16 parts
    x = torch.randint(-9, 10, (1, n), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(emulated(x, spec, offset), project(x, spec, offset))


def test_chunks_add_up(emulated: Callable[..., torch.Tensor]) -> None:
    spec, x, out = ProjectionSpec(1024, kind="sjlt", nnz=2), rows(2, 9001), torch.zeros(2, 1024)
    for begin, end in ((4096, 9001), (0, 1001), (1001, 4096)):
        emulated(x[:, begin:end], spec, 50 + begin, out)
    assert_same_map(out, x, spec, 50)


def test_rows_beyond_2_32_elements(emulated: Callable[..., torch.Tensor]) -> None:
    """Rows 2^31 + 7 elements apart in memory that is reserved and hardly touched."""
    import mmap

    spec, stride, n = ProjectionSpec(256), 2**31 + 7, 5000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * (2 * stride + n), flags=flags)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((3, n), (stride, 1))
    x.copy_(rows(3, n))
    assert torch.equal(emulated(x, spec, 9), emulated(x.clone().contiguous(), spec, 9))


def test_not_a_number_stays_in_its_row_and_dropped_ones_are_skipped(
    emulated: Callable[..., torch.Tensor],
) -> None:
    spec, x = ProjectionSpec(256, keep=0.5), rows(3, 3000)
    want = emulated(x, spec)
    kept = reference.kept_coordinates(spec, torch.arange(3000).numpy().astype("uint64"))
    x[0, ~torch.from_numpy(kept)] = torch.nan
    x[1, int(kept.argmax())] = torch.inf
    got = emulated(x, spec)
    assert torch.equal(got[[0, 2]], want[[0, 2]]) and not got[1].isfinite().all()


def test_more_rows_than_the_workspace_holds(emulated: Callable[..., torch.Tensor], emulation: Any) -> None:
    spec, x = ProjectionSpec(65_536), rows(3, 70_000)
    x = x.expand(3, -1).repeat(90, 1)[:258]  # 256 KiB a row: groups of 256
    got = emulated(x, spec)
    assert torch.equal(got[:3], got[255:258]) and torch.equal(got[0], emulated(x[:1], spec)[0])


# ------------------------------------------------------------------------------------------------------ dispatch
def test_the_address_is_not_asked_for_as_that_of_a_cpus_memory(
    emulated: Callable[..., torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`_native.pointer` refuses a GPU's memory: on an H100, every call of these kernels was refused by it."""
    x, spec = rows(2, 5000), ProjectionSpec(512)
    monkeypatch.setattr(_native, "pointer", None)
    got = emulated(x, spec)
    monkeypatch.undo()
    assert_same_map(got, x, spec, 0)


def test_a_missing_build_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROPI_CUDA_LIBRARY", "no/such/file.so")
    _cuda._installed.cache_clear()
    try:
        assert _cuda._installed()[1] == "there is no no/such/file.so"
        with pytest.raises(ImportError, match="no/such/file"):
            _cuda.kernels()
        monkeypatch.setenv("CROPI_CUDA_LIBRARY", __file__)
        _cuda._installed.cache_clear()
        assert "do not load" in str(_cuda._installed()[1])
    finally:
        _cuda._installed.cache_clear()
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run project: the tensor is on cpu"):
        project(torch.zeros(1, 8), ProjectionSpec(16), backend="cuda")
    assert re.search(
        "^cuda +the tensor is on cpu, not on a CUDA device$", cropi_kernels.explain(torch.zeros(1)), re.M
    )


def test_the_struct_has_the_size_that_c_gives_it() -> None:
    source = (CSRC / "cuda" / "project_shape.h").read_text()
    fields = re.search(r"struct ProjectCall \{(.*?)\n\};", source, re.S)
    assert fields
    names = re.findall(r"(\w+)(?=[,;])", re.sub(r"//.*", "", fields[1]))
    mine = [name for name, _ in _cuda.ProjectCall._fields_]
    assert names == [n if n != "k0" else "key" for n in mine if n != "k1"]


# ------------------------------------------------------------------------------------------------------- compiled
# Registers are what a launch with these threads and blocks has; a few stage constants may live outside them.
LIMITS = {"ProjectSparse": (128, 64), "ProjectTiles": (128, 0), "ProjectSparseAdjoint": (40, 0), "AddParts": (64, 0),
          "ProjectDense": (128, 0), "ProjectDenseAdjoint": (128, 0)}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(nvcc.NVCC is None, reason="nvcc is not installed (PATH or CUDA_HOME)")
@pytest.mark.parametrize("architecture", [80, 90] if os.environ.get("CROPI_AOT") == "all" else [90])
@pytest.mark.parametrize("source", nvcc.SOURCES)
def test_nvcc_compiles_within_the_limits(
    source: str, architecture: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    said = (nvcc.compiled(tmp_path_factory, source, architecture) / "said.txt").read_text()
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers.*?(\d+) bytes smem"
    kernels = re.findall(pattern, said, re.S)
    assert kernels or source == "api", said
    for name, spills, registers, shared in kernels:
        kind = next(k for k in sorted(LIMITS, key=len, reverse=True) if k in name)
        assert int(registers) <= LIMITS[kind][0] and int(spills) <= LIMITS[kind][1], (name, registers, spills)
        assert int(shared) <= 48 * 1024, (name, shared)
