"""What a forward leaves in memory until backward: with taps, the folded inputs more than without, in any dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import zoo
from support.versions import NAMED_HOOKS
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher.model.hooks import widened_input
from cropi_kernels.sketcher.taps import taps

SPEC = SketchSpec(width=16, vocab_width=64)


class Live(TorchDispatchMode):
    """Every storage that an operator makes, and which of them are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for ref, size in self.seen.values() if not ref.expired())


def left_by_forward(model: nn.Module, batch: zoo.Batch, sketched: bool) -> int:
    """Bytes that a forward of the decoder leaves for backward; without taps the weights are frozen as well."""
    shape = tuple(batch.input_ids.shape)
    decoder, embed = model.model, model.get_input_embeddings()  # type: ignore[operator]
    live = Live()

    def forward() -> int:
        with live:
            hidden = decoder(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)  # type: ignore[operator]
        left = live.bytes()
        hidden.last_hidden_state.sum().backward()  # a batch without a backward pass is an error
        return left

    if sketched:
        sketcher = GradientSketcher(model, SPEC, verify=False)  # the head gets no gradient
        with sketcher, sketcher.batch(batch.segments, shape=shape):  # type: ignore[arg-type]
            return forward()
    model.requires_grad_(False)
    handle = embed.register_forward_hook(lambda m, a, y: y.detach().requires_grad_(True))
    try:
        return forward()
    finally:
        handle.remove()
        model.requires_grad_(True)


@NAMED_HOOKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "olmo2"])
def test_taps_keep_the_folded_inputs_and_nothing_else(family: str, dtype: torch.dtype) -> None:
    model, batch = zoo.make(family, dtype, hidden_size=64, intermediate_size=80), zoo.padded()
    tokens = batch.input_ids.numel()
    plain = left_by_forward(model, batch, False)
    copies = 2 * 4 * tokens * SPEC.width * dtype.itemsize  # type: ignore[operator]
    assert left_by_forward(model, batch, True) - plain == copies


@NAMED_HOOKS
def test_the_copy_in_the_graph_gives_the_bits_of_the_input_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.make("gemma2", torch.bfloat16), zoo.padded()
    found = []

    def spy(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        found.append(widened_input(x, y))
        return found[-1]

    with GradientSketcher(model, SPEC) as sketcher:
        sketcher.check_model()  # runs the model too
        monkeypatch.setattr(taps, "widened_input", spy)
        with_copy = batch.sketch(sketcher).sketches
        monkeypatch.setattr(taps, "widened_input", lambda x, y: None)
        with_input = batch.sketch(sketcher).sketches
    assert len(found) == 2 * 4 + 1 and all(x is not None and x.dtype == torch.float32 for x in found)
    assert torch.equal(with_copy, with_input)


@NAMED_HOOKS
def test_only_a_cast_of_the_input_itself_is_taken() -> None:
    leaf = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    x = leaf * 2

    def norm(wide: torch.Tensor) -> torch.Tensor:
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(torch.bfloat16)

    found = widened_input(x, norm(x.float()))
    assert found is not None and torch.equal(found, x.float()) and not found.requires_grad
    assert widened_input(x, norm(x.float() + 1)) is None
    assert widened_input(x, norm((x + 1).float())) is None
    assert widened_input(x, norm(leaf.float())) is None
    assert widened_input(x.float(), norm(x.float())) is None
    with torch.autograd.graph.save_on_cpu():
        assert widened_input(x, norm(x.float())) is None
