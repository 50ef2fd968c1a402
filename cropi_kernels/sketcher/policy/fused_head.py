"""The sketch of a head by whose weight a trainer multiplies itself, in a function that gives log-probs of labels.

Such a function never calls the head's module, and its logits' gradients stay inside. They are computed again from its
inputs and the gradients of its outputs, a chunk of scored tokens at a time; that costs one more product with the head.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from ...names import canonical_name
from ...ops.norm_grad import bias_grad
from ..attach.attachment import Attachment
from ..batch.row_segments import Runs
from ..model.head import output_embeddings
from ..model.hooks import unless_none
from ..taps.taps import LinearTap

CHUNK = 256  # scored tokens whose logits exist at one time
PANEL = 8192  # rows of the head that are cast at one time


@dataclasses.dataclass(frozen=True)
class HeadCall:
    """``log_probs[i] = log softmax(z_i)[targets[i]]``, ``z = cap(scale (h W^T + b)) / temperature``,
    ``cap(y) = softcap tanh(y / softcap)``; ``rows`` int64 [n]: the row of the batch that each token is in; ``dtype``:
    in which h and W are multiplied, and the gradient of the product is held."""

    hidden: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor
    temperature: float
    softcap: float | None
    scale: float
    dtype: torch.dtype


def listen(
    plan: Attachment,
    runs: Runs,
    call: HeadCall,
    log_probs: torch.Tensor,
    entropy: torch.Tensor | None,
) -> None:
    """Hook the outputs of such a function, [n] each. Nothing is done where the head is not sketched.

    Raises:
        ValueError: shapes do not fit, or numbers were given per token; says how.
    """
    head = output_embeddings(plan.model)
    tap = None if head is None else plan.taps.get(head)
    if not isinstance(head, nn.Linear) or not isinstance(tap, LinearTap):
        return
    n = call.hidden.shape[0]
    shapes = {"targets": call.targets, "rows": call.rows, "log_probs": log_probs}
    wrong = [f"{name} {tuple(x.shape)}" for name, x in shapes.items() if tuple(x.shape) != (n,)]
    if wrong or call.hidden.ndim != 2:
        raise ValueError(
            f"hidden is {tuple(call.hidden.shape)} [n, features]: {', '.join(wrong)} must be [{n}]"
        )
    if not runs.rows:
        own = {id(p) for p in head.parameters() if p.requires_grad}  # a bias, too: else its tap asks again
        names = [canonical_name(name) for name, p in plan.model.named_parameters() if id(p) in own]
        raise ValueError(
            "a fused head is followed where segments are given per row [batch], and these are per token: give every "
            "prompt a row of its own and its number per row (in TRL packing=False, padding_free=False), let the head's "
            f"own module multiply, or leave the head out: exclude={names}"
        )
    if n and (int(call.rows.min()) < 0 or int(call.rows.max()) >= runs.segments.batch):
        raise ValueError(f"rows run to {int(call.rows.max())} in a batch of {runs.segments.batch}")
    sink = _Sink(head, tap, runs, call)
    if log_probs.requires_grad:
        log_probs.register_hook(unless_none(lambda g: sink.add(g, of_entropy=False)))
    if entropy is not None and entropy.requires_grad:
        entropy.register_hook(unless_none(lambda g: sink.add(g, of_entropy=True)))


class _Sink:
    """Adds the head's gradient to the open batch, when a gradient of one of the function's outputs arrives."""

    def __init__(self, head: nn.Linear, tap: LinearTap, runs: Runs, call: HeadCall) -> None:
        self.head, self.tap, self.acc, self.call = head, tap, tap.acc, call
        self.segments, self.hidden = runs.segments, call.hidden.detach()
        row_ends = torch.arange(1, runs.segments.batch + 1, device=call.rows.device)
        firsts = torch.searchsorted(
            runs.segments.offsets.to(row_ends.device), row_ends * runs.segments.length
        )
        self.segment = (firsts - 1)[call.rows]

    def add(self, gradient: torch.Tensor, of_entropy: bool) -> None:
        if not self.acc.hears(self.segments, self.tap.where):
            return
        self.tap.heard = self.segments
        order = torch.argsort(self.segment, stable=True)
        used = order[(gradient[order] != 0).nonzero()[:, 0]]
        with self.acc.timed(), torch.no_grad():
            for mine in used.split(CHUNK):
                self._add(mine, gradient[mine], of_entropy)

    def _add(self, mine: torch.Tensor, gradient: torch.Tensor, of_entropy: bool) -> None:
        h, acc = self.hidden[mine].to(self.call.dtype), self.acc
        y = self._products(h)
        slope = torch.full_like(y[:, :1], self.call.scale / self.call.temperature)
        if self.call.softcap is not None:
            tanh = torch.tanh(y.mul_(self.call.scale / self.call.softcap))
            slope = slope * (1 - tanh * tanh)
            y = tanh.mul_(self.call.softcap / self.call.temperature)
        else:
            y.mul_(self.call.scale / self.call.temperature)
        logp = y.log_softmax(-1)
        p, g = logp.exp(), gradient.to(y.dtype)[:, None]
        if of_entropy:
            dz = -g * p * (logp - (p * logp).sum(-1, keepdim=True))
        else:
            dz = p.mul_(-g)
            dz.scatter_add_(1, self.call.targets[mine, None], g)
        dz = (dz * slope).to(self.call.dtype)
        bounds = torch.arange(self.segments.count + 1, device=mine.device)
        offsets = torch.searchsorted(self.segment[mine], bounds)
        kept = None
        if self.tap.matrix is not None:
            kept = self.tap.matrix.fold(h)
            self.tap.matrix.add(dz, kept, offsets, acc.out)
        if self.tap.bias is not None:
            acc.engine.add_vector(bias_grad(dz, offsets), self.tap.bias)
        if acc.listener is not None:
            acc.listener.added(self.tap, dz, kept)

    def _products(self, h: torch.Tensor) -> torch.Tensor:
        weight = self.head.weight
        if hasattr(weight, "full_tensor"):
            weight = weight.full_tensor()
        wide = torch.promote_types(h.dtype, torch.float32)
        bias = None if self.head.bias is None else self.head.bias.to(h.dtype)
        out = torch.empty(len(h), len(weight), dtype=wide, device=h.device)
        for begin in range(0, len(weight), PANEL):
            part = slice(begin, begin + PANEL)
            added = None if bias is None else bias[part]
            out[:, part] = nn.functional.linear(h, weight[part].to(h.dtype), added)
        return out
