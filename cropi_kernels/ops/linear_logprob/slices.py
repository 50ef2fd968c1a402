"""Log-probs of a head whose words are spread over ranks: every rank has the logits of its own words, and no other.

With ``x = (cap(z) - top) / T`` of logits z, ``top`` the largest over all ranks (one maximum), and of every rank the sum
``rest = sum exp(x)`` of its words without the target's, and the target's own x where it has it (one sum):

    log_sum = log(exp(x_target) + sum of rests),    logp = x_target - log_sum

Without the target in ``rest``, ``1 - p`` keeps its digits for a confident target, as it does on one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..._library import no_autocast
from . import chunks, ops
from .contract import Dlogits, OnGradient, Settings, Stats, Weigh

Reduce = Callable[[torch.Tensor], torch.Tensor]


class Words(NamedTuple):
    """The words of a head that a rank has, ``first`` to ``first`` + its rows, and the sums over ranks (in place)."""

    first: int
    sum: Reduce
    max: Reduce


@torch.no_grad()
def sliced_logprob_and_grad(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    weigh: Weigh | None,
    words: Words,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    on_gradient: OnGradient | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logprob_and_grad` of a head [words here, D]; on all ranks of the group at once, with the same ``hidden``.

    ``weigh`` None: log-probs alone, the rest are zeros. ``on_gradient`` gets the gradient of this rank's logits
    [tokens, words here]. Targets, of the whole vocabulary, are not checked, and none may be ignored. Log-probs, the
    gradient to ``hidden`` and weights are the same on all ranks.

    Raises:
        ValueError: this rank has no words.
    """
    if not len(head):
        raise ValueError("a rank has no words of the head: take fewer ranks than the vocabulary has parts")
    mine = (targets >= words.first) & (targets < words.first + len(head))
    # Of others' targets: a word whose place is filled below.
    own = torch.where(mine, targets - words.first, 0)
    settings = Settings(float(temperature), float(softcap or 0.0), -1, 0, None)
    call = ops.prepare(hidden, head, own, bias, settings, whole=True)
    n = len(targets)
    logps, weights = call.numbers(), call.numbers()
    out = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    # All ranks take the same chunks, though some have fewer words.
    own_chunk = torch.tensor([call.chunk], dtype=torch.float32, device=hidden.device)
    chunk = int(-words.max(-own_chunk))
    logits = chunks.Logits(call, min(chunk, n))
    with no_autocast(hidden):
        for start in range(0, n, chunk):
            part = slice(start, min(start + chunk, n))
            z, target, here = logits.of(hidden[part]), call.target[part], mine[part]
            first = z[:, 0].clone()
            stats = _over_ranks(call, z, target, here, words)
            logps[part] = stats.logp
            if weigh is None:
                continue
            weights[part] = weigh(stats.logp.clone(), part.start, part.stop).detach()
            g = weights[part].clone()
            dz = call.kernels.backward(z, target, g, call.math, stats)
            dz[:, 0] = torch.where(here, dz[:, 0], _of_no_target(first, g, call, stats).to(dz.dtype))
            if on_gradient is not None:
                on_gradient(part.start, part.stop, Dlogits(dz))
            call.kernels.times_head(dz, call.head, out[part])
    if weigh is not None:
        out = words.sum(out.to(torch.promote_types(out.dtype, torch.float32))).to(out.dtype)
    return logps, out, weights


def _over_ranks(
    call: chunks.Call, z: torch.Tensor, target: torch.Tensor, here: torch.Tensor, words: Words
) -> Stats:
    """Statistics of all words from those of this rank's; log-probs are those of the targets, wherever they are."""
    logp, largest, total = torch.zeros(3, len(z), dtype=call.dtype, device=z.device)
    mine = Stats(logp, largest, total, None)
    call.kernels.forward(z, target, call.math, mine)
    top = words.max(mine.top.clone())
    shift = (mine.top - top) / call.math.temperature
    rest = torch.exp(mine.log_sum + shift)
    rest = torch.where(here, rest * -torch.expm1(mine.logp), rest)
    of_target = torch.where(here, mine.logp + mine.log_sum + shift, 0.0)
    rest, x = words.sum(torch.stack([rest, of_target]))
    log_sum = torch.where(x == 0, rest.log1p(), (x.exp() + rest).log())
    return Stats(x - log_sum, top, log_sum, None)


def _of_no_target(z: torch.Tensor, g: torch.Tensor, call: chunks.Call, stats: Stats) -> torch.Tensor:
    """The gradient of logits ``z`` [tokens] of words that are not the targets."""
    t, cap = call.math
    capped, slope = (z, 1.0) if cap == 0 else (cap * torch.tanh(z / cap), torch.cosh(z / cap) ** -2)
    return -g / t * ((capped - stats.top) / t - stats.log_sum).exp() * slope
