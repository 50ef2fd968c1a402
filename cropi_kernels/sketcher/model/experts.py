"""Mixtures of experts whose weights are fused parameters [experts, .., ..]: which module is one, and what it computes.

There are two interfaces: ``experts(hidden, expert ids, routing weights)``, which gathers each token once for every
expert that it goes to (transformers' experts interface), and ``experts(hidden)`` with a copy of all tokens for every
expert (Llama 4). `recognise_experts` does not trust a module's name: it compares what is computed here with the
module's own code, in float64 and on weights of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..._library import no_autocast
from .replaced import own_forward, parallel_of

Tapped = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


class Unsupported(Exception):
    """Experts that are not tapped; the message says why."""


@dataclasses.dataclass(frozen=True)
class Experts:
    """Names of the parameters of a module of experts.

    ``up`` gives gate and up, or up alone. ``transposed``: stored [experts, in, out], else [experts, out, in]. Biases
    are [experts, out]. ``repeated``: the module is given a copy of all tokens for every expert.
    """

    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    gated: bool
    transposed: bool
    repeated: bool

    def weight_of(self, bias: str) -> str:
        return self.up if bias == self.up_bias else self.down

    def matrices(self) -> tuple[str, ...]:
        return self.up, self.down

    def biases(self) -> tuple[str, ...]:
        return tuple(b for b in (self.up_bias, self.down_bias) if b is not None)

    def rows_and_cols(self, weight: torch.Tensor) -> tuple[int, int, int]:
        """(experts, outputs, inputs) of a fused weight."""
        n, rows, cols = weight.shape
        return (n, cols, rows) if self.transposed else (n, rows, cols)

    def stacked(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of a fused weight as the stacked matrix [experts * outputs, inputs] that is sketched."""
        return (gradient.transpose(1, 2) if self.transposed else gradient).flatten(0, 1)


# ------------------------------------------------------------------------------------------- what is computed
@dataclasses.dataclass(frozen=True)
class Order:
    """The order of tokens that are sorted by expert, each occurring ``copies`` times (a stable sort).

    Row i belongs to expert ``expert[i]`` and was entry ``source[i]`` of [tokens * copies]. ``back`` is the inverse
    permutation. ``ends`` [experts] says where each expert's rows end.
    """

    source: torch.Tensor
    back: torch.Tensor
    expert: torch.Tensor
    ends: torch.Tensor
    copies: int

    @functools.cached_property
    def token(self) -> torch.Tensor:
        return self.source // self.copies

    @functools.cached_property
    def counts(self) -> list[int]:
        """Rows of each expert, on the host: on a GPU the host waits for them."""
        ends = self.ends.tolist()
        return [end - begin for begin, end in zip([0, *ends], ends)]

    @classmethod
    def of(cls, ids: torch.Tensor, n_experts: int) -> Order:
        """From expert ids [tokens, copies].

        Raises:
            ValueError: an id that is not an expert of this module (experts of another rank).
        """
        expert, source = ids.reshape(-1).long().sort(stable=True)
        ends = torch.searchsorted(expert, torch.arange(n_experts, device=ids.device), right=True)
        if ids.is_cuda:
            torch._assert_async(ends[-1] == len(expert))  # without waiting; what it says is in the log
        elif int(ends[-1]) != len(expert):
            raise ValueError(
                f"a token is sent to expert {int(expert[-1])} of {n_experts}: experts of other ranks (expert parallel) "
                "are not sketched"
            )
        back = torch.empty_like(source)
        back[source] = torch.arange(len(source), device=source.device)
        return cls(source, back, expert, ends, ids.shape[-1])


class _Gather(torch.autograd.Function):
    """``x[token]``; backward sums a token's copies in their order: no atomics, and faster than adding rows by index."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.order = order
        return x.index_select(0, order.token)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _sum_copies(grads[0], ctx.order), None


class _Combine(torch.autograd.Function):
    """The sum of a token's copies; backward hands its gradient to each."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, order: Order) -> torch.Tensor:
        ctx.order = order
        return _sum_copies(y, order)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].index_select(0, ctx.order.token), None


