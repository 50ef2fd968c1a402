"""The miniature RLVR experiment: its commands, its tables, and the sums they are made of."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the experiment's policy is a transformers model")

from support.mini import NANO

from benchmarks.rlvr_mini import __main__ as command
from benchmarks.rlvr_mini import choices, cost, steps
from benchmarks.rlvr_mini.arms import ARMS, LEVERS, choose
from benchmarks.rlvr_mini.config import Scale
from benchmarks.rlvr_mini.data import base_model, seed_data
from benchmarks.rlvr_mini.report import reference, write_report
from benchmarks.rlvr_mini.summary import Finished, mean_curve, reach, resampled_gains
from benchmarks.rlvr_mini.tasks import (
    FAMILIES,
)
from cropi.errors import CropiError


# --------------------------------------------------------------------------------------------- command
def test_command_runs_two_arms_and_reports(work: Path, tmp_path: Path) -> None:
    options = ["--scale", "nano", "--work", str(tmp_path), "--arms", "full", "cropi"]
    command.main(options)
    table = (tmp_path / "nano" / "report" / "table.md").read_text()
    assert "| full data, step 12 | 1 |" in table and "| CROPI, sketch, step 4 | 1 |" in table
    assert (tmp_path / "nano" / "report" / "targeted.png").stat().st_size > 0
    result = tmp_path / "nano" / "seed0" / "cropi" / "result.json"
    first = result.stat().st_mtime_ns
    assert len(json.loads(result.read_text())["selections"]) == NANO.steps // NANO.stage
    command.main(options)  # nothing is left to do
    assert result.stat().st_mtime_ns == first


def test_other_numbers_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    other: Scale = dataclasses.replace(NANO, lr=1.0)
    (tmp_path / "nano" / "scale.json").write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(CropiError, match="lr = 1.0, and this run has"):
        command.main(["--scale", "nano", "--work", str(tmp_path)])
    with pytest.raises(CropiError, match="no run is finished"):
        command.main(["--scale", "nano", "--work", str(tmp_path / "x"), "--report-only"])


def test_cost_of_a_selection_by_parts(work: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "cost.md", tmp_path / "nano"
    options = ["--scale", "nano", "--work", str(tmp_path), "--repeats", "1", "--out", str(out)]
    with pytest.raises(CropiError, match="cropi_exact/result.json is missing; run python -m"):
        cost.main(options)
    folder.mkdir()
    shutil.copy(work / "base.pt", folder)
    model = base_model(NANO, folder)
    data = seed_data(NANO, 0, model, folder / "seed0")
    chosen = choose(ARMS["cropi"], NANO, 0, 0, model, data.pool, data.valid, tmp_path / "sketches")
    for arm, names in (("cropi", []), ("cropi_exact", chosen)):
        (folder / "seed0" / arm).mkdir()
        result = {"selections": [{"chosen": names}], "cpu": {"train": 2.0 * NANO.steps}}
        (folder / "seed0" / arm / "result.json").write_text(json.dumps(result))
    cost.main(options)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")][
        1:
    ]
    assert (
        len(rows) == 2 + len(cost.VARIANTS) and f"training took {2.0 * NANO.stage:.1f} s" in out.read_text()
    )
    shared = {row[0]: float(row[3]) for row in rows[2:]}
    assert shared["sketches of width 64, all of the responses"] == 1.0  # the choice that was written above
    assert all(0.0 <= value <= 1.0 for value in shared.values())
    for row in rows:  # seconds and share agree, to the digits written
        seconds = float(row[1])
        assert float(row[2].rstrip("%")) == pytest.approx(100 * seconds / (seconds + 4.0), abs=0.2)


def test_a_step_by_parts(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "CUT", 16)
    out, folder = tmp_path / "steps.md", tmp_path / "nano"
    options = ["--scale", "nano", "--work", str(tmp_path), "--steps", "2", "--turns", "1", "--out", str(out)]
    with pytest.raises(CropiError, match="full_pool3 has no policy.pt; run python -m"):
        steps.main(options)
    folder.mkdir()
    shutil.copy(work / "base.pt", folder)
    model = base_model(NANO, folder)
    data = seed_data(NANO, 0, model, folder / "seed0", 3)
    mixed = sorted(g.id for g in data.pool if min(g.rewards) < max(g.rewards))[:8]
    for arm, chosen in (("full_pool3", []), ("then_long_pool3", mixed)):
        (folder / "seed0" / arm).mkdir()
        torch.save(model.state_dict(), folder / "seed0" / arm / "policy.pt")
        (folder / "seed0" / arm / "result.json").write_text(json.dumps({"selections": [{"chosen": chosen}]}))
    steps.main(options)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")][
        1:
    ]
    assert [row[:4] for row in rows[4:8]] == [
        ["live, visits at their time", "base", tokens, taps]
        for tokens in ("2048", "16")
        for taps in ("no", "yes")
    ]
    assert len(rows) == 16 and len({tuple(row[4:6]) for row in rows[4:8]}) == 1  # the same prompts and tokens
    for row in rows:
        numbers = [float(cell) for cell in row[4:]]
        assert 0 <= numbers[0] <= NANO.prompts and numbers[1] <= numbers[2]
        assert sum(numbers[3:6]) <= numbers[6] + 2  # parts of the whole, to the digits written
    # A row a micro-batch pads nothing.
    assert rows[6][6] == rows[6][5] and float(rows[4][6]) > float(rows[4][5])


def test_choices_of_levers_under_a_trained_policy(work: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "choices.md", tmp_path / "nano"
    options = ["--scale", "nano", "--work", str(tmp_path), "--out", str(out)]
    with pytest.raises(CropiError, match="cropi/policy.pt is missing; run python -m"):
        choices.main(options)
    (folder / "seed0" / "cropi").mkdir(parents=True)
    shutil.copy(work / "base.pt", folder)
    weights = base_model(NANO, folder).state_dict()
    rng = torch.Generator().manual_seed(0)
    moved = {
        k: v + 0.1 * v.std() * torch.randn(v.shape, generator=rng)
        for k, v in weights.items()
        if v.numel() > 1
    }
    torch.save(weights | moved, folder / "seed0" / "cropi" / "policy.pt")
    choices.main(options)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")][
        1:
    ]
    assert rows[0][0] == ARMS["cropi_exact"].label and float(rows[0][2]) == 1.0
    assert {row[0] for row in rows[1:]} == {arm.label for arm in choices.COMPARED}
    shared = {row[0]: float(row[2]) for row in rows}
    assert shared[LEVERS["cropi_nofold"].label] >= 0.5  # 256 numbers of a small model: most of the choice
    model = base_model(NANO, folder)
    model.load_state_dict(weights | moved)
    data = seed_data(NANO, 0, model, folder / "seed0")
    exact = choose(ARMS["cropi_exact"], NANO, 0, 0, model, data.pool, data.valid, tmp_path / "x")
    families = [data.problems[name].family in NANO.targeted for name in exact]
    assert float(rows[0][3]) == pytest.approx(sum(families) / len(families), abs=0.006)


def test_report_of_runs_on_a_larger_pool_alone(tmp_path: Path) -> None:
    """Written by hand, so that every number of the tables is known."""
    targeted, other = NANO.targeted[0], "copy"
    rises = {"full_pool3": 0.01, "cropi_pool3": 0.04, "live_pool3": 0.03}
    for name, rise in rises.items():
        events, steps = [], 12 if name == "full_pool3" else 4
        for step in range(steps + 1):
            # The first selection takes 3 s, every later one 1 s, and a step of training 2 s.
            selecting = 0.0 if step == 0 or name == "full_pool3" else 3.0 + (step - 1) // NANO.stage
            accuracy = dict.fromkeys(NANO.targeted, 0.2 + rise * step) | {other: 0.1}
            events.append({"step": step, "accuracy": dict.fromkeys(FAMILIES, 0.1) | accuracy})
            if step % 2:  # evaluated on the targeted families alone
                events[-1]["accuracy"] = {f: accuracy[f] for f in NANO.targeted}
            # The longer evaluations take 9 s, the others 1 s, and 2 s in the runs of full data.
            short = 2.0 if name == "full_pool3" else 1.0
            spent = sum(short if i % 2 else 9.0 for i in range(step + 1))
            events[-1]["cpu"] = {"train": 2.0 * step, "select": selecting, "evaluate": spent}
        run = {
            "arm": name,
            "seed": 0,
            "collect_cpu": 5.0,
            "evaluations": events,
            "steps": [{"mixed": 1.0 / (step + 1)} for step in range(steps)],
            "cpu": events[-1]["cpu"],
            "selections": [
                {"step": step, "targeted": 0.5, "chosen": ["a"], "cells": {f"{targeted} 1": 1}}
                for step in range(0, steps if name == "full_pool3" else NANO.steps, NANO.stage)
            ],
        }
        folder = tmp_path / "seed0" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(run))
    write_report(NANO, tmp_path, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "took 5 s of processor time" in table
    assert "| full data, pool x 3, step 12 | 1 | 0.310 |" in table  # the mean of steps 10 to 12
    # Up to step 4: 4 s of selecting beside 8 s of training; of the visited prompts (1 + 1/2 + 1/3 + 1/4) / 4.
    assert "| CROPI, sketch, pool x 3, step 4 | 1 | 0.320 | 0.100 | 33.3% | 0.52 | 1.00 |" in table
    # Two selections of 3 and 1 s beside 4 s of training a stage: 4 of 12 s, and 1 of 5 after the first.
    assert "| CROPI, sketch, pool x 3 | 3.00, 1.00 | 4.0 | 33.3% | 20.0% |" in table
    # Full data has 0.23 at step 4, after 8 s. CROPI's first point after the start is step 3 with 0.28, after 6 s of
    # training and 4 of selecting, so that the line to it has 0.23 at step 1.125, after 3.75 s. Evaluations took 2 s in
    # the runs of full data, so that its 8 s are those of 4 evaluations.
    assert "| CROPI, sketch, pool x 3 | 1 | 1 | 3.56 | - | 2.13 | - | 1.07 | - |" in table
    # At step 4 the mean of steps 2 to 4: 0.29 against 0.32.
    assert "| live, pool x 3 | -0.030 | -0.030 |" in table
    assert (tmp_path / "out" / "live.png").stat().st_size and not (tmp_path / "out" / "targeted.png").exists()


def test_steps_to_reach_are_interpolated() -> None:
    curve = [(0, 0.2, 0.0), (10, 0.4, 5.0), (20, 0.6, 10.0)]
    assert reach(curve, 0.5) == pytest.approx((15.0, 7.5))
    assert reach(curve, 0.7) is None
    other = [(0, 0.2, 0.0), (20, 0.4, 30.0)]
    runs = [Finished("x", i, c, [], 0.2, 1.0, 9.0, 0.0, [], 0.5) for i, c in enumerate((curve, other))]
    assert np.allclose(mean_curve(runs), [(0, 0.2, 0.0), (20, 0.5, 20.0)])
    assert runs[0].share == pytest.approx(0.1)


def test_speed_up_of_resampled_seeds_and_against_full_data_of_the_same_pool() -> None:
    def run(arm: str, seed: int, rises: list[float]) -> Finished:
        curve = [(10 * i, value, float(i)) for i, value in enumerate(rises)]
        return Finished(arm, seed, curve, [(0, 0.1), (40, 0.1)], rises[0], 1.0, 9.0, 0.0, [], 0.5)

    slow = [run("full", seed, [0.2, 0.3, 0.4, 0.5, 0.6]) for seed in (0, 1)]
    fast = [run("cropi", 0, [0.2, 0.4, 0.6, 0.6, 0.6]), run("cropi", 1, [0.2, 0.3, 0.4, 0.5, 0.5])]
    assert resampled_gains(slow, slow, 40) == ((1.0, 1.0), (1.0, 1.0))
    # Seed 1 twice never gets there, seed 0 twice in 20 steps.
    assert resampled_gains(fast, slow, 40) == ((0.0, 2.0), (0.0, 2.0))
    # Of steps that cost twice as much there are as few, and half of the time is gained.
    dear = [dataclasses.replace(r, curve=[(s, a, 2 * cpu) for s, a, cpu in r.curve]) for r in fast]
    assert resampled_gains(dear, slow, 40) == ((0.0, 2.0), (0.0, 1.0))
    flat = [run("full", s, [0.2, 0.1, 0.1, 0.1, 0.1]) for s in (0, 1)]
    assert resampled_gains(fast, flat, 40) == ((0.0, 0.0), (0.0, 0.0))
    by_arm = {name: [] for name in (*ARMS, *LEVERS)} | {
        "full": slow,
        "full_pool3": fast,
        "full_cut_pool3": dear,
    }
    assert reference(ARMS | LEVERS, by_arm, "cropi") == slow
    assert reference(ARMS | LEVERS, by_arm, "cropi_pool3") == fast
    assert reference(ARMS | LEVERS, by_arm, "full_cut_pool3") == fast
