"""A trial run of a model after which its buffers, gradients and flags, and the random numbers, are as before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

HOOKS = "_post_accumulate_grad_hooks"
KEPT_BYTES = 256 << 20  # of copies of buffers, the smallest first: those of a quantised base hold its weights


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, the model's buffers, its modules' modes and torch's random numbers are the same after.

    Forward passes change more than their result: BatchNorm's statistics, a router's counts of tokens, the table of a
    rotary embedding that has grown. Where such a buffer is too large for a copy (`KEPT_BYTES` in all), a write to it
    raises an error that names it.
    """
    kept = _Buffers(model)
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, training in modes:
            module.training = training
        kept.restore()


class _Buffers:
    def __init__(self, model: nn.Module) -> None:
        self.held = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]
        self.names = {id(b): n for n, b in model.named_buffers()}
        self.versions = {id(b): b._version for _, _, b in self.held}
        self.copies: dict[int, torch.Tensor] = {}
        left = KEPT_BYTES
        for buffer in sorted({id(b): b for _, _, b in self.held}.values(), key=torch.Tensor.numel):
            left -= buffer.numel() * buffer.element_size()
            if left < 0:
                break
            self.copies[id(buffer)] = buffer.detach().clone()

    def restore(self) -> None:
        lost = []
        for module, name, buffer in self.held:
            module._buffers[name] = buffer  # it may have been replaced by another tensor
            if buffer._version != self.versions[id(buffer)]:
                if id(buffer) in self.copies:
                    with torch.no_grad():
                        buffer.copy_(self.copies[id(buffer)])
                    self.versions[id(buffer)] = buffer._version
                else:
                    lost.append(self.names[id(buffer)])
        if lost:
            raise RuntimeError(
                f"a forward pass writes to buffers of more than {KEPT_BYTES >> 20} MiB, which a trial run cannot put "
                f"back: {', '.join(lost)}; leave the trial out: verify=False"
            )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model.eval()`` inside. Afterwards every module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def thawed(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """The parameters with ``requires_grad``, for a while."""
    before = [(p, p.requires_grad) for p in parameters]
    try:
        for p, _ in before:
            p.requires_grad_(True)
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


@contextlib.contextmanager
def nothing_kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A backward pass inside leaves no gradient in the parameters, and runs none of the hooks that wait for one (an
    optimizer's step in the backward pass)."""
    before = [(p, p.grad, getattr(p, HOOKS)) for p in parameters]
    handles = []
    for p, _, _ in before:
        p.grad = None
        setattr(p, HOOKS, None)
        handles.append(p.register_post_accumulate_grad_hook(_forget))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for p, grad, hooks in before:
            p.grad = grad
            setattr(p, HOOKS, hooks)


def _forget(p: torch.Tensor) -> None:
    p.grad = None