def _sum_copies(y: torch.Tensor, order: Order) -> torch.Tensor:
    return y.index_select(0, order.back).view(-1, order.copies, y.shape[-1]).sum(1)


class _Product(torch.autograd.Function):
    """Rows of ``x``, sorted by expert, times each expert's frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.counts = counts
        return _product(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return _product(grads[0], weight.transpose(1, 2), ctx.counts), None, None


def _product(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
    out = x.new_empty(len(x), weight.shape[2])
    begin = 0
    with no_autocast(x):
        for expert, n in enumerate(counts):
            if n:
                torch.mm(x[begin : begin + n], weight[expert], out=out[begin : begin + n])
            begin += n
    return out


def grouped_product(x: torch.Tensor, weight: torch.Tensor, order: Order, transposed: bool) -> torch.Tensor:
    """``y[t] = x[t] W[expert of t]^T`` for rows sorted by expert, in the weights' dtype."""
    stacked = weight if transposed else weight.transpose(1, 2)
    if _has_grouped_kernel(weight):
        return torch.nn.functional.grouped_mm(x.to(weight.dtype), stacked, offs=order.ends.to(torch.int32))
    if weight.requires_grad:  # a trainer's own weight gradients: torch's own backward
        # Taken apart at once: of an expert taken by its index, backward would make a gradient of all experts each time.
        experts = zip(x.to(weight.dtype).split(order.counts), stacked.unbind(0), strict=True)
        parts = [part @ own for part, own in experts if len(part)]
        return torch.cat(parts) if parts else x.new_empty(0, stacked.shape[2])
    return _Product.apply(x.to(weight.dtype), stacked, order.counts)


def _has_grouped_kernel(weight: torch.Tensor) -> bool:
    """Whether torch multiplies groups in one launch, without the host waiting for their sizes."""
    return (
        weight.is_cuda
        and weight.dtype == torch.bfloat16
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(weight.device) >= (8, 0)
        and weight.is_contiguous()
        and weight.shape[1] % 8 == weight.shape[2] % 8 == weight.data_ptr() % 16 == 0
    )


def run_experts(
    module: Any, layout: Experts, args: tuple[torch.Tensor, ...], tapped: Tapped, order: Order
) -> torch.Tensor:
    """What the module computes of ``args``. ``tapped(weight's name, y, x)`` gets each product, with rows sorted by
    expert, and returns it."""
    hidden = args[0]
    x = hidden if layout.repeated else _Gather.apply(hidden, order)
    y = _linear(module, layout, layout.up, layout.up_bias, x, tapped, order)
    if layout.repeated:
        gate, up = y.chunk(2, dim=-1)
        y = up * module.act_fn(gate)
    else:
        y = module._apply_gate(y) if layout.gated else module.act_fn(y)
    y = _linear(module, layout, layout.down, layout.down_bias, y, tapped, order)
    if layout.repeated:
        return y
    y = y * args[2].reshape(-1).index_select(0, order.source)[:, None]
    return _Combine.apply(y, order).to(hidden.dtype)


def _linear(
    module: Any, layout: Experts, name: str, bias: str | None, x: torch.Tensor, tapped: Tapped, order: Order
) -> torch.Tensor:
    y = tapped(name, grouped_product(x, getattr(module, name), order, layout.transposed), x)
    return y if bias is None else y + getattr(module, bias).index_select(0, order.expert)


