"""verl's binary dumps, written by verl itself, and the example scripts' option names against its configuration."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.made_verl import ROOT, check_queue_records, new_only, proto, queue_table, select_into, verl_only

from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.trainers.versions import UntestedVersion


@new_only
def test_dumps_of_the_transfer_queue_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is written by verl itself."""
    import transfer_queue
    from omegaconf import OmegaConf
    from verl.utils.skip.rollout_skip import RolloutTqSkip

    from cropi.cli import main

    config = OmegaConf.create({
        "trainer": {"experiment_name": "e", "project_name": "p", "v1": {"trainer_mode": "sync", "sync": {}}},
        "actor_rollout_ref": {"rollout": {"n": 2}}, "data": {"train_batch_size": 2},
    })  # fmt: skip
    local = OmegaConf.create({"enable": True, "dump_dir": str(tmp_path), "steps": [4], "action": "cache"})
    keep, transfer_queue.kv_batch_get = (
        transfer_queue.kv_batch_get,
        lambda **_: queue_table([103, 103, 104, 104]),
    )
    try:
        batch = SimpleNamespace(
            keys=["a_0_0", "a_1_0", "b_0_0", "b_1_0"], tags=[{}] * 4, partition_id="train"
        )
        RolloutTqSkip(local, config).prepare_data(4, batch, 4)
    finally:
        transfer_queue.kv_batch_get = keep
    (path,) = tmp_path.rglob("tq_batch.pt")
    out = tmp_path / "t.jsonl"
    words = ["convert", str(path), "--source", "verl", "--out", str(out), "--temperature", "0.8"]
    assert main(words) == 0
    check_queue_records(out)
    assert {group.policy for group in read(out)} == {"step 4"}
    assert main([*words, "--id-key", "extra_info.name"]) == 2
    assert "extra_info.name: is missing, which --id-key names" in capsys.readouterr().err


@verl_only
def test_pickled_batches_are_read(tmp_path: Path) -> None:
    from cropi.cli import main

    (tmp_path / "6").mkdir()
    proto([103, 103, 104, 104], temperature=0.9).save_to_disk(tmp_path / "6" / "gen_batch.dp")
    out = tmp_path / "t.jsonl"
    assert main(["convert", str(tmp_path / "6" / "gen_batch.dp"), "--source", "verl", "--out", str(out)]) == 0
    groups = list(read(out))
    assert [(group.id, group.policy, group.rewards) for group in groups] == [
        ("103", "step 6", [0.0, 1.0]), ("104", "step 6", [0.0, 1.0])]  # fmt: skip
    assert groups[0].response_ids == [[50, 1]] * 2 and groups[0].temperature == pytest.approx(0.9)


# --------------------------------------------------------------------------------------------- example scripts
def recorder(folder: Path) -> dict[str, str]:
    """An environment whose PYTHON writes down its arguments instead of running them."""
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {folder}/calls\necho == >> {folder}/calls\n')
    script.chmod(0o755)
    return os.environ | {"PYTHON": str(script)}


def calls(folder: Path) -> list[list[str]]:
    return [call.splitlines() for call in (folder / "calls").read_text().split("==\n") if call]


@verl_only
@pytest.mark.parametrize("rollouts", [False, pytest.param(True, marks=new_only)])
def test_the_stage_script_speaks_verls_options(tmp_path: Path, rollouts: bool) -> None:
    """Every option of the example's command line exists in verl's own configuration."""
    from hydra import compose, initialize_config_module

    words = ["model folder", "set.parquet", "6", str(tmp_path / "out"), "val.parquet"]
    (tmp_path / "out" / "rollouts" / "6" / "0").mkdir(parents=True)
    (tmp_path / "out" / "rollouts" / "6" / "0" / "tq_batch.pt").touch()
    extra = [str(tmp_path / "r.jsonl")] if rollouts else []
    stage = ROOT / "examples" / "verl" / "stage.sh"
    subprocess.run(["bash", str(stage), *words, *extra], env=recorder(tmp_path), check=True)
    train, merge, *convert = calls(tmp_path)
    assert train[:2] == ["-m", "verl.trainer.main_ppo"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=train[2:])  # an unknown option raises
    assert config.actor_rollout_ref.model.path == "model folder" and config.data.train_files == "set.parquet"
    assert config.trainer.total_training_steps == config.trainer.save_freq == 6
    options = dict(zip(merge[3::2], merge[4::2]))
    assert merge[:3] == ["-m", "verl.model_merger", "merge"]
    out = tmp_path / "out"
    assert options == {
        "--backend": "fsdp",
        "--local_dir": f"{out}/checkpoints/global_step_6/actor",
        "--target_dir": f"{out}/hf",
    }
    source = inspect.getsource(importlib.import_module("verl.model_merger.base_model_merger"))
    assert all(f'"{name}"' in source for name in options)
    if rollouts:
        assert list(config.skip.rollout_tq.steps) == [1, 2, 3, 4, 5, 6] and config.skip.rollout_tq.enable
        (command,) = convert
        assert command[:3] == ["-m", "cropi", "convert"] and command[-1].endswith("tq_batch.pt")


def test_the_select_script_speaks_our_own_options(tmp_path: Path) -> None:
    from cropi.cli import make_parser

    selection = select_into(tmp_path / "selected.jsonl", [1])
    (tmp_path / "select-2").mkdir()
    select_into(tmp_path / "select-2" / "selected.jsonl", [5, 6])
    words = [str(tmp_path / "actor"), "2", str(selection), "base", "t.jsonl", "a.jsonl", "b.jsonl"]
    script = ROOT / "examples" / "verl" / "select.sh"
    subprocess.run(["bash", str(script), *words], env=recorder(tmp_path), check=True)
    merge, run = calls(tmp_path)
    assert merge[:3] == ["-m", "verl.model_merger", "merge"]
    args = make_parser().parse_args(run[2:])
    assert args.behaviour_model == "base" and args.valid == ["a.jsonl", "b.jsonl"] and args.stage == "2"
    assert [json.loads(line)["id"] for line in selection.read_text().splitlines()] == ["5", "6"]


@pytest.mark.parametrize(
    ("other", "fits"), [("0.6.1", False), ("0.7.0", True), ("0.9.9", True), ("0.10.0", False)]
)
def test_verl_outside_the_tested_range(other: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from cropi.trainers.verl.versions import verl_version

    monkeypatch.delenv("CROPI_VERL_UNTESTED", raising=False)
    monkeypatch.setattr("importlib.metadata.version", lambda name: other)
    numbers = tuple(int(part) for part in other.split(".")[:2])
    if fits:
        assert verl_version() == numbers
        return
    if other == "0.10.0":
        with pytest.warns(
            UntestedVersion, match=rf"verl {other} is installed.*tested with 0.7.1 to 0.9.1.*by name"
        ):
            assert verl_version() == numbers
        return
    words = rf"verl {other} is installed.*tested with 0.7.1 to 0.9.1.*cropi curriculum.*CROPI_VERL_UNTESTED=1"
    with pytest.raises(CropiError, match=words):
        verl_version()
    monkeypatch.setenv("CROPI_VERL_UNTESTED", "1")
    assert verl_version() == numbers
