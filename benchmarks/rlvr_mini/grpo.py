"""One GRPO step: rollouts of the current policy, group advantages, one update (so the token ratio is 1)."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.rlvr_mini.generate import generate
from benchmarks.rlvr_mini.rollouts import to_record, to_tokens
from benchmarks.rlvr_mini.tasks import Problem, encode
from cropi.data.rewards import no_gradient_reason
from cropi.gradient.batches import MicroBatch, make_batches
from cropi.gradient.estimators import make_estimator
from cropi.gradient.layout import Layout, attention_cost
from cropi_kernels.sketcher.policy.decoder import split_model
from cropi_kernels.sketcher.policy.split import SplitModel

if TYPE_CHECKING:
    from benchmarks.rlvr_mini.live import Live

# The mean over a response's tokens, then over responses, of A times the token ratio: GRPO (arXiv 2402.03300).
ESTIMATOR = make_estimator("cropi")
CLIP_NORM = 1.0


@dataclass(frozen=True)
class StepReport:
    """What one step saw: mean reward, and the share of prompts whose rewards differ and so give a gradient."""

    reward: float
    mixed: float


def layout_of(model: Any) -> Layout:
    """Llama's attention takes any mask, so the responses of a prompt share its row."""
    return Layout(shared=True, attention_cost=attention_cost(model))


def logprobs(split: SplitModel, batch: MicroBatch, whole: bool = False) -> torch.Tensor:
    """log pi of the scored tokens, with a graph: float32 ``[N]``; ``whole``: the head sees all tokens, as taps want."""
    hidden = split.hidden(
        batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    )
    if whole:
        z = split.head(hidden).flatten(0, 1)[batch.positions]
    else:
        z = split.head(hidden.flatten(0, 1)[batch.positions])
    return torch.log_softmax(z.float(), -1).gather(1, batch.targets[:, None])[:, 0]


class Trainer:
    """The policy, its AdamW and the parts that do not change from step to step.

    ``spent``: processor seconds of all steps by part, and the ``tokens`` that went through the model's backward pass,
    without and with padding (``padded``).
    """

    def __init__(self, model: Any, lr: float, warmup: int, tokens: int, live: Live | None = None) -> None:
        self.live = live
        self.model, self.lr, self.warmup, self.tokens, self.done = model, lr, warmup, tokens, 0
        self.split, self.layout = split_model(model), layout_of(model)
        self.spent: Counter[str] = Counter()
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)

    def step(
        self,
        problems: Sequence[Problem],
        group: int,
        generator: torch.Generator,
        names: Sequence[str] = (),
    ) -> StepReport:
        """Sample ``group`` responses to every problem, and update once; ``names``: of the problems, where they are
        watched."""
        with self._timed("generate"):
            rollouts = generate(self.model, [encode(p.prompt) for p in problems], group, generator=generator)
        records = [to_record(p, r, str(i)) for i, (p, r) in enumerate(zip(problems, rollouts, strict=True))]
        mixed = [to_tokens(record) for record in records if not no_gradient_reason(record.rewards)]
        for batch in make_batches(mixed, ESTIMATOR, self.layout, budget=self.tokens):
            here = batch.to(self.model.device)
            self.spent.update(tokens=batch.tokens, padded=batch.input_ids.numel())
            with contextlib.nullcontext() if self.live is None else self.live.watching(here):
                with self._timed("forward"):
                    values = logprobs(self.split, here, whole=self.live is not None)
                weights = ESTIMATOR.weights(values.detach(), None, here.advantages, here.divisors)
                with self._timed("backward"):
                    (-(weights * values).sum() / len(problems)).backward()
        if self.live is not None:
            self.live.end_step(names, self.done + 1)
        if mixed:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
            for options in self.optimiser.param_groups:
                options["lr"] = self.lr * min(1.0, (self.done + 1) / self.warmup)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        self.done += 1
        rewards = [reward for record in records for reward in record.rewards]
        return StepReport(sum(rewards) / len(rewards), len(mixed) / len(records))

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        begun = time.process_time()
        yield
        self.spent[part] += time.process_time() - begun
