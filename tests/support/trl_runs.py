"""Small real GRPO runs: a random model of two layers, a character tokenizer, sums as prompts, digits as the reward."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cropi.trainers.trl import Curriculum, Recording, curriculum, recording
from cropi_kernels import SketchSpec
from support.commands import json_lines
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.oracle import with_token_ids

SPEC = SketchSpec(dim=1024)
# CROPI_TESTS_TRL_DEVICE=cuda starts the trainers on a GPU, in true float32: transformers would turn tf32 on.
ON_CPU = os.environ.get("CROPI_TESTS_TRL_DEVICE", "cpu") == "cpu"


def dataset(count: int, seed: int = 0, **columns: Any) -> Any:
    """Prompts with ids ``p<seed>-000`` and so on; ``id=None`` leaves the ids out."""
    from datasets import Dataset

    rows = [
        {key: record[key] for key in ("id", "prompt", "answer", "task")} | columns
        for record in make_records(count, seed=seed)
    ]
    return Dataset.from_list(
        [{key: value for key, value in row.items() if value is not None} for row in rows]
    )


def digits(completions: list[str], **columns: Any) -> list[float]:
    """Share of digits: seldom equal for two random completions."""
    return [sum(ch.isdigit() for ch in text) / 8 for text in completions]


class Seen:
    """A reward function that notes which prompts are trained on at which step."""

    def __init__(self) -> None:
        self.__name__ = "digits"
        self.ids: dict[int, list[str]] = {}

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        self.ids.setdefault(columns["trainer_state"].global_step, []).extend(columns["id"])
        return digits(completions)


def arguments(out: Path, **changes: Any) -> Any:
    """Two prompts of four responses a step; logged and saved nowhere unless asked for."""
    from trl import GRPOConfig

    given: dict[str, Any] = dict(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
        temperature=0.7, learning_rate=1e-3, bf16=False, use_cpu=ON_CPU, tf32=None if ON_CPU else False,
        report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return GRPOConfig(**(given | changes))


def staged(out: Path, stages: dict[str, Any] | None = None, *, base: Any = None, **changes: Any) -> Any:
    """A trainer with the curriculum; ``changes`` named like a GRPOConfig field go there, the others to the trainer."""
    options: dict[str, Any] = dict(stage_steps=2, fraction=0.5, spec=SPEC) | (stages or {})
    return curriculum(base)(**_given(out, changes), curriculum=Curriculum(**options))


def recorded(out: Path, options: Recording | None = None, *, base: Any = None, **changes: Any) -> Any:
    """A trainer that only records."""
    return recording(base)(**_given(out, changes), recording=options)


def _given(out: Path, changes: dict[str, Any]) -> dict[str, Any]:
    from trl import GRPOConfig

    fields = {key: value for key, value in changes.items() if key in GRPOConfig.__dataclass_fields__}
    given: dict[str, Any] = dict(
        model=make_model(), reward_funcs=digits, train_dataset=dataset(20), eval_dataset=dataset(4, seed=1),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    given |= {key: value for key, value in changes.items() if key not in fields}
    return given | {"args": arguments(out, **fields)}


def selected(out: Path, stage: int) -> list[str]:
    """The ids that a stage trained on, best first."""
    return [row["id"] for row in json_lines(out / "cropi" / f"stage-{stage:04d}" / "selected.jsonl")]


def stored(path: Path, *, seed: int, count: int, sets: list[str] | None = None, **changes: Any) -> Path:
    """A file of trajectories with token ids, for the prompts of ``dataset(count, seed)``."""
    records = make_records(count, seed=seed, sets=sets)
    return write_lines(path, [with_token_ids(record) | changes for record in records])


def files(folder: Path, train: int = 16, valid: int = 8, sets: list[str] | None = None) -> dict[str, Path]:
    """Stored trajectories for the first training prompts, and for validation prompts."""
    return {
        "train": stored(folder / "train.jsonl", seed=0, count=train),
        "valid": stored(folder / "valid.jsonl", seed=1, count=valid, sets=sets),
    }
