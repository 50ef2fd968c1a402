"""The oracle: token log-probs of a linear head in plain torch, with the whole logits in memory.

With hidden h_n [D], head W [V, D], bias b [V], temperature tau and an optional soft-cap c (Gemma-2):

    a_nv = <h_n, W_v> + b_v                 z_nv = cap(a_nv) / tau,   cap(a) = c tanh(a / c)   (or a)
    m_n = max_v z_nv                        log_sum_n = log sum_v exp(z_nv - m_n)
    logp_n = (z_ny - m_n) - log_sum_n       lse_n = m_n + log_sum_n
    entropy_n = log_sum_n - sum_v p_nv (z_nv - m_n),   p_nv = exp(z_nv - m_n - log_sum_n)

``logp`` is never formed as ``z - lse``: a common offset of the logits would eat its bits. The gradient of
``sum_n g_n logp_n``, with y = target of n:

    da_nv = (g_n / tau) (1[v = y] - p_nv) cap'(a_nv),   cap'(a) = 1 - tanh(a / c)^2 = 1 / cosh(a / c)^2
    dh_n = sum_v da_nv W_v

where ``1 - p_ny`` is ``-expm1(logp_n)``: subtracting from 1 loses every bit as p_ny approaches 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LogProbs(NamedTuple):
    """All [N], in the compute dtype. Ignored tokens hold 0 in every field."""

    logp: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor


def linear_logprob(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> LogProbs:
    """Log-prob, log-sum-exp and entropy per token, differentiable by autograd; all arithmetic in ``dtype``.

    Args:
        hidden: [N, D]. head: [V, D]. targets: int64 [N]. bias: [V] or None.
    """
    z = _logits(hidden, head, bias, softcap, dtype)[0] / temperature
    counted = targets != ignore_index
    top = z.max(dim=-1, keepdim=True).values.detach()
    shifted = z - top
    log_sum = shifted.exp().sum(dim=-1).log()
    own = shifted.gather(1, targets.where(counted, 0)[:, None])[:, 0]
    p = (shifted - log_sum[:, None]).exp()
    terms = (p * shifted).where(p > 0, 0.0).where(~p.isnan(), p)  # a logit of -infinity adds nothing
    entropy = log_sum - terms.sum(dim=-1)
    return LogProbs(*(x.where(counted, 0.0) for x in (own - log_sum, top[:, 0] + log_sum, entropy)))


def gradients(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(dlogits [N, V], dhidden [N, D])`` of ``sum_n grad_n logp_n`` by the formula above; dlogits is ``da``."""
    a, slope = _logits(hidden, head, bias, softcap, dtype)
    z = a / temperature
    counted = (targets != ignore_index) & (grad != 0)
    target = targets.where(targets != ignore_index, 0)[:, None]
    logp = torch.log_softmax(z, dim=-1)
    one_minus_p = -torch.expm1(logp.gather(1, target))
    d = -(logp.exp().scatter(1, target, -one_minus_p)) * slope * (grad.to(dtype) / temperature)[:, None]
    d = d.where(counted[:, None], 0.0)
    return d, (d @ head.to(dtype)).where(counted[:, None], 0.0)


def _logits(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft-capped logits [N, V], and the derivative of the cap."""
    a = hidden.to(dtype) @ head.to(dtype).t()
    if bias is not None:
        a = a + bias.to(dtype)
    if softcap is None:
        return a, torch.ones_like(a)
    u = a / softcap
    return softcap * torch.tanh(u), 1.0 / torch.cosh(u) ** 2
