"""Training steps of several kinds for small models: rows of prompts in a trainer's order, and losses of trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cropi_kernels import LiveSketcher
from cropi_kernels.names import canonical_name
from support import zoo
from support.zoo import SPEC

ORDER = [3, 0, 5, 1, 4, 2]  # a trainer shuffles the rows of its prompts

Loss = Callable[[torch.Tensor, "Step", torch.Tensor], torch.Tensor]


class Step:
    """Six padded responses to three prompts in a shuffled order, with what a GRPO loss needs besides."""

    def __init__(self) -> None:
        batch = zoo.padded()
        assert batch.attention_mask is not None
        self.ids, self.mask = batch.input_ids[ORDER], batch.attention_mask[ORDER]
        self.prompts = batch.segments[ORDER]
        draw = torch.Generator().manual_seed(3)
        self.scored = self.mask[:, 1:].clone().bool()
        self.scored[:, :1] = False
        self.advantages = torch.randn(len(ORDER), generator=draw)
        self.old = torch.randn(self.scored.shape, generator=draw) * 0.3 - 4.6  # log(1/97)
        self.reference = torch.randn(self.scored.shape, generator=draw) * 0.3 - 4.6

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.ids.shape)  # type: ignore[return-value]

    def part(self, rows: Any) -> Step:
        """A step of some of its rows."""
        part = copy.copy(self)
        for name in ("ids", "mask", "prompts", "scored", "advantages", "old", "reference"):
            setattr(part, name, getattr(self, name)[rows])
        return part

    def rows(self, prompt: int | None) -> torch.Tensor:
        """float [rows, 1], 1 for the rows of a prompt (None: of all)."""
        mine = torch.ones(len(self.prompts)) if prompt is None else (self.prompts == prompt).float()
        return mine[:, None]


def logits_of(model: nn.Module, step: Step) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=step.ids, attention_mask=step.mask, use_cache=False).logits[:, :-1]
    return out


def logprobs_of(logits: torch.Tensor, step: Step) -> torch.Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(2, step.ids[:, 1:, None])[..., 0]


def cross_entropy(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
    return -(logprobs_of(logits, step) * step.scored * mine).sum() / step.scored.sum()


def grpo(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
    """Clipped token ratios, a KL term and an entropy bonus, averaged over each response."""
    logp = logprobs_of(logits, step)
    ratio = (logp - step.old.to(logp)).exp()
    a = step.advantages.to(logp)[:, None]
    loss = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    gap = step.reference.to(logp) - logp
    wide = logits.to(logp.dtype).log_softmax(-1)
    entropy = -(wide.exp() * wide).sum(-1)
    loss = loss + 0.04 * (gap.exp() - gap - 1) - 0.01 * entropy
    each = (loss * step.scored).sum(1) / step.scored.sum(1)
    return (each * mine[:, 0].to(each)).sum() / len(ORDER)


def gspo(logits: torch.Tensor, step: Step, mine: torch.Tensor) -> torch.Tensor:
    """A ratio a response: the geometric mean of its tokens' ratios."""
    gap = (logprobs_of(logits, step) - step.old) * step.scored
    ratio = (gap.sum(1) / step.scored.sum(1)).exp()
    loss = -torch.minimum(ratio * step.advantages, ratio.clamp(0.9, 1.1) * step.advantages)
    return (loss * mine[:, 0].to(loss)).sum() / len(ORDER)


LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy, "grpo": grpo, "gspo": gspo}


def captured(model: nn.Module, loss: Loss, step: Step | None = None, **options: Any) -> torch.Tensor:
    """The sketches of the loss's gradient, of every prompt."""
    step = Step() if step is None else step
    with LiveSketcher(model, SPEC, **options) as live, live.batch(step.prompts, shape=step.shape) as sketch:
        loss(logits_of(model, step), step, step.rows(None)).backward()
    return -sketch.sketches


OfPrompt = Callable[[nn.Module, int], torch.Tensor]


def of_step(loss: Loss, step: Step) -> OfPrompt:
    """The part of each prompt in the loss of a step."""
    return lambda model, prompt: loss(logits_of(model, step), step, step.rows(prompt))


def prompt_gradients(model: nn.Module, loss: OfPrompt) -> list[dict[str, torch.Tensor]]:
    """Plain autograd of one prompt's part at a time, in the model's dtype."""
    found = []
    for prompt in range(zoo.N_SEGMENTS):
        model.zero_grad(set_to_none=True)
        loss(model, prompt).backward()
        found.append(
            {
                canonical_name(name): torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )
    model.zero_grad(set_to_none=True)
    return found


def assert_right(got: torch.Tensor, make: Callable[[torch.dtype], nn.Module], loss: OfPrompt) -> None:
    """Held to plain autograd of each prompt's part: float64, and at most twice the error of float32."""
    wide, own = (prompt_gradients(make(dtype), loss) for dtype in (torch.float64, torch.float32))
    zoo.assert_close(got, make(torch.float32), wide, own)
