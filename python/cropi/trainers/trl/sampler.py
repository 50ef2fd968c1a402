"""The order of prompts inside a stage: TRL's own, over the selected prompts, for as many steps as a stage has."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from cropi.errors import CropiError


@dataclass
class StagePlan:
    """What is trained on now: the stage's number and rows of the dataset. All samplers of a trainer read this one."""

    stage: int = 0
    rows: list[int] = field(default_factory=list)


class StageSampler(Sampler[int]):
    """Rows of one stage, in the pattern of TRL's ``RepeatSampler``: the same on every rank.

    The trainer's "epoch" is a stage: the length is ``chunks`` generation batches, whatever the number of selected
    prompts, and each new iteration reads the plan afresh. So a selection takes effect with the first batch of its
    stage, however far a loader reads ahead, and a resumed run finds its place by counting batches.

    Inside a stage the selected prompts are gone through in passes, each in an order of its own that depends on (seed,
    stage, pass) alone. As in TRL, prompts that do not fill the last batch of a pass wait for the next one.

    Args:
        plan: read at the start of every iteration.
        chunks: generation batches a stage.
        prompts: different prompts in a generation batch.
        generations: how often each prompt stands in a row.
        repeats: how often a generation batch is given out (steps it is used for).
        shuffle: a new order in each pass, or that of the dataset.
        seed: of the orders.
    """

    def __init__(
        self,
        plan: StagePlan,
        *,
        chunks: int,
        prompts: int,
        generations: int,
        repeats: int,
        shuffle: bool,
        seed: int,
    ) -> None:
        self.plan, self.chunks, self.prompts = plan, chunks, prompts
        self.generations, self.repeats, self.shuffle, self.seed = generations, repeats, shuffle, seed

    def __len__(self) -> int:
        return self.chunks * self.prompts * self.generations * self.repeats

    def __iter__(self) -> Iterator[int]:
        return islice(self._passes(self.plan.stage, sorted(self.plan.rows)), len(self))

    def _passes(self, stage: int, rows: list[int]) -> Iterator[int]:
        check_enough(rows, self.prompts, stage)
        number = 0
        while True:
            order: Any = RepeatSampler(
                data_source=rows, mini_repeat_count=self.generations, batch_size=self.prompts,
                repeat_count=self.repeats, shuffle=self.shuffle, seed=pass_seed(self.seed, stage, number),
            )  # fmt: skip
            for place in order:
                yield rows[place]
            number += 1


def check_enough(rows: Sequence[int], prompts: int, stage: int) -> None:
    """Check that a stage has prompts for one generation batch.

    Raises:
        CropiError: it has fewer.
    """
    if len(rows) < prompts:
        raise CropiError(
            f"stage {stage} has {len(rows)} prompts, but one generation batch takes {prompts} different ones "
            "(generation_batch_size / num_generations); raise fraction or count, give more trajectories, or make "
            "generation_batch_size smaller"
        )


def pass_seed(seed: int, stage: int, number: int) -> int:
    """A seed for each pass, in [0, 2^63)."""
    digest = hashlib.sha256(f"{seed}:{stage}:{number}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
