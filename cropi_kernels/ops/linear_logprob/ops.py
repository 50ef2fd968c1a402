"""Registration as PyTorch operators: schemas, shapes for tracing, kernels and the autograd formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import library

from ... import _native, dispatch
from ..._library import LIB, NAMESPACE, register
from . import chunks
from .contract import Kernels, RowMath, Settings, Stats

REMEDY = "a smaller chunk_size holds fewer logits at a time, fewer tokens a call make everything smaller"


def prepare(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    settings: Settings,
    *,
    whole: bool = False,
) -> chunks.Call:
    """Checks the values of ``targets``, chooses the backend and the chunk; ``whole``: logits are to exist as such."""
    head, targets = _native.aligned(head), _native.aligned(targets)
    vocab = head.shape[0]
    counted = targets != settings.ignore_index
    bad = counted & ((targets < 0) | (targets >= vocab))
    name = dispatch.choose(
        "linear_logprob",
        hidden,
        head,
        backend=settings.backend,
        without={"triton": _no_wide_products(hidden)},
    )
    # The host does not wait for a device to look: there a bad target gives NaN.
    poisoned = name == "triton" and targets.is_cuda
    if not poisoned and bool(bad.any()):
        index = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"targets[{index}]={int(targets[index])}: the head has {vocab} words, so a target is in [0, {vocab}) or "
            f"ignore_index={settings.ignore_index}; is this the tokenizer of another model?"
        )
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    bias = None if bias is None else _native.aligned(bias.detach().to(dtype).contiguous())
    math = RowMath(settings.temperature, settings.softcap)
    tiles = None if whole else _tiles(name, hidden, head, math)
    kept, tile = (dtype, chunks.TILE) if tiles is None else (head.dtype, tiles.TOKENS)
    chunk = settings.chunk_size or chunks.default_chunk(
        hidden.shape[0], vocab, kept.itemsize, on_device=hidden.is_cuda, tile=tile
    )
    target = targets.where(counted, -1)
    if poisoned:
        target = target.where(~bad, vocab)
    return chunks.Call(
        head.detach(),
        bias,
        target.contiguous(),
        math,
        _kernels(name, head.dtype),
        chunk,
        dtype,
        None if tiles is None else tiles.Tiles,
    )


def _tiles(name: str, hidden: torch.Tensor, head: torch.Tensor, math: RowMath) -> Any:
    """The module of the product that leaves the tensor cores as statistics, where it serves."""
    if name != "triton":
        return None
    from . import triton_tiles

    return triton_tiles if triton_tiles.serves(hidden, head, math) else None


def _kernels(name: str, dtype: torch.dtype) -> Kernels:
    module = dispatch.kernels(__package__, name)
    return module.DeviceKernels(dtype) if name == "triton" else module


def _no_wide_products(hidden: torch.Tensor) -> str | None:
    """Why the GPU path cannot have float32 logits from a product of half-width operands, or None."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2] if part.isdigit())
    if hidden.dtype == torch.float32 or version >= (2, 8):
        return None
    return f"torch {torch.__version__} has no product of {hidden.dtype} with a float32 result: install torch >= 2.8"


def _forward(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    entropy: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    call = prepare(hidden, head, targets, bias, Settings(*settings))
    stats = chunks.forward(hidden.detach(), call, entropy)
    absent = stats.logp.new_empty(0)
    return stats.logp, stats.top, stats.log_sum, absent if stats.entropy is None else stats.entropy


def _forward_fake(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    entropy: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    row = [hidden.new_empty(targets.shape[0], dtype=dtype) for _ in range(4)]
    return row[0], row[1], row[2], row[3] if entropy else hidden.new_empty(0, dtype=dtype)


def _backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    logp: torch.Tensor,
    top: torch.Tensor,
    log_sum: torch.Tensor,
    *settings: Any,
) -> torch.Tensor:
    call = prepare(hidden, head, targets, bias, Settings(*settings))
    stats = Stats(logp.contiguous(), top.contiguous(), log_sum.contiguous(), None)
    grad = grad.to(logp.dtype).contiguous()
    return chunks.backward(grad, hidden.detach(), call, stats)


def _backward_fake(grad: torch.Tensor, hidden: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, head, targets, bias, _, *ctx.settings = inputs
    logp, top, log_sum, entropy = output
    ctx.save_for_backward(hidden, head, targets, bias, logp, top, log_sum)
    ctx.mark_non_differentiable(top, log_sum, entropy)


def _autograd(ctx: Any, grad: torch.Tensor | None, *others: torch.Tensor | None) -> tuple[Any, ...]:
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
        raise RuntimeError("cropi::linear_logprob forms no gradient for head or bias: detach them")
    hidden, head, targets, bias, logp, top, log_sum = ctx.saved_tensors
    if grad is None or not ctx.needs_input_grad[0]:
        return (None,) * 10
    dhidden = torch.ops.cropi.linear_logprob_backward(
        grad, hidden, head, targets, bias, logp, top, log_sum, *ctx.settings
    )
    return (dhidden,) + (None,) * 9


def _no_second(ctx: Any, grad: torch.Tensor) -> None:
    """Without it torch warns once and goes on with zeros."""
    raise RuntimeError("linear_logprob has no second derivative: differentiate it once (no create_graph)")


register(
    "linear_logprob(Tensor hidden, Tensor head, Tensor targets, Tensor? bias, bool entropy, "
    "float temperature, float softcap, int ignore_index, int chunk_size, str? backend) "
    "-> (Tensor logp, Tensor top, Tensor log_sum, Tensor entropy)",
    _forward, _forward_fake, remedy=REMEDY,
)  # fmt: skip
register(
    "linear_logprob_backward(Tensor grad, Tensor hidden, Tensor head, Tensor targets, Tensor? bias, Tensor logp, "
    "Tensor top, Tensor log_sum, float temperature, float softcap, int ignore_index, int chunk_size, str? backend) "
    "-> Tensor",
    _backward, _backward_fake, remedy=REMEDY,
)  # fmt: skip
library.register_autograd(f"{NAMESPACE}::linear_logprob", _autograd, setup_context=_save, lib=LIB)
library.register_autograd(f"{NAMESPACE}::linear_logprob_backward", _no_second, lib=LIB)
