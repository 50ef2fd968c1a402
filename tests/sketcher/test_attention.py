"""cuDNN's attention serves no pass whose backward it may get wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from support import zoo

from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher import formed, gradient_sketcher
from cropi_kernels.sketcher.model.attention import right_backward


@pytest.mark.parametrize(
    "kind, length, chosen", [("cuda", 704, False), ("cuda", 640, True), ("cpu", 704, True)]
)
def test_cudnn_is_left_out_where_half_a_tile_is_left_over(kind: str, length: int, chosen: bool) -> None:
    switched, device = torch.backends.cuda.cudnn_sdp_enabled, torch.device(kind)
    assert switched()
    with contextlib.suppress(ZeroDivisionError), right_backward(device, length):
        assert switched() == chosen
        raise ZeroDivisionError
    assert switched()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with right_backward(device, length):
            assert not switched()
        assert not switched(), "the caller's own choice"
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_forward_and_backward_of_a_pass_are_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    inside: list[int] = []

    @contextlib.contextmanager
    def noted(device: torch.device, length: int) -> Iterator[None]:
        inside.append(length)
        yield
        inside.clear()

    batch, model = zoo.padded(), zoo.make("llama")
    spec = SketchSpec(width=16, vocab_width=64)
    monkeypatch.setattr(gradient_sketcher, "right_backward", noted)
    monkeypatch.setattr(formed, "right_backward", noted)
    seen: list[list[int]] = []

    def see(*args: object) -> None:
        seen.append(list(inside))

    layer = model.get_submodule("model.layers.0.mlp")
    with layer.register_forward_hook(see), layer.register_full_backward_hook(see):
        for sketcher in (GradientSketcher(model, spec, verify=False), formed.FormedSketcher(model, spec)):
            with sketcher:
                for _ in range(2):  # before the first pass the model is looked at
                    seen.clear()
                    sketcher.policy_gradient(
                        batch.input_ids,
                        segments=batch.segments,
                        positions=batch.positions,
                        targets=batch.targets,
                        weigh=lambda logprobs, *_: torch.ones_like(logprobs),
                        num_segments=zoo.N_SEGMENTS,
                        attention_mask=batch.attention_mask,
                    )
            assert len(seen) >= 2 and all(lengths == [batch.input_ids.shape[1]] for lengths in seen)
