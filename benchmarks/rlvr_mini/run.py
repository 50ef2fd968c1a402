"""One run: one arm with one seed, from the base policy to the last step. Killed at any instant, it goes on.

Whatever a step draws follows from (seed, step), so a run that was continued ends in the state of an unbroken one.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.rlvr_mini.arms import Arm, choose
from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.data import SeedData, accuracy, save_torch
from benchmarks.rlvr_mini.grpo import Trainer
from benchmarks.rlvr_mini.live import Live
from cropi.atomic import write_atomic

PARTS = ("train", "select", "evaluate")


@dataclass
class Run:
    """What a checkpoint holds besides model and optimiser.

    ``cpu`` and ``wall`` are seconds by part; ``trained`` those of training up to the last selection, by the wall clock;
    ``evaluations``, ``steps`` and ``selections`` are one dict per event.
    """

    step: int = 0
    chosen: list[str] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    selections: list[dict[str, Any]] = field(default_factory=list)
    cpu: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    wall: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    trained: float = 0.0


class _Timed:
    """Adds the block's processor and wall time to one part of a run."""

    def __init__(self, run: Run, part: str) -> None:
        self.run, self.part = run, part

    def __enter__(self) -> None:
        self.begun = time.process_time(), time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.run.cpu[self.part] += time.process_time() - self.begun[0]
        self.run.wall[self.part] += time.monotonic() - self.begun[1]


def visits(chosen: list[str], first: int, count: int, key: str) -> list[str]:
    """The ``count`` prompts from visit ``first`` on: pass after pass over ``chosen``, each in an order of its own."""
    found: list[str] = []
    for visit in range(first, first + count):
        epoch, place = divmod(visit, len(chosen))
        found.append(random.Random(f"{key} {epoch}").sample(chosen, len(chosen))[place])
    return found


def run_arm(arm: Arm, scale: Scale, seed: int, model: Any, data: SeedData, folder: Path) -> dict[str, Any]:
    """Train ``model`` (which holds the base policy) with one arm; returns and writes ``folder/result.json``."""
    result = folder / "result.json"
    if result.exists():
        return dict(json.loads(result.read_text()))
    run, checkpoint = Run(), folder / "checkpoint.pt"
    with _Timed(run, "select"):
        live = Live(model, scale, seed, data.pool, alike=arm.alike, within=arm.within) if arm.live else None
    trainer = Trainer(model, scale.lr, scale.warmup, arm.cut or scale.tokens, live)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=scale.device, weights_only=True)
        model.load_state_dict(state["model"])
        trainer.optimiser.load_state_dict(state["optimiser"])
        run, trainer.done = Run(**state["run"]), state["run"]["step"]
        if live is not None:
            live.selector.load_state_dict(state["selector"])
    with contextlib.nullcontext() if live is None else live.sketcher:
        _train(arm, scale, seed, model, data, folder, trainer, run)
    final = {"arm": arm.name, "seed": seed, "collect_cpu": data.collect_cpu, **vars(run)}
    save_torch(folder / "policy.pt", model.state_dict())
    write_atomic(result, json.dumps(final))  # last: what has a result is not run again
    checkpoint.unlink(missing_ok=True)
    return final


def _train(
    arm: Arm, scale: Scale, seed: int, model: Any, data: SeedData, folder: Path, trainer: Trainer, run: Run
) -> None:
    """What is left of a run."""
    checkpoint = folder / "checkpoint.pt"
    stage_length = arm.stage or scale.stage
    while True:
        every = scale.evaluate_every * (1 if run.step <= scale.steps else 2)
        if run.step % every == 0 and not any(e["step"] == run.step for e in run.evaluations):
            with _Timed(run, "evaluate"):
                found = evaluate(model, scale, seed, data, run.step)
            run.evaluations.append({**found, "cpu": dict(run.cpu), "wall": dict(run.wall)})
        if run.step == scale.steps * arm.longer:
            break
        stage = run.step // stage_length
        if run.step == 0 or (arm.curriculum and run.step % stage_length == 0):
            if not any(s["step"] == run.step for s in run.selections):
                _select(arm, scale, seed, stage, trainer, data, folder, run)
                _save(checkpoint, model, trainer, run)
        with _Timed(run, "train"):
            since = run.step - run.selections[-1]["step"]
            key = f"visits {seed} {run.selections[-1]['step']}"
            names = visits(run.chosen, since * scale.prompts, scale.prompts, key)
            generator = torch.Generator(scale.device).manual_seed(1_000_003 * (seed + 1) + run.step)
            report = trainer.step([data.problems[name] for name in names], scale.group, generator, names)
        run.steps.append({"reward": report.reward, "mixed": report.mixed})
        run.step += 1
        if run.step % scale.checkpoint_every == 0:
            _save(checkpoint, model, trainer, run)


def evaluate(model: Any, scale: Scale, seed: int, data: SeedData, step: int) -> dict[str, Any]:
    """Accuracy by family: the targeted ones every time, the others at every half of the scale's steps."""
    every = step % max(1, scale.steps // 2) == 0
    families = [f for f in data.test if every or f in scale.targeted]
    found = {f: accuracy(model, data.test[f], scale.test_samples, 77 + seed) for f in families}
    return {"step": step, "accuracy": found}


def _select(
    arm: Arm, scale: Scale, seed: int, stage: int, trainer: Trainer, data: SeedData, folder: Path, run: Run
) -> None:
    sketches, last = folder / f"stage-{stage}", folder / f"stage-{stage - 1}"
    trained = run.wall["train"] - run.trained if run.selections else math.nan
    with _Timed(run, "select"):
        run.chosen = choose(
            arm, scale, seed, stage, trainer.model, data.pool, data.valid, sketches, trainer.optimiser,
            live=trainer.live, others=trained, last=last if stage else None,
        )  # fmt: skip
    run.trained = run.wall["train"]
    tasks = [data.problems[name] for name in run.chosen]
    targeted = sum(p.family in scale.targeted for p in tasks) / len(tasks)
    cells: dict[str, int] = {}
    for p in tasks:
        cells[f"{p.family} {p.difficulty}"] = cells.get(f"{p.family} {p.difficulty}", 0) + 1
    rates = {g.id: sum(g.rewards) / len(g.rewards) for g in data.pool}
    base = sum(rates[name] for name in run.chosen) / len(tasks)
    run.selections.append(
        {
            "step": run.step,
            "targeted": targeted,
            "base_pass_rate": base,
            "cells": cells,
            "chosen": run.chosen if arm.method != "full" else [],
        }
    )
    # The choice is kept; the sketches can be made again, or the next stage keeps some of them.
    shutil.rmtree(last if arm.budget is not None and trainer.live is None else sketches, ignore_errors=True)


def _save(path: Path, model: Any, trainer: Trainer, run: Run) -> None:
    state = {"model": model.state_dict(), "optimiser": trainer.optimiser.state_dict(), "run": dict(vars(run))}
    if trainer.live is not None:
        state["selector"] = trainer.live.selector.state_dict()
    save_torch(path, state)
