"""Sizes of the experiment. One option, ``--scale``, chooses among them; everything else follows from these numbers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.script import options
from cropi_kernels import SketchSpec


@dataclass(frozen=True)
class Scale:
    """Every number of the experiment, fixed before an arm is run.

    Attributes:
        hidden, layers, heads, inner: of the Llama model.
        base_steps, base_decay, base_batch, base_lr: supervised training of the base model, with a linear warm-up and a
            linear decay over ``base_decay`` steps, of which ``base_steps`` are taken: it stops at partial competence.
        pool_cell, valid_cell, test_cell: problems per family and difficulty in the pool, in the validation sets (the
            targeted families only) and in the test sets.
        targeted: families that have a validation set.
        train_rollouts, valid_rollouts: responses per prompt that are collected once, from the base policy.
        steps, stage: GRPO steps of an arm, and how many of them lie between two selections.
        prompts, group: prompts of a step, and responses to each.
        lr: of AdamW in GRPO; constant after ``warmup`` steps.
        fraction: share of the pool that is selected.
        dim, width: of the sketch.
        test_samples: responses per test prompt in an evaluation, at temperature 1.
        evaluate_every, checkpoint_every: steps between evaluations and between checkpoints.
        seeds: how many.
        tokens: padded tokens per micro-batch.
        device: "cpu" or "cuda".
    """

    name: str
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    inner: int = 768
    base_steps: int = 1000
    base_decay: int = 1500
    base_batch: int = 64
    base_lr: float = 1.5e-3
    pool_cell: int = 20
    valid_cell: int = 10
    test_cell: int = 16
    targeted: tuple[str, ...] = ("sort", "reverse")
    train_rollouts: int = 8
    valid_rollouts: int = 16
    steps: int = 120
    stage: int = 40
    prompts: int = 16
    group: int = 8
    lr: float = 1e-4
    warmup: int = 5
    fraction: float = 0.1
    dim: int = 8192
    width: int = 64
    test_samples: int = 4
    evaluate_every: int = 10
    checkpoint_every: int = 20
    seeds: int = 3
    tokens: int = 2048
    device: str = "cpu"

    def spec(self, seed: int, width: int | None = None, kind: str = "slab", keep: float = 1.0) -> SketchSpec:
        """The sketch of one seed; ``width`` 0 is no fold, None the scale's own."""
        folded = (self.width if width is None else width) or None
        return SketchSpec(dim=self.dim, width=folded, kind=kind, seed=seed, keep=keep)  # type: ignore[arg-type]


# fmt: off
SCALES = {
    scale.name: scale
    for scale in (
        Scale("cpu"),
        # Two stages of everything, too short to learn much: it shows that all parts work together.
        Scale(
            "smoke", hidden=128, layers=2, inner=256, base_steps=150, base_decay=150, base_batch=64,
            pool_cell=6, valid_cell=4, test_cell=4, train_rollouts=4, valid_rollouts=8,
            steps=8, stage=4, prompts=4, evaluate_every=2, checkpoint_every=4, seeds=2,
        ),
        # For the tests: seconds.
        Scale(
            "nano", hidden=32, layers=1, heads=2, inner=64, base_steps=200, base_decay=200, base_batch=32,
            base_lr=5e-3, pool_cell=3, valid_cell=2, test_cell=1, targeted=("modulo", "count"),
            train_rollouts=4, valid_rollouts=4, steps=4, stage=2, prompts=3, group=4, dim=256,
            evaluate_every=1, checkpoint_every=1, seeds=1,
        ),
        Scale(
            "gpu", hidden=512, layers=8, heads=8, inner=1536, base_steps=4000, base_decay=6000, base_batch=512,
            base_lr=1e-3, pool_cell=250, valid_cell=20, test_cell=50, train_rollouts=16, valid_rollouts=32,
            steps=1000, stage=200, prompts=32, group=16, lr=5e-5, warmup=10, dim=32768, test_samples=8,
            seeds=5, tokens=32768, device="cuda",
        ),
    )
}
# fmt: on


def options_of_finished(about: str | None) -> argparse.ArgumentParser:
    """The options of a script that measures what the experiment left."""
    parser = options(about)
    parser.add_argument("--scale", choices=sorted(SCALES), default="cpu", help="default: cpu")
    parser.add_argument("--work", type=Path, default=Path("out/rlvr_mini"), help="the experiment's folder")
    parser.add_argument("--out", type=Path, required=True, help="the Markdown file to write")
    return parser