# ------------------------------------------------------------------------------------------------ which module
def recognise_experts(module: nn.Module) -> Experts | None:
    """The layout of a module of fused experts; None: it is something else.

    Raises:
        Unsupported: it is a module of experts that is not sketched; says why.
    """
    own = dict(module.named_parameters(recurse=False))
    if "down_proj" not in own or own["down_proj"].ndim != 3:
        return None
    layout = _layout(module, own)
    for reason, holds in (
        ("experts are spread over ranks (expert parallel)", getattr(module, "_is_expert_parallel", False)),
        (
            "something replaced the module's forward (a parallel plan, an offloading hook)",
            own_forward(module) is not None and not _spread_by_plan(module),
        ),
        ("they have parameters besides their weights", own.keys() != {*layout.matrices(), *layout.biases()}),
        ("they normalise each expert's output", getattr(module, "has_post_expert_norm", False)),
        ("their weights are quantised", not all(p.is_floating_point() for p in own.values())),
    ):
        if holds:
            raise Unsupported(reason)
    if not _computes(module, layout, own):
        raise Unsupported("its forward is not gate and up, activation, down")
    return layout


def _spread_by_plan(module: nn.Module) -> bool:
    """Whether transformers' tensor-parallel plan replaced the forward: every rank has a part of each expert."""
    parallel = parallel_of(module)
    return parallel is not None and parallel.style == "MoeExpertsParallel"


def _layout(module: Any, own: dict[str, nn.Parameter]) -> Experts:
    if hasattr(type(module).forward, "__wrapped__") and hasattr(module, "_apply_gate"):
        gated, bias = bool(module.has_gate), bool(module.has_bias)
        up = "gate_up_proj" if gated else "up_proj"
        up_bias, down_bias = (f"{up}_bias", "down_proj_bias") if bias else (None, None)
        transposed = bool(module.is_transposed)
        layout = Experts(up, "down_proj", up_bias, down_bias, gated, transposed, repeated=False)
    else:
        names = "gate_up_proj", "down_proj", None, None
        layout = Experts(*names, gated=True, transposed=True, repeated=True)
    if layout.up not in own or own[layout.up].ndim != 3 or len(own[layout.up]) != len(own["down_proj"]):
        raise Unsupported(f"{layout.up} and down_proj do not hold the same experts")
    return layout


@torch.no_grad()
def _computes(module: nn.Module, layout: Experts, own: dict[str, nn.Parameter]) -> bool:
    """Whether the module's own code gives what `run_experts` gives."""
    # Shares all but the parameters, and has no hooks where its class is called.
    shell: Any = copy.copy(module)
    numbers = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=torch.float64, device="cpu").normal_(generator=numbers)

    def like(p: torch.Tensor) -> torch.Tensor:
        # A strided window on few numbers has the shape of the model's weights without their memory.
        strides = (7, 3, 1)[-p.ndim :]
        window = random(sum((n - 1) * s for n, s in zip(p.shape, strides, strict=True)) + 1)
        made = window.as_strided(p.shape, strides)
        return made * 1.0 if p.ndim < 3 else made

    shell.__dict__["_parameters"] = {name: like(p) for name, p in own.items()}
    n, _, width = layout.rows_and_cols(own[layout.up])
    try:
        if layout.repeated:
            args: tuple[torch.Tensor, ...] = (random(n * 2, width) / width**0.5,)
            order = Order.of(torch.arange(n, device="cpu").repeat_interleave(2)[:, None], n)
            want = type(module).forward(shell, *args)
        else:
            ids = torch.tensor([[0, n - 1], [n // 2, 0], [n - 1, n // 2]], device="cpu")[:, : min(2, n)]
            args = random(3, width) / width**0.5, ids, random(*ids.shape).abs()
            order = Order.of(ids, n)
            want = type(module).forward.__wrapped__(shell, *args)  # type: ignore[attr-defined]
        got = run_experts(shell, layout, args, lambda name, y, x: y, order)
    except Exception:  # another interface; the code is not ours and may raise anything
        return False
    if not isinstance(want, torch.Tensor) or got.shape != want.shape:
        return False
    return bool((got - want).abs().max() <= 1e-9 * want.abs().max()) and bool(want.abs().max() > 0)
