"""A budget for the scoring of a TRL curriculum: what is sketched anew, what is kept and for how long, resumed runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

from support import trl_runs  # noqa: E402
from support.commands import json_lines  # noqa: E402
from support.trl_runs import Seen, selected, staged  # noqa: E402

from cropi.errors import CropiError  # noqa: E402
from cropi.ranking.table import read_scores  # noqa: E402
from cropi.trainers.trl import Curriculum, Live  # noqa: E402
from cropi.trainers.trl.stages import Stages  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return trl_runs.files(tmp_path_factory.mktemp("stored"))


def stores(out: Path) -> list[str]:
    """The training prompts' stores, by stage."""
    return sorted(f"{path.parent.name[-1]} {path.name}" for path in out.glob("cropi/stage-*/sketches-*"))


@pytest.mark.long
def test_stages_within_a_share_of_the_tokens_and_a_resumed_run(
    files: dict[str, Path], tmp_path: Path
) -> None:
    options = files | {"passes": 0.5, "fraction": 0.25}
    run: dict[str, Any] = dict(
        save_strategy="steps", save_steps=3, save_total_limit=1, max_steps=6, eval_dataset=None
    )
    whole, again = tmp_path / "whole", tmp_path / "again"
    seen = Seen()
    staged(whole, options, reward_funcs=[seen], **run | {"max_steps": 3}).train()
    shutil.copytree(whole, again)
    for out in (whole, again):  # one goes on at once; of the other a stage is lost that no checkpoint knows
        if out is again:
            shutil.copytree(whole / "cropi" / "stage-0002", again / "cropi" / "stage-0002")
        staged(out, options, reward_funcs=[seen], **run).train(
            resume_from_checkpoint=str(out / "checkpoint-3")
        )
    assert [selected(whole, stage) for stage in range(3)] == [selected(again, stage) for stage in range(3)]
    notes = json_lines(whole / "cropi" / "stages.jsonl")
    for stage, note in enumerate(notes):
        folder = whole / "cropi" / f"stage-{stage:04d}"
        plan = json.loads((folder / "anew.json").read_text())
        assert plan["spent"] <= plan["tokens"] and note["anew"] == len(plan["ids"]) < note["usable"]
        assert note["anew"] + note["left"] == note["usable"] and note["selected"] == 4
        rows = [row for row in read_scores(folder / "scores.parquet").rows if row.status == "ok"]
        assert {row.id for row in rows if "scored_at" not in row.extra} == set(plan["ids"])
    # When stage 2 began, the checkpoint of step 3 led back to stage 1, and nothing to stage 0.
    both = ["sketches-train-00000", "sketches-train-earlier"]
    assert stores(whole) == stores(again) == [f"{stage} {name}" for stage in (1, 2) for name in both]


@pytest.mark.long
def test_a_share_of_the_time(files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage scores all; the third nothing, where a millionth of its time pays for nothing: the second keeps
    its prompts, and left no sketches to the third, which scored all again. A run that went on between two stages took
    the time since the machine's start for that of a stage."""
    valid, score, others = Stages._valid, Stages._score, []

    def of_stage(self: Stages, stage: int, folder: Path) -> Any:
        return (None, self.options) if stage == 1 else valid(self, stage, folder)

    def scored(self: Stages, stage: int, folder: Path, seconds: float) -> Any:
        others.append(seconds)
        return score(self, stage, folder, seconds)

    monkeypatch.setattr(Stages, "_valid", of_stage)
    monkeypatch.setattr(Stages, "_score", scored)
    options = files | {"budget": 1e-6, "fraction": 0.25}
    run: dict[str, Any] = dict(max_steps=6, eval_dataset=None, save_strategy="steps", save_steps=4)
    trainer = staged(tmp_path, options, **run)
    trainer.train()
    first, kept, third = json_lines(tmp_path / "cropi" / "stages.jsonl")
    assert kept["kept"] and (first["left"], third["anew"]) == (0, 0)
    assert first["anew"] == third["left"] == first["usable"] and len(selected(tmp_path, 2)) == 4
    assert trainer._cropi.seconds() > 0
    held = json.loads((tmp_path / "checkpoint-4" / "cropi_state.json").read_text())["seconds"]
    staged(tmp_path, options, **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert others[-1] == held > 0


def test_options_are_checked(files: dict[str, Path]) -> None:
    for name in ("budget", "passes"):
        with pytest.raises(CropiError, match=rf"{name} must be in \(0, 1\], got 1.5"):
            Curriculum(stage_steps=2, **files, **{name: 1.5})
        with pytest.raises(CropiError, match=f"{name}: live makes no scoring pass"):
            Curriculum(stage_steps=2, valid=files["valid"], live=Live(), **{name: 0.5})
