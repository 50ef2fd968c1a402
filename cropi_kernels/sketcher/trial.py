"""A few tokens to try a model on: what they are, where the segments lie, and the head's own part of the self-test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..names import canonical_name
from ..ops.norm_grad import bias_grad
from .accumulator import Accumulator
from .attach import Attachment
from .head import head_pass, scored_offsets
from .listener import norm, projected, smallest, unit_roundoff
from .precision import invocation_tokens, trained_tokens
from .scale import SegmentScales
from .segments import Segments
from .selftest import Comparison, SelfTest, Trial, bound, self_test
from .sharded import device_of
from .split import SplitModel
from .untouched import thawed, untouched

PANEL = 8192  # rows of the head that are float64 at one time
ROWS = 3
LENGTHS = (11, 13, 17, 19, 23, 29, 31, 37)


def few_rows(model: nn.Module, vocab: int, device: torch.device) -> torch.Tensor:
    """Token ids [ROWS, length] to try a model on.

    The length is unlike any size of the model, so that no tensor of another meaning has this shape by accident. Ids
    that the configuration names (padding, images) are left out.
    """
    config = getattr(model, "config", None)
    special = {value for name, value in config_numbers(config) if "token" in name}
    sizes = {n for p in model.parameters() for n in p.shape} | {n for _, n in config_numbers(config)}
    most = min(
        (n for name, n in config_numbers(config) if name in ("max_position_embeddings", "n_positions")),
        default=11,
    )
    fitting = [n for n in LENGTHS if n not in sizes and n * ROWS not in sizes and n <= max(most, LENGTHS[0])]
    length = fitting[0] if fitting else LENGTHS[0]
    plain = [i for i in range(min(vocab, 65536)) if i not in special] or list(range(vocab))
    chosen = [plain[(7919 * (i + 1)) % len(plain)] for i in range(ROWS * length)]
    ids = torch.tensor(chosen, device=device).view(ROWS, length)
    # Without these tokens, adapters that depend on them do nothing and have no gradient.
    if wanted := [*invocation_tokens(model), *trained_tokens(model)[:3]][: length - 2]:
        ids[:, 1 : 1 + len(wanted)] = torch.tensor(wanted, device=device)
    return ids


def config_numbers(config: Any, depth: int = 2) -> Iterator[tuple[str, int]]:
    """Names and values of the integers in a configuration, and in the configurations and lists inside it."""
    for name, value in _items(config):
        inner = value if isinstance(value, (list, tuple)) else (value,)
        for item in inner:
            if isinstance(item, int) and not isinstance(item, bool):
                yield name, item
            elif (
                depth and (isinstance(item, dict) or hasattr(item, "__dict__")) and not isinstance(item, type)
            ):
                yield from config_numbers(item, depth - 1)


def _items(config: Any) -> list[tuple[Any, Any]]:
    inner = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    return [(str(name), value) for name, value in inner.items()]


def two_segments(batch: int, length: int, *, causal: bool) -> Segments:
    """Segments of unequal length: with causal attention the first ends within the second row, so that tokens that
    change places in a row show too."""
    ids = torch.ones(batch * length, dtype=torch.int64, device="cpu")
    ids[: length + (length // 3 if causal else 0)] = 0
    return Segments.of(ids.view(batch, length), batch, length, 2)


def scored_rows(segments: Segments) -> list[torch.Tensor]:
    """The positions to score in each of `two_segments`: the gradients of their losses stay in that segment."""
    cut, length = int(segments.offsets[1]), segments.length
    whole = torch.arange(segments.batch * length, device="cpu")
    return [whole[:cut], whole[-(-cut // length) * length :]]


def weights_of(n: int, device: torch.device) -> torch.Tensor:
    return torch.sin(torch.arange(n, device=device, dtype=torch.float32) * 1.7 + 1.0)


# --------------------------------------------------------------------------------------------- the head
def policy_self_test(
    model: nn.Module, split: SplitModel, attachment: Attachment, acc: Accumulator, causal: bool = True
) -> SelfTest:
    """The self-test of `GradientSketcher.policy_gradient`: decoder and head run apart, as it runs them."""
    device = device_of(model)
    ids = few_rows(model, split.head.weight.shape[0], device)
    segments = two_segments(ids.shape[0], ids.shape[1], causal=causal)
    with untouched(model), torch.no_grad():
        hidden = split.hidden(ids)
    scored = scored_rows(segments)
    positions = torch.cat(scored).to(device)
    targets = ids.flatten().flip(0)[positions]
    with split.whole_head():
        comparisons, grad = _compare_head(model, split, attachment, acc, hidden, segments, positions, targets)
    cotangents = []
    for mine in scored:
        one = torch.zeros_like(grad)
        one[mine.to(device)] = grad[mine.to(device)]
        cotangents.append(one.view_as(hidden))
    trial = Trial(lambda: split.hidden(ids), segments, tuple(cotangents))
    return self_test(model, attachment, acc, trial, comparisons)


def _compare_head(
    model: nn.Module,
    split: SplitModel,
    attachment: Attachment,
    acc: Accumulator,
    hidden: torch.Tensor,
    segments: Segments,
    positions: torch.Tensor,
    targets: torch.Tensor,
) -> tuple[list[Comparison], torch.Tensor]:
    """Compare the head's log-probs, its sketch and the gradient of the hidden states with autograd in float64.

    Returns:
        The comparisons, and the gradient of the hidden states [tokens, n] by `head_pass`.
    """
    head, device = split.head, hidden.device
    weights = weights_of(len(positions), device)
    offsets = scored_offsets(segments, positions)
    acc.begin(segments, device)
    try:
        scales = SegmentScales(offsets, device)
        logprobs, grad, _ = head_pass(
            split, attachment, acc, hidden, positions, targets, lambda _, a, b: weights[a:b], 1.0, scales
        )
        scales.restore(acc.out)
        took = _summed(acc, projected(acc.out))
        acc.out.zero_()
        h = split.head_input(hidden.reshape(-1, hidden.shape[-1])[positions])
        z, widest, low_rank = _wide_logits(h, split)
        logits = z * split.scale
        if split.softcap is not None:
            logits = split.softcap * torch.tanh(logits / split.softcap)
        wide = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
        (dz,) = torch.autograd.grad(wide @ weights.double(), z, retain_graph=True)
        # A logit is a float32 sum of products (a GPU rounds it to the dtype of the head).
        unit = unit_roundoff(h) if h.is_cuda else 2.0**-24
        off_z = 4 * max(unit, h.shape[1] ** 0.5 * 2.0**-24) * float(h.float().norm(dim=1).max()) * widest
        off_dz = 2 * abs(split.scale) * float(weights.abs().sum()) * off_z
        covered = _add_formed(model, split, attachment, acc, h, z, dz, low_rank, offsets)
        want = _summed(acc, projected(acc.out))
    finally:
        acc.close()
    error = float((wide.detach().float() - logprobs).abs().max())
    what = "the log-probs are not those of softmax(logits)"
    comparisons = [Comparison(("log-probs",), what, error, 2 * abs(split.scale) * off_z + 1e-5, 1.0)]
    terms = norm(h) * (1 + sum(one.size() for one in split.adapters)) + len(positions) ** 0.5
    allowed = terms * (norm(dz) * bound(unit, 1, len(positions)) + off_dz)
    if covered:
        what = "the head's sketch is not that of its gradient"
        comparisons.append(Comparison(covered, what, norm(took - want), allowed, norm(want)))
        comparisons += _hooked(head, dz, h, attachment, covered, unit)
    flat = grad.reshape(-1, grad.shape[-1])
    exact = torch.zeros(flat.shape, dtype=torch.float64, device=device)
    powers = torch.ldexp(torch.ones_like(dz[:, :1]), -scales.exponent[scales.segment][:, None])
    dz = dz.detach() * powers
    off_dz *= float(powers.max())
    exact.index_add_(0, positions, _times_head(dz, split))
    allowed = (
        widest
        * (
            (2 * unit_roundoff(flat) + 64 * 2.0**-24) * float(dz.abs().sum())
            + off_dz * head.weight.shape[0] ** 0.5
        )
        + 4 * smallest(flat) * flat.numel() ** 0.5
    )
    what = "the head does not hand on the gradient of its logits"
    comparisons.append(Comparison(("hidden states",), what, norm(flat - exact), allowed, norm(exact)))
    return comparisons, flat


def _add_formed(
    model: nn.Module,
    split: SplitModel,
    attachment: Attachment,
    acc: Accumulator,
    h: torch.Tensor,
    z: torch.Tensor,
    dz: torch.Tensor,
    low_rank: dict[torch.Tensor, torch.Tensor],
    offsets: torch.Tensor,
) -> tuple[str, ...]:
    """Add the sketches of the head's gradients, which follow from ``dz`` [n, V] in float64, to the open batch.

    Returns:
        The names of the parameters whose gradients were added.
    """
    names = {id(p): canonical_name(n) for n, p in model.named_parameters()}
    matrix, bias = attachment.head_matrix, attachment.head_bias
    own = (split.head.weight, matrix), (split.head.bias, bias)
    covered = [names.get(id(p), "lm_head") for p, plan in own if plan is not None]
    starts = offsets.to(h.device)
    if matrix is not None and attachment.head_adds[0]:
        matrix.add(dz.float(), matrix.fold(h), starts, acc.out)
    if bias is not None and (acc.ranks is None or acc.ranks.rank == 0):
        acc.engine.add_vector(bias_grad(dz.float(), starts), bias)
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist()))
    for module in (m for one in split.adapters for m in (one.a, one.b)):
        tap = attachment.taps.get(module)
        for p, add in [] if tap is None else tap.formed(module):
            covered.append(names.get(id(p), "lm_head's adapter"))
            for s, (begin, end) in enumerate(bounds):
                (formed,) = torch.autograd.grad(z[begin:end], low_rank[p], dz[begin:end], retain_graph=True)
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
    (weight, bias, _), spread = split.head_here(), split.head_ranks()
    mine = h.double() if spread is None or spread[1].axis == 0 else spread[1].cut(h, 1).double()
    z = torch.empty(h.shape[0], weight.shape[0], dtype=torch.float64, device=h.device)
    squares = torch.zeros(weight.shape[0], dtype=torch.float64, device=h.device)
    low_rank: dict[torch.Tensor, torch.Tensor] = {}
    with torch.no_grad():
        for begin in range(0, weight.shape[0], PANEL):
            rows = weight[begin : begin + PANEL].double()
            z[:, begin : begin + PANEL] = mine @ rows.T
            squares[begin : begin + PANEL] = rows.square().sum(1)
        if spread is not None and spread[1].axis == 1:
            z, squares = spread[0].sum(z), spread[0].sum(squares)
        if bias is not None:
            z += bias.double()
        widest = squares.max().sqrt()
        if spread is not None and spread[1].axis == 0:
            z, widest = spread[0].gathered(z, split.head.weight.shape[0]), spread[0].max(widest)
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
    (weight, _, first), spread = split.head_here(), split.head_ranks()
    out = torch.zeros(dz.shape[0], weight.shape[1], dtype=torch.float64, device=dz.device)
    with torch.no_grad():
        for begin in range(0, weight.shape[0], PANEL):
            rows = weight[begin : begin + PANEL]
            out += dz[:, first + begin : first + begin + len(rows)] @ rows.double()
        for one in split.adapters:
            out += one.scale * (dz @ one.b.weight.double() @ one.a.weight.double())
        if spread is None:
            return out
        return spread[0].sum(out if spread[1].axis == 0 else spread[1].placed(out, 1))


def _hooked(
    head: nn.Linear,
    dz: torch.Tensor,
    h: torch.Tensor,
    attachment: Attachment,
    names: tuple[str, ...],
    unit: float,
) -> list[Comparison]:
    """Whether hooks on the head's parameters change their gradients, which the head's pass never forms."""
    changed = []
    covered = attachment.head_matrix is not None, attachment.head_bias is not None
    for p, mine, formed in zip(
        (head.weight, head.bias), covered, (lambda: dz.T @ h.double(), lambda: dz.sum(0))
    ):
        if mine and p is not None and p._backward_hooks:
            plain = formed().to(p.dtype)
            with thawed([p]):
                (got,) = torch.autograd.grad(p, p, plain)
            what = "a hook on the parameter changes its gradient, which no tap sees"
            changed.append(Comparison(names, what, norm(got - plain), unit * norm(plain), norm(plain)))
    return changed
