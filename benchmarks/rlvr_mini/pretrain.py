"""The base policy: supervised training from scratch on all families, stopped at partial competence."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.tasks import DIFFICULTIES, END, FAMILIES, encode, held_out, make_problem
from cropi.atomic import replacing

MIX = (0.30, 0.27, 0.21, 0.14, 0.08)  # share of each difficulty: the hard ones are seen least
IGNORE = -100
WINDOW = 8  # batches drawn at once and sorted by length, so that little is padding
EVERY = 25  # windows between two checkpoints


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over at most 50 steps, then linear decay to a tenth."""
    return min(1.0, (step + 1) / min(50, steps // 5)) * (1 - 0.9 * step / steps)


def draw(rng: random.Random) -> tuple[list[int], int]:
    """One example, token ids of prompt and answer, and the prompt's length; never a held-out prompt."""
    while True:
        d = rng.choices(DIFFICULTIES, MIX)[0]
        problem = make_problem(rng.choice(list(FAMILIES)), d, rng)
        if not held_out(problem.prompt):
            prompt = encode(problem.prompt)
            return [*prompt, *encode(problem.answer), END], len(prompt)


def batch(examples: list[tuple[list[int], int]], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels, int64 ``[B, L]``; only the answer and its end token are labels."""
    width = max(len(ids) for ids, _ in examples) - 1
    inputs, labels = torch.full((len(examples), width), END), torch.full((len(examples), width), IGNORE)
    for row, (ids, prompt) in enumerate(examples):
        inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, prompt - 1 : len(ids) - 1] = torch.tensor(ids[prompt:])
    return inputs.to(device), labels.to(device)


def pretrain(
    model: Any,
    scale: Scale,
    seed: int,
    checkpoint: Path | None = None,
    log: Callable[[int, float], None] | None = None,
) -> None:
    """Train in place for ``scale.base_steps`` steps.

    Args:
        checkpoint: written every ``WINDOW`` x :data:`EVERY` steps, and continued from if it is there: the examples of a
            window are drawn from (seed, window) alone, so the result is that of an unbroken run.
        log: called with (step, loss) after each step.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=scale.base_lr, betas=(0.9, 0.95), weight_decay=0.01)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, map_location=scale.device)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first = state["step"]
    held: list[list[tuple[list[int], int]]] = []
    for step in range(first, scale.base_steps):
        if step % (WINDOW * EVERY) == 0 and step > first and checkpoint is not None:
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
            with replacing(checkpoint) as temporary:
                torch.save(state, temporary)
        if step % WINDOW == 0:
            rng = random.Random(f"base {seed} {step // WINDOW}")
            drawn = sorted((draw(rng) for _ in range(WINDOW * scale.base_batch)), key=lambda e: len(e[0]))
            held = [drawn[i : i + scale.base_batch] for i in range(0, len(drawn), scale.base_batch)]
            rng.shuffle(held)
        inputs, labels = batch(held.pop(), scale.device)
        for group in optimiser.param_groups:
            group["lr"] = scale.base_lr * schedule(step, scale.base_decay)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if log is not None:
            log(step, float(loss.detach()))
