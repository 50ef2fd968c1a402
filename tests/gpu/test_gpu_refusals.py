"""What a call says that no kernel can serve: operands on several devices, of a wrong dtype, no Triton, an old GPU.

Every message names the argument, what is wrong with it and the remedy. The GPU's side runs without one: tensors that
only pretend to be on it are enough to be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.op_calls import OFFSETS, OPS, OUT, ROWS, TIED, A
from torch._subclasses.fake_tensor import FakeTensorMode

from cropi_kernels import ProjectionSpec, _cuda, _gpu, _triton, dispatch, sketch_embedding
from cropi_kernels.ops._checks import on_device
from cropi_kernels.ops.project import reference as project_reference
from cropi_kernels.ops.project.ops import choose

ONE_BY_ONE = [(op, name) for op, call in OPS.items() for name in call.operands]


def spoilt(op: str, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], Any]:
    return lambda: OPS[op](**{name: how(OPS[op].operands[name].clone())})


@pytest.mark.parametrize("op,name", ONE_BY_ONE)
def test_whole_numbers_are_refused(op: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is torch.int32.*float32"):
        spoilt(op, name, lambda t: t.int())()


@pytest.mark.parametrize("op,name", [(op, name) for op, name in ONE_BY_ONE if len(OPS[op].operands) > 1])
def test_operands_on_two_devices_are_refused(op: str, name: str) -> None:
    """`meta` stands for the other device: the ops look no further than where a tensor says it is."""
    with pytest.raises(ValueError, match=r"\w+ is (on|torch.float32 on) (meta|cpu).*move") as error:
        spoilt(op, name, lambda t: t.to("meta"))()
    assert "meta" in str(error.value) and "cpu" in str(error.value)


def test_row_ids_on_another_device_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"rows is on meta but x is on cpu: move them to one device \(rows.to\('cpu'\)\)"
    ):
        sketch_embedding(A, ROWS.to("meta"), OFFSETS, TIED, OUT.clone())


@pytest.mark.parametrize("op,name", [pair for pair in ONE_BY_ONE if pair[1] != "out"])
def test_any_strides_give_the_same_bits(op: str, name: str) -> None:
    """Transposed memory, rows apart, an odd start: copied or read where it lies, never misread."""

    def bits(how: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        got = spoilt(op, name, lambda t: how(torch.arange(t.numel()).view(t.shape).to(t.dtype)))()
        return got[0] if isinstance(got, tuple) else got

    want = bits(lambda t: t)
    assert torch.equal(bits(lambda t: t.t().contiguous().t()), want)
    apart = lambda t: torch.cat([t, t], 1)[:, : t.shape[1]] if t.ndim == 2 else torch.stack([t, t], 1)[:, 0]  # noqa: E731
    assert torch.equal(bits(apart), want)
    assert torch.equal(bits(lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)), want)


# ------------------------------------------------------------------------------------------------- GPUs
@pytest.mark.parametrize("op", OPS)
def test_without_triton_the_remedy_is_named(
    op: str, monkeypatch: pytest.MonkeyPatch, fresh_warnings: None
) -> None:
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_triton, "import_error", _triton.import_error.__wrapped__)
    with pytest.raises(
        RuntimeError, match=r"backend='triton' cannot run \w+: triton is not installed: .*pip install"
    ):
        OPS[op]("triton")


@pytest.mark.parametrize(
    "version,refused", [("3.2.0", True), ("3.3.1+git1", True), ("3.4.0", False), ("4.0", False)]
)
def test_a_triton_that_the_kernels_cannot_import_is_refused(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch 2.6 and 2.7 bring one: every op ended in ImportError, and explain() said that it was served."""
    monkeypatch.setattr(_triton.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(_triton.importlib.metadata, "version", lambda name: version)
    reason = _triton.import_error.__wrapped__()
    want = f"triton {version} is too old for the kernels: install torch>=2.11"
    assert (reason or "").startswith(want) if refused else reason is None


@pytest.mark.parametrize(
    "capability,version,refused",
    [
        ((10, 0), "3.6.0", True),
        ((12, 0), "3.7.0+git1234", True),
        ((10, 3), "3.7.1", False),
        ((12, 0), "3.10.0", False),
        ((9, 0), "3.6.0", False),
        ((8, 0), "3.6.0", False),
    ],
)
def test_a_triton_without_the_fence_is_refused_where_it_matters(
    capability: tuple[int, int], version: str, refused: bool
) -> None:
    reason = _triton.fence_reason(capability, version)
    assert (reason is not None) == refused
    if reason is not None:
        assert version in reason and "install triton>=3.7.1" in reason


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_kernel_does_not_run_on_the_cpu(op: str, fresh_warnings: None) -> None:
    with pytest.raises(
        RuntimeError, match="the tensor is on cpu, not on a CUDA device|triton is not installed"
    ):
        OPS[op]("triton")


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch, fresh_warnings: None) -> Iterator[torch.Tensor]:
    """A tensor that says it is on a GPU of compute capability 7.5."""
    monkeypatch.setattr(_triton, "import_error", lambda: None)
    monkeypatch.setattr(_gpu, "_device_reason", _gpu._device_reason.__wrapped__)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with FakeTensorMode():
        tensor = torch.empty(4, 4, device="cuda:0")
        monkeypatch.setattr(type(tensor), "data_ptr", lambda self: 0)  # it has no memory
        yield tensor


def test_an_old_gpu_is_named(old_gpu: torch.Tensor) -> None:
    reason = "Tesla T4 has compute capability 7.5; the kernels need 8.0 or newer"
    assert reason in str(_triton.unsupported(old_gpu))
    with pytest.raises(RuntimeError, match=f"backend='triton' cannot run bias_grad: {reason}"):
        dispatch.choose("bias_grad", old_gpu, backend="triton")
    with pytest.warns(UserWarning, match=f"bias_grad runs on the plain torch reference.*{reason}"):
        assert dispatch.choose("bias_grad", old_gpu) == "reference"
    assert dispatch.choose("bias_grad", old_gpu) == "reference", "said once"


def test_a_gpu_without_a_cuda_build(old_gpu: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "this build of torch has no CUDA" in str(_triton.unsupported(old_gpu))


def test_a_cuda_build_on_a_machine_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "import_error", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA device" in dispatch.explain()


def test_a_projection_that_no_gpu_kernel_serves(
    old_gpu: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense kinds have a CUDA C++ kernel only: both reasons are shown. float64 is refused, not served slowly."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(_cuda, "_installed", lambda: (None, "the CUDA kernels were not built"))
    dense = ProjectionSpec(4, kind="gaussian")
    with pytest.warns(
        UserWarning,
        match=r"gaussian projections have no Triton kernel; CUDA C\+\+: the CUDA kernels were not built",
    ):
        assert choose(old_gpu, dense, None) is project_reference
    with pytest.raises(
        RuntimeError, match="no kernel of project serves this call: dtype torch.float64 .*backend='reference'"
    ):
        choose(old_gpu.double(), ProjectionSpec(4), None)


def test_an_address_between_two_elements() -> None:
    x = torch.frombuffer(bytearray(4 * 40 + 1), dtype=torch.float32, offset=1, count=40)
    reason = _triton.unsupported(x)
    if _triton.import_error() is None:
        assert reason is not None and "not a multiple of its 4-byte elements: give a clone" in reason


def test_offsets_of_the_host_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match=r"a CUDA graph cannot record the copy: give offsets.to\('cuda:0'\)"
    ):
        on_device(OFFSETS, torch.device("cuda:0"))
