"""A stand-in of slime's public interface: its data source, samples and checkpoints, without SGLang."""

from __future__ import annotations

import copy
import json
import random
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch


@dataclass
class Sample:
    """One response, or a prompt that waits for one."""

    class Status(Enum):
        PENDING = "pending"
        COMPLETED = "completed"
        TRUNCATED = "truncated"
        ABORTED = "aborted"
        FAILED = "failed"

    group_index: int | None = None
    index: int | None = None
    prompt: Any = ""
    tokens: list[int] = field(default_factory=list)
    response: str = ""
    response_length: int = 0
    label: str | None = None
    reward: Any = None
    loss_mask: list[int] | None = None
    rollout_log_probs: list[float] | None = None
    remove_sample: bool = False
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)


class Dataset:
    """Its samples in the file's order, or shuffled anew for every epoch."""

    def __init__(self, path: str, seed: int) -> None:
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        self.origin_samples = [
            Sample(prompt=row["prompt"], label=row["label"], metadata=row.get("metadata") or {})
            for row in rows
        ]
        self.samples, self.epoch_id, self.seed = self.origin_samples, -1, seed

    def shuffle(self, new_epoch_id: int) -> None:
        if new_epoch_id != self.epoch_id:
            order = list(range(len(self.samples)))
            random.Random(self.seed + new_epoch_id).shuffle(order)
            self.samples = [self.origin_samples[i] for i in order]
            self.epoch_id = new_epoch_id

    def __len__(self) -> int:
        return len(self.samples)


class RolloutDataSource:
    """Prompts, epoch by epoch, in groups of ``n_samples_per_prompt``."""

    def __init__(self, args: Any) -> None:
        self.args, self.metadata = args, dict[str, Any]()
        self.epoch_id = self.sample_group_index = self.sample_index = self.sample_offset = 0
        self.dataset = Dataset(args.prompt_data, args.rollout_seed) if args.rollout_global_dataset else None
        if self.dataset is not None and args.rollout_shuffle:
            self.dataset.shuffle(self.epoch_id)

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        assert self.dataset is not None
        taken = self.dataset.samples[self.sample_offset : self.sample_offset + num_samples]
        self.sample_offset += num_samples
        if (missing := num_samples - len(taken)) > 0:
            self.epoch_id += 1
            if self.args.rollout_shuffle:
                self.dataset.shuffle(self.epoch_id)
            taken = taken + self.dataset.samples[:missing]
            self.sample_offset = missing
        groups = []
        for prompt in taken:
            group = [copy.deepcopy(prompt) for _ in range(self.args.n_samples_per_prompt)]
            for sample in group:
                sample.group_index, sample.index = self.sample_group_index, self.sample_index
                self.sample_index += 1
            self.sample_group_index += 1
            groups.append(group)
        return groups

    STATE = ("sample_offset", "epoch_id", "sample_group_index", "sample_index", "metadata")

    def save(self, rollout_id: Any) -> None:
        path = Path(self.args.save) / f"rollout/global_dataset_state_dict_{rollout_id}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: getattr(self, name) for name in self.STATE}, path)

    def load(self, rollout_id: Any = None) -> None:
        if self.args.load is None:
            return
        path = Path(self.args.load) / f"rollout/global_dataset_state_dict_{rollout_id}.pt"
        if path.exists():
            for name, value in torch.load(path).items():
                setattr(self, name, value)
            if self.args.rollout_shuffle and self.dataset is not None:
                self.dataset.shuffle(self.epoch_id)

    def __len__(self) -> int:
        return 0 if self.dataset is None else len(self.dataset)


class RolloutDataSourceWithBuffer(RolloutDataSource):
    """Groups that were handed back are given first."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.buffer: list[list[Sample]] = []

    def get_samples(self, num_samples: int) -> list[list[Sample]]:
        taken, self.buffer = self.buffer[:num_samples], self.buffer[num_samples:]
        return taken + super().get_samples(num_samples - len(taken)) if len(taken) < num_samples else taken

    def add_samples(self, samples: list[list[Sample]]) -> None:
        self.buffer += samples


@contextmanager
def slime(**changes: Any) -> Iterator[types.ModuleType]:
    """``slime.rollout.data_source`` as if it were installed; ``changes`` replace its names, None takes one away."""
    names = ["slime", "slime.rollout", "slime.rollout.data_source"]
    modules = {name: types.ModuleType(name) for name in names}
    modules["slime"].__path__ = modules["slime.rollout"].__path__ = []  # type: ignore[attr-defined]
    held = {"RolloutDataSourceWithBuffer": RolloutDataSourceWithBuffer} | changes
    for key, value in held.items():
        if value is not None:
            setattr(modules[names[-1]], key, value)
    ours = "cropi.trainers.slime.source"
    before = {name: sys.modules.pop(name, None) for name in [*names, ours]}
    sys.modules.update(modules)
    try:
        yield modules[names[-1]]
    finally:
        for name in [*names, ours]:
            sys.modules.pop(name, None)
        sys.modules.update({name: module for name, module in before.items() if module is not None})
