"""The kernels in plain torch, for devices and dtypes that no compiled kernel serves."""

from __future__ import annotations

import torch

from .contract import RowMath, Stats

PANEL = 4096  # words of the head that are converted to the compute dtype at a time


def logits(hidden: torch.Tensor, head: torch.Tensor, bias: torch.Tensor | None, z: torch.Tensor) -> None:
    hidden = hidden.to(z.dtype)
    for start in range(0, head.shape[0], PANEL):
        panel = head[start : start + PANEL].to(z.dtype)
        torch.mm(hidden, panel.t(), out=z[:, start : start + PANEL])
    if bias is not None:
        z += bias


def times_head(dz: torch.Tensor, head: torch.Tensor, out: torch.Tensor) -> None:
    total = dz.new_zeros(out.shape)
    for start in range(0, head.shape[0], PANEL):
        total.addmm_(dz[:, start : start + PANEL], head[start : start + PANEL].to(dz.dtype))
    out.copy_(total)


def forward(z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None:
    capped = z if math.softcap == 0 else math.softcap * torch.tanh(z / math.softcap)
    column = target.clamp(min=0)[:, None]
    top = capped.max(dim=-1).values
    x = (capped - top[:, None]) / math.temperature
    own = x.gather(1, column)[:, 0]
    e = x.exp()
    # The sum without the target keeps 1 - p exact for a confident target.
    rest = e.scatter(1, column, 0.0).sum(dim=-1)
    sum_ = own.exp() + rest
    log_sum = torch.where(own == 0, rest.log1p(), sum_.log())
    has_target = target >= 0
    log_sum = log_sum.where(has_target, e.sum(dim=-1).log())
    stats.logp.copy_((own - log_sum).where(has_target, 0.0))
    stats.top.copy_(top)
    stats.log_sum.copy_(log_sum)
    if stats.entropy is not None:
        weighted = torch.where(e == 0, 0.0, e * x).sum(dim=-1)
        stats.entropy.copy_(log_sum - weighted / e.sum(dim=-1))


def backward(
    z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats
) -> torch.Tensor:
    if math.softcap == 0:
        capped, slope = z, None
    else:
        capped, slope = math.softcap * torch.tanh(z / math.softcap), torch.cosh(z / math.softcap) ** -2
    g = grad[:, None] / math.temperature
    d = ((capped - stats.top[:, None]) / math.temperature - stats.log_sum[:, None]).exp() * -g
    d.scatter_(1, target.clamp(min=0)[:, None], g * -torch.expm1(stats.logp[:, None]))
    if slope is not None:
        d *= slope
    return z.copy_(d.where(((grad != 0) & (target >= 0))[:, None], 0.0))
