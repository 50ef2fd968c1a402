"""`accelerate launch` with two processes: ranks share the sketching, agree on the selection, keep groups whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
pytestmark = pytest.mark.slow

from support import trl_runs  # noqa: E402
from support.commands import json_lines  # noqa: E402
from support.once import once  # noqa: E402
from support.trl_runs import Seen, selected, staged  # noqa: E402

SUPPORT = Path(__file__).resolve().parents[1] / "support"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have trained."""
    return once(tmp_path_factory, "trl-ranks", two_ranks)


def two_ranks(folder: Path) -> None:
    files = trl_runs.files(folder, sets=["x", "y"])
    done = subprocess.run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
            "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
            str(SUPPORT / "trl_two_ranks.py"), str(folder), *map(str, files.values()),
        ],
        # "--multi_gpu" is plain data parallel; on CPUs it is gloo in place of nccl, and no MPI is needed.
        capture_output=True, text=True, timeout=600,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def notes(out: Path, name: str) -> list[dict[str, Any]]:
    found = [json.loads((out / f"{name}-rank{rank}.json").read_text()) for rank in (0, 1)]
    assert all(note["world"] == 2 for note in found)
    return found


def test_ranks_agree_and_train_on_the_selection(out: Path) -> None:
    one, two = notes(out, "whole-groups")
    assert one["plan"] == two["plan"] and one["sum"] == two["sum"] and not one["error"]
    for stage in (0, 1):
        chosen = selected(out / "whole-groups", stage)
        assert len(chosen) == 8
        for step in (2 * stage, 2 * stage + 1):
            first, second = one["seen"][str(step)], two["seen"][str(step)]
            assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
            assert {first[0], second[0]} <= set(chosen)


def test_selection_is_that_of_one_process(out: Path, tmp_path: Path) -> None:
    alone = staged(
        tmp_path, {"train": out / "train.jsonl", "valid": out / "valid.jsonl"}, eval_dataset=None, max_steps=1
    )
    alone.train()
    assert selected(tmp_path, 0) == selected(out / "whole-groups", 0)


def test_ranks_share_a_budget(out: Path, tmp_path: Path) -> None:
    """The plan is that of one process, and every rank sketches its part of it; the others' rows are rank 0's."""
    from cropi.ranking.table import read_scores

    given = {"train": out / "train.jsonl", "valid": out / "valid.jsonl", "passes": 0.6, "fraction": 0.25}
    staged(tmp_path, given, eval_dataset=None, max_steps=1).train()
    folders = [folder / "cropi" / "stage-0000" for folder in (tmp_path, out / "bounded")]
    plans = [json.loads((folder / "anew.json").read_text()) for folder in folders]
    assert plans[0] == plans[1] and selected(tmp_path, 0) == selected(out / "bounded", 0)
    one, two = notes(out, "bounded")
    assert one["plan"] == two["plan"] and not one["error"]
    later = out / "bounded" / "cropi" / "stage-0001"
    again = set(json.loads((later / "anew.json").read_text())["ids"])
    for row in read_scores(later / "scores.parquet").rows:
        if row.status == "ok":
            assert row.extra.get("scored_at") == (None if row.id in again else "0")
    stages = json_lines(out / "bounded" / "cropi" / "stages.jsonl")
    assert [note["anew"] for note in stages] == [len(plans[0]["ids"]), len(again)]


def test_resumed_ranks_go_on_where_they_were(out: Path) -> None:
    for whole, resumed in zip(notes(out, "whole-groups"), notes(out, "whole-groups-resumed")):
        assert resumed["seen"] == {"3": whole["seen"]["3"]}
        assert resumed["sum"] == whole["sum"]


def test_logs_hold_whole_groups(out: Path) -> None:
    whole = [json_lines(out / f"whole-groups/cropi/rollouts/train-rank0000{rank}.jsonl") for rank in (0, 1)]
    assert [len(log) for log in whole] == [4, 4]  # each rank writes its own groups
    folder = out / "cut-groups/cropi/rollouts"
    cut = json_lines(folder / "train-rank00000.jsonl")
    assert not (folder / "train-rank00001.jsonl").exists()  # rank 0 writes those that were cut in two
    assert len(cut) == 4 * 3 and all(len(r["rewards"]) == len(r["logprobs"]) == 4 for r in cut)
    seen = [note["seen"] for note in notes(out, "cut-groups")]
    for step in map(str, range(4)):
        assert len(set(seen[0][step])) == len(set(seen[1][step])) == 2  # six rows each of three prompts
        assert [r["id"] for r in cut if str(r["step"]) == step] == (seen[0][step] + seen[1][step])[::4]


def test_an_error_on_one_rank_reaches_the_other(out: Path) -> None:
    assert [note["error"] for note in notes(out, "broken")] == [
        "rank 1 failed with CropiError: the disk is full",
        "the disk is full",
    ]


@pytest.mark.parametrize("name, each", [("live", 2), ("live-cut-groups", 3)])
def test_live_ranks_have_one_selector(out: Path, name: str, each: int) -> None:
    """Every rank's sketches reach every rank, whole groups or groups that the ranks cut in two."""
    one, two = notes(out, name)
    assert one["selector"] == two["selector"] and one["plan"] == two["plan"] and one["sum"] == two["sum"]
    assert not one["error"]
    step, weight, shown = one["selector"]
    assert step == 4 and sum(w > 0 for w in weight) >= each
    assert abs(sum(weight) - 4 * each) < 0.2  # visits, with little forgotten in four steps
    assert any(shown)


def test_a_live_run_goes_on_with_another_number_of_ranks(out: Path, tmp_path: Path) -> None:
    """One process in the place of two, with generation batches of one size: the fourth step has the same prompts."""
    from cropi.trainers.trl import Live

    shutil.copytree(out / "live", tmp_path / "live")
    seen = Seen()
    alone = staged(
        tmp_path / "live", {"valid": out / "valid.jsonl", "live": Live(dim=1024)}, eval_dataset=None, max_steps=4,
        per_device_train_batch_size=8, reward_funcs=[seen], save_strategy="steps", save_steps=3,
    )  # fmt: skip
    alone.train(resume_from_checkpoint=str(tmp_path / "live" / "checkpoint-3"))
    both = [note["seen"]["3"] for note in notes(out, "live")]
    assert set(seen.ids[3]) == {*both[0], *both[1]} and alone._cropi.live.selector.step == 4
