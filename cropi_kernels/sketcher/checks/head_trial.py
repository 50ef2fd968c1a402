"""The self-test of `GradientSketcher.policy_gradient`: the head's own part, compared with autograd in float64.

The fused pass never calls the head. Its log-probs, its sketch and the gradient of the hidden states are compared here;
the decoder's taps are compared as everywhere (`selftest`).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from ...names import names_by_id
from ...ops.norm_grad import bias_grad
from ..attach.attachment import Attachment
from ..batch.host import on_device
from ..batch.segments import Segments
from ..batch.trial import few_rows, scored_rows, two_segments, weights_of
from ..model.precision import smallest, unit_roundoff
from ..model.sharded import device_of
from ..model.untouched import thawed, untouched
from ..policy.head_pass import head_pass, scored_segments
from ..policy.scale import SegmentScales
from ..policy.split import SplitModel
from ..sums.accumulator import Accumulator
from .listener import norm, projected
from .selftest import Comparison, SelfTest, Trial, bound, self_test

PANEL = 8192  # rows of the head that are float64 at one time


def policy_self_test(split: SplitModel, plan: Attachment) -> SelfTest:
    """The self-test of `GradientSketcher.policy_gradient`: decoder and head run apart, as it runs them."""
    model = plan.model
    device = device_of(model)
    ids = few_rows(model, split.head.weight.shape[0], device)
    segments = two_segments(ids.shape[0], ids.shape[1], causal=True)
    with untouched(model), torch.no_grad():
        hidden = split.hidden(ids)
    scored = scored_rows(segments)
    positions = torch.cat(scored).to(device)
    targets = ids.flatten().flip(0)[positions]
    with split.whole_head():
        comparisons, grad = _compare_head(split, plan, hidden, segments, positions, targets)
    cotangents = []
    for mine in scored:
        one = torch.zeros_like(grad)
        one[mine.to(device)] = grad[mine.to(device)]
        cotangents.append(one.view_as(hidden))
    trial = Trial(lambda: split.hidden(ids), segments, tuple(cotangents))
    return self_test(plan, trial, comparisons)


class _Wide(NamedTuple):
    """The head in float64, for hidden states ``h`` [n, D] of the scored tokens: ``z`` = h W^T + b [n, V], ``dz`` the
    gradient of the weighted sum of ``logprobs`` [n]."""

    h: torch.Tensor
    z: torch.Tensor
    dz: torch.Tensor
    logprobs: torch.Tensor
    # A bound of the norm of a row of W, and the float64 copies of adapters' parameters.
    widest: float
    low_rank: dict[torch.Tensor, torch.Tensor]
    # The unit roundoff of a logit, and how far the tested head's z and dz may be off.
    unit: float
    off_z: float
    off_dz: float


def _compare_head(
    split: SplitModel,
    plan: Attachment,
    hidden: torch.Tensor,
    segments: Segments,
    positions: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[list[Comparison], torch.Tensor]:
    """Compare the head's log-probs, its sketch and the gradient of the hidden states with autograd in float64.

    Returns:
        The comparisons, and the gradient of the hidden states [tokens, n] by `head_pass`.
    """
    acc, device = plan.acc, hidden.device
    weights = weights_of(len(positions), device)
    offsets, owner = scored_segments(segments, positions)
    acc.begin(segments, device)
    try:
        scales = SegmentScales(*on_device(device, offsets, owner))
        logprobs, grad, _ = head_pass(
            split, [plan], hidden, positions, targets, lambda _, a, b: weights[a:b], 1.0, scales
        )
        scales.restore(acc.out)
        took = _summed(acc, projected(acc.out))
        acc.out.zero_()
        wide = _in_float64(split, hidden, positions, targets, weights)
        covered = _add_formed(split, plan, wide, offsets)
        want = _summed(acc, projected(acc.out))
    finally:
        acc.close()
    flat = grad.reshape(-1, grad.shape[-1])
    comparisons = [_of_logprobs(split, wide, logprobs)]
    if covered:
        comparisons += [
            _of_sketch(split, wide, covered, took, want),
            *_hooked(split.head, wide, plan, covered),
        ]
    comparisons.append(_of_hidden(split, wide, positions, flat, scales))
    return comparisons, flat


def _in_float64(
    split: SplitModel,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> _Wide:
    h = split.head_input(hidden.reshape(-1, hidden.shape[-1])[positions])
    z, widest, low_rank = _wide_logits(h, split)
    logits = z * split.scale
    if split.softcap is not None:
        logits = split.softcap * torch.tanh(logits / split.softcap)
    logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    (dz,) = torch.autograd.grad(logprobs @ weights.double(), z, retain_graph=True)
    # A logit is a float32 sum of products (a GPU rounds it to the dtype of the head).
    unit = unit_roundoff(h) if h.is_cuda else 2.0**-24
    off_z = 4 * max(unit, h.shape[1] ** 0.5 * 2.0**-24) * float(h.float().norm(dim=1).max()) * widest
    off_dz = 2 * abs(split.scale) * float(weights.abs().sum()) * off_z
    return _Wide(h, z, dz, logprobs, widest, low_rank, unit, off_z, off_dz)


def _of_logprobs(split: SplitModel, wide: _Wide, logprobs: torch.Tensor) -> Comparison:
    what = "the log-probs are not those of softmax(logits)"
    error = float((wide.logprobs.detach().float() - logprobs).abs().max())
    return Comparison(("log-probs",), what, error, 2 * abs(split.scale) * wide.off_z + 1e-5, 1.0)


def _of_sketch(
    split: SplitModel, wide: _Wide, covered: tuple[str, ...], took: torch.Tensor, want: torch.Tensor
) -> Comparison:
    what, tokens = "the head's sketch is not that of its gradient", len(wide.h)
    terms = norm(wide.h) * (1 + sum(one.size() for one in split.adapters)) + tokens**0.5
    allowed = terms * (norm(wide.dz) * bound(wide.unit, 1, tokens) + wide.off_dz)
    return Comparison(covered, what, norm(took - want), allowed, norm(want))


def _of_hidden(
    split: SplitModel, wide: _Wide, positions: torch.Tensor, grad: torch.Tensor, scales: SegmentScales
) -> Comparison:
    """The gradient of the hidden states ``grad`` [tokens, D], which is that of scaled segments."""
    what = "the head does not hand on the gradient of its logits"
    powers = torch.ldexp(torch.ones_like(wide.dz[:, :1]), -scales.exponent[scales.segment][:, None])
    dz, off_dz = wide.dz.detach() * powers, wide.off_dz * float(powers.max())
    exact = torch.zeros(grad.shape, dtype=torch.float64, device=grad.device)
    exact.index_add_(0, positions, _times_head(dz, split))
    # Hidden states may have 32 bits where the head has 16 (Mamba's residual): the gradient is rounded to the head's.
    rounding = 2 * max(unit_roundoff(grad), unit_roundoff(wide.h)) + 64 * 2.0**-24
    lost = 4 * max(smallest(grad), smallest(wide.h)) * grad.numel() ** 0.5
    words = split.head.weight.shape[0]
    allowed = wide.widest * (rounding * float(dz.abs().sum()) + off_dz * words**0.5) + lost
    return Comparison(("hidden states",), what, norm(grad - exact), allowed, norm(exact))


def _add_formed(
    split: SplitModel,
    plan: Attachment,
    wide: _Wide,
    offsets: torch.Tensor,
) -> tuple[str, ...]:
    """Add the sketches of the head's gradients, which follow from ``dz``, to the open batch.

    Returns:
        The names of the parameters whose gradients were added.
    """
    names = names_by_id(plan.model)
    acc, matrix, bias = plan.acc, plan.head_matrix, plan.head_bias
    own = (split.head.weight, matrix), (split.head.bias, bias)
    covered = [names.get(id(p), "lm_head") for p, sketch in own if sketch is not None]
    starts = offsets.to(wide.h.device)
    if matrix is not None and plan.head_adds[0]:
        matrix.add(wide.dz.float(), matrix.fold(wide.h), starts, acc.out)
    if bias is not None and (acc.ranks is None or acc.ranks.rank == 0):
        acc.engine.add_vector(bias_grad(wide.dz.float(), starts), bias)
    for module in (m for one in split.adapters for m in (one.a, one.b)):
        tap = plan.taps.get(module)
        for p, add in [] if tap is None else tap.formed(module):
            covered.append(names.get(id(p), "lm_head's adapter"))
            for s, (begin, end) in enumerate(pairwise(offsets.tolist())):
                part = wide.z[begin:end], wide.low_rank[p], wide.dz[begin:end]
                (formed,) = torch.autograd.grad(*part, retain_graph=True)
                add(formed.float(), acc.out[s : s + 1])
    return tuple(covered)


def _summed(acc: Accumulator, x: torch.Tensor) -> torch.Tensor:
    """``x`` summed over the ranks of a tensor-parallel group, if there is one."""
    return x if acc.ranks is None else acc.ranks.sum(x.to(acc.ranks.mesh.device_type)).to(x.device)


def _wide_logits(
    h: torch.Tensor, split: SplitModel
) -> tuple[torch.Tensor, float, dict[torch.Tensor, torch.Tensor]]:
    """The head's products in float64, with a graph through adapters alone.

    Returns:
        ``h W^T + b`` and what adapters add [n, V]; a bound of the norm of a row of W with what adapters add to it; and
        the float64 copies of the adapters' parameters, by parameter.
    """
    (weight, bias, _), over = split.head_here(), split.head_ranks()
    mine = h.double() if over is None or over.share.axis == 0 else over.share.cut(h, 1).double()
    z = torch.empty(h.shape[0], weight.shape[0], dtype=torch.float64, device=h.device)
    squares = torch.zeros(weight.shape[0], dtype=torch.float64, device=h.device)
    low_rank: dict[torch.Tensor, torch.Tensor] = {}
    with torch.no_grad():
        for begin in range(0, weight.shape[0], PANEL):
            rows = weight[begin : begin + PANEL].double()
            z[:, begin : begin + PANEL] = mine @ rows.T
            squares[begin : begin + PANEL] = rows.square().sum(1)
        if over is not None and over.share.axis == 1:
            z, squares = over.group.sum(z), over.group.sum(squares)
        if bias is not None:
            z += bias.double()
        widest = squares.max().sqrt()
        if over is not None and over.share.axis == 0:
            z, widest = over.group.gathered(z, split.head.weight.shape[0]), over.group.max(widest)
    z.requires_grad_(True)
    for one in split.adapters:
        low_rank |= {p: p.detach().double().requires_grad_(True) for p in one.parameters()}
        z = z + one.scale * nn.functional.linear(
            nn.functional.linear(h.double(), low_rank[one.a.weight]),
            low_rank[one.b.weight],
            None if one.b.bias is None else low_rank[one.b.bias],
        )
        widest = widest + abs(one.scale) * one.a.weight.norm().double() * one.b.weight.norm(dim=1).max()
    return z, float(widest), low_rank


def _times_head(dz: torch.Tensor, split: SplitModel) -> torch.Tensor:
    (weight, _, first), over = split.head_here(), split.head_ranks()
    out = torch.zeros(dz.shape[0], weight.shape[1], dtype=torch.float64, device=dz.device)
    with torch.no_grad():
        for begin in range(0, weight.shape[0], PANEL):
            rows = weight[begin : begin + PANEL]
            out += dz[:, first + begin : first + begin + len(rows)] @ rows.double()
        for one in split.adapters:
            out += one.scale * (dz @ one.b.weight.double() @ one.a.weight.double())
        if over is None:
            return out
        return over.group.sum(out if over.share.axis == 0 else over.share.placed(out, 1))


def _hooked(head: nn.Linear, wide: _Wide, plan: Attachment, names: tuple[str, ...]) -> list[Comparison]:
    """Whether hooks on the head's parameters change their gradients, which the head's pass never forms."""
    changed = []
    for p, sketch in ((head.weight, plan.head_matrix), (head.bias, plan.head_bias)):
        if sketch is not None and p is not None and p._backward_hooks:
            plain = (wide.dz.sum(0) if p is head.bias else wide.dz.T @ wide.h.double()).to(p.dtype)
            with thawed([p]):
                (got,) = torch.autograd.grad(p, p, plain)
            what = "a hook on the parameter changes its gradient, which no tap sees"
            changed.append(Comparison(names, what, norm(got - plain), wide.unit * norm(plain), norm(plain)))
    return changed
