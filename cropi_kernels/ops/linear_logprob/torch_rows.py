"""The row work in plain torch, for devices and dtypes that no compiled kernel serves. Same contract as `cpu`."""

from __future__ import annotations

import torch

from .rows import RowMath, Stats


def forward(z: torch.Tensor, target: torch.Tensor, math: RowMath, stats: Stats) -> None:
    """Fills ``stats`` from logits ``z`` [rows, V]; ``target`` is negative where a row has none."""
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


def backward(z: torch.Tensor, target: torch.Tensor, grad: torch.Tensor, math: RowMath, stats: Stats) -> None:
    """Overwrites logits ``z`` with the gradient of ``sum_n grad_n logp_n``; rows that do not count become zero."""
    if math.softcap == 0:
        capped, slope = z, None
    else:
        capped, slope = math.softcap * torch.tanh(z / math.softcap), torch.cosh(z / math.softcap) ** -2
    g = grad[:, None] / math.temperature
    d = ((capped - stats.top[:, None]) / math.temperature - stats.log_sum[:, None]).exp() * -g
    d.scatter_(1, target.clamp(min=0)[:, None], g * -torch.expm1(stats.logp[:, None]))
    if slope is not None:
        d *= slope
    z.copy_(d.where(((grad != 0) & (target >= 0))[:, None], 0.0))
