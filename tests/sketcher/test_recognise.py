"""Modules are known by what they compute, whatever stands around or in place of their forward."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
import transformers
from torch import nn

from cropi_kernels.sketcher.model.recognise import embedding_scale, is_conv1d, is_linear, norm_of


def conv1d() -> nn.Module:
    return transformers.pytorch_utils.Conv1D(5, 8)


PLAIN = {"linear": (lambda: nn.Linear(8, 5), is_linear), "Conv1D": (conv1d, is_conv1d)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", PLAIN)
def test_a_forward_in_place_of_the_classes_own_is_tried(case: str, dtype: torch.dtype) -> None:
    make, known = PLAIN[case]
    module = make().to(dtype)
    plain = module.forward
    assert known(module)
    module.forward = lambda x: plain(x)  # a wrapper that changes nothing
    assert known(module)
    module.forward = lambda x: plain(x) + 1
    assert not known(module)
    module.forward = lambda x: plain(2 * x)
    assert not known(module)


def test_accelerates_wrapper_changes_nothing() -> None:
    accelerate = pytest.importorskip("accelerate")
    linear, norm = nn.Linear(8, 5), nn.LayerNorm(8)
    for module in (linear, norm):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    assert is_linear(linear) and norm_of(norm) == (True, 1e-5)
    offloaded = nn.Linear(8, 5, device="meta")  # its weights come when it is called
    accelerate.hooks.add_hook_to_module(offloaded, accelerate.hooks.ModelHook())
    assert is_linear(offloaded)


def test_hooks_of_others_are_not_asked() -> None:
    """Taps stand before them."""
    linear, norm, words = nn.Linear(8, 5), nn.RMSNorm(8, 1e-6), nn.Embedding(7, 8)
    for module in (linear, norm, words):
        module.register_forward_hook(lambda m, args, y: 2 * y)
        module.register_forward_pre_hook(lambda m, args: 1 / 0)
    assert is_linear(linear) and norm_of(norm) == (False, 1e-6) and embedding_scale(words) == 1.0


def liger(name: str) -> nn.Module:
    """A norm whose forward is Liger's by its names, put on the instance as Liger does it; it runs on a GPU only."""

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    forward.__module__, forward.__qualname__ = f"liger_kernel.transformers.{name}", f"{name}.forward"
    norm = nn.Module()
    norm.weight, norm.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-5
    norm.forward = MethodType(forward, norm)  # type: ignore[method-assign]
    return norm


def test_ligers_norms_are_known_without_a_call() -> None:
    assert norm_of(liger("LigerRMSNorm")) == (False, 1e-5)
    assert norm_of(liger("LigerLayerNorm")) == (True, 1e-5)
    assert norm_of(liger("LigerFusedAddRMSNorm")) is None


def running_mean(x: torch.Tensor) -> torch.Tensor:
    return x if x.ndim < 3 else x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[None, :, None]


def test_modules_that_mix_tokens_where_they_see_rows_are_not_known() -> None:
    class Linear(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(running_mean(x))

    class Norm(nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return running_mean(super().forward(x))

    assert not is_linear(Linear(8, 5)) and norm_of(Norm(8, 1e-6)) is None


def test_modules_that_see_tokens_in_one_axis_only_are_known() -> None:
    class Flat(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.ndim == 2
            return x @ self.weight.T + self.bias

    assert is_linear(Flat(8, 5))
