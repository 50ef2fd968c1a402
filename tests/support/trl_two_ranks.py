"""Run by ``accelerate launch`` with two processes: the curriculum in TRL, with groups cut in two by the ranks or not.

    accelerate launch --multi_gpu --num_processes 2 tests/support/trl_two_ranks.py OUT TRAIN VALID

Every rank writes what it saw to ``OUT/<run>-rank<r>.json``.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.simplefilter("ignore", FutureWarning)
torch.set_num_threads(1)

from cropi import Selector  # noqa: E402
from cropi.errors import CropiError  # noqa: E402
from cropi.pipeline import sketches  # noqa: E402
from cropi.trainers.trl import Live  # noqa: E402
from support.trl_runs import Seen, staged  # noqa: E402


def run(name: str, out: Path, stages: dict[str, Any], resume: bool = False, **changes: Any) -> None:
    seen = Seen()
    trainer = staged(out / name, stages, reward_funcs=[seen], ddp_backend="gloo", **changes)
    error = ""
    try:
        trainer.train(resume_from_checkpoint=str(out / name / "checkpoint-3") if resume else None)
    except CropiError as caught:
        error = str(caught)
    note = {
        "seen": seen.ids, "world": trainer.accelerator.num_processes, "error": error,
        "selector": _selector(trainer),
        "plan": trainer._cropi.plan.rows, "sum": float(sum(p.double().sum() for p in trainer.model.parameters())),
    }  # fmt: skip
    (out / f"{name}{'-resumed' if resume else ''}-rank{trainer.accelerator.process_index}.json").write_text(
        json.dumps(note)
    )


def _selector(trainer: Any) -> list[Any]:
    if trainer._cropi.live is None:
        return []
    selector = trainer._cropi.live.selector
    return [selector.step, selector._weight.tolist(), selector._shown.tolist()]


def other_order(self: Selector, n: int, step: int | None = None) -> list[Any]:
    """What a rank may draw whose sums have other last digits."""
    return self.ids[-n:]


def broken(*args: Any, **kwargs: Any) -> None:
    raise CropiError("the disk is full")


if __name__ == "__main__":
    folder, files = Path(sys.argv[1]), {"train": sys.argv[2], "valid": sys.argv[3]}
    small = {"max_steps": 4, "eval_dataset": None}
    saved: dict[str, Any] = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    run("whole-groups", folder, files, **saved, **small)
    run("whole-groups", folder, files, True, **saved, **small)
    run("cut-groups", folder, {"valid": files["valid"]}, per_device_train_batch_size=6, **small)
    run("bounded", folder, files | {"passes": 0.6, "fraction": 0.25}, per_device_train_batch_size=4, **small)
    live = {"valid": files["valid"], "live": Live(dim=1024)}
    run("live", folder, live, **saved, **small)
    if int(os.environ["RANK"]) == 1:  # rank 0's draw is both ranks'
        Selector.next = other_order  # type: ignore[method-assign]
    run("live-cut-groups", folder, live, per_device_train_batch_size=6, **small)
    if int(os.environ["RANK"]) == 1:  # rank 0 must not wait for it for ever
        sketches.sketch_part = broken  # type: ignore[assignment]
    run("broken", folder, files, per_device_train_batch_size=4, **small)
    # As torch asks of programs: its threads must not outlive what they use when the interpreter ends.
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # One run in about ten ended in "terminate called without an active exception" on one rank, though no thread of
    # this project's was left. If that was at the interpreter's end, all that is tested had been done.
    os._exit(0)
