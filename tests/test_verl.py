"""The verl adapters against verl's own classes. `make test-verl` runs this with verl 0.7.1 and 0.9.1."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_data import make_tokenizer, write_lines

from cropi.errors import CropiError
from cropi.trajectories import read_trajectories

ROOT = Path(__file__).resolve().parent.parent
HAS_VERL = importlib.util.find_spec("verl") is not None
if HAS_VERL:
    from cropi.trainers.verl.versions import verl_version

    NEW = verl_version() >= (0, 8)
else:
    NEW = False
verl_only = pytest.mark.skipif(not HAS_VERL, reason="verl is not installed: make test-verl")
old_only = pytest.mark.skipif(not HAS_VERL or NEW, reason="needs verl 0.7: make test-verl")
new_only = pytest.mark.skipif(not NEW, reason="needs verl 0.8 or newer: make test-verl")


@pytest.mark.parametrize("name", ["dataset", "sampler", "trainer"])
def test_modules_that_need_another_verl_say_so(name: str) -> None:
    if HAS_VERL and name != ("sampler" if NEW else "trainer"):
        pytest.skip("this verl has what the module needs")
    with pytest.raises((ModuleNotFoundError, CropiError)) as caught:
        importlib.import_module(f"cropi.trainers.verl.{name}")
    if not HAS_VERL:
        assert "the package 'verl' is needed" in str(caught.value)
    elif NEW:
        assert "since 0.8 verl has no curriculum sampler" in str(caught.value)
    else:
        assert "verl 0.7" in str(caught.value) and "cropi.trainers.verl.sampler" in str(caught.value)


def dataset_file(folder: Path, count: int = 12) -> Path:
    rows = [{"prompt": [{"role": "user", "content": f"{i}+{i}="}], "data_source": "sums",
             "reward_model": {"ground_truth": str(2 * i), "style": "rule"}, "extra_info": {"index": 100 + i}}
            for i in range(count)]  # fmt: skip
    return write_lines(folder / "train.jsonl", rows)


def select_into(path: Path, ids: list[int]) -> Path:
    """A selection file as `cropi select` writes it: a new file under the old name."""
    write_lines(path.with_suffix(".new"), [{"id": str(i), "rank": r} for r, i in enumerate(ids, 1)])
    os.replace(path.with_suffix(".new"), path)
    return path


def data_config(folder: Path, **more: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.create({
        "train_files": [str(dataset_file(folder))], "val_files": [str(folder / "train.jsonl")], "train_batch_size": 2,
        "max_prompt_length": 50, "filter_overlong_prompts": True, "filter_overlong_prompts_workers": None,
        "cache_dir": str(folder / "cache"), "shuffle": True, "seed": 5, "dataloader_num_workers": 0,
        "sampler": None, "custom_cls": {"path": None, "name": None}, **more,
    })  # fmt: skip


def make_dataset(config: Any, files: str = "train_files") -> Any:
    if NEW:
        from verl.trainer.ppo.utils import create_rl_dataset
    else:
        from verl.trainer.main_ppo import create_rl_dataset
    return create_rl_dataset(
        config[files], config, make_tokenizer(chat=True), None, is_train=files == "train_files"
    )


def loader(dataset: Any, sampler: Any) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.utils.dataset.rl_dataset import collate_fn

    return StatefulDataLoader(
        dataset=dataset, batch_size=2, num_workers=0, drop_last=True, collate_fn=collate_fn, sampler=sampler
    )


def indices(batch: dict[str, Any]) -> list[int]:
    return [int(info["index"]) for info in batch["extra_info"]]


# --------------------------------------------------------------------------------------------------- dataset
CUSTOM = {"path": "pkg://cropi.trainers.verl.dataset", "name": "SelectedDataset"}


@verl_only
def test_the_dataset_holds_the_selected_prompts_only(tmp_path: Path) -> None:
    selection = select_into(tmp_path / "selected.jsonl", [107, 101, 110])
    val = write_lines(
        tmp_path / "val.jsonl", json.loads(f"[{dataset_file(tmp_path).read_text().splitlines()[0]}]")
    )
    config = data_config(
        tmp_path, custom_cls=CUSTOM, cropi={"selection": str(selection)}, val_files=[str(val)]
    )
    dataset = make_dataset(config)
    assert [dataset[i]["extra_info"]["index"] for i in range(len(dataset))] == [107, 101, 110]
    assert dataset[0]["index"] == 107 and dataset[0]["raw_prompt"][0]["content"] == "7+7="
    assert len(make_dataset(config, "val_files")) == 1
    dataset.resume_dataset_state()
    assert len(dataset) == 3
    (tmp_path / "ids.txt").write_text("111\n102\n")
    config.cropi.selection = str(tmp_path / "ids.txt")
    assert [row["extra_info"]["index"] for row in make_dataset(config)] == [111, 102]


@verl_only
@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([107, 999], "1 of 2 prompts of .* are not in the dataset, for example '999'"),
        ([107], "names 1 prompts, fewer than one training batch of 2"),
        ([], "is empty"),
        (None, "there is no file"),
    ],
)
def test_selections_that_do_not_fit(tmp_path: Path, ids: list[int] | None, words: str) -> None:
    path = tmp_path / "selected.jsonl"
    if ids is not None:
        select_into(path, ids)
    with pytest.raises(CropiError, match=words):
        make_dataset(data_config(tmp_path, custom_cls=CUSTOM, cropi={"selection": str(path)}))


@verl_only
def test_rows_without_a_stable_id(tmp_path: Path) -> None:
    selection = str(select_into(tmp_path / "selected.jsonl", [100, 101]))
    config = data_config(tmp_path, custom_cls=CUSTOM, cropi={"selection": selection})
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows[3]["extra_info"]["index"] = 100
    write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(CropiError, match="rows 0 and 3 have the same extra_info.index '100'"):
        make_dataset(config)
    config.cropi.id_key = "extra_info.key"
    with pytest.raises(CropiError, match="row 0 has no extra_info.key"):
        make_dataset(config)
    del config["cropi"]
    with pytest.raises(CropiError, match="data.cropi.selection=FILE is missing"):
        make_dataset(config)


# --------------------------------------------------------------------------------------------- sampler (0.7)
def make_sampler(folder: Path, **more: Any) -> tuple[Any, Any]:
    from verl.trainer.main_ppo import create_rl_sampler

    options = {"class_path": "pkg://cropi.trainers.verl.sampler", "class_name": "CropiSampler",
               "selection": str(folder / "selected.jsonl"), **more}  # fmt: skip
    config = data_config(folder, sampler=options)
    dataset = make_dataset(config)
    return dataset, create_rl_sampler(config, dataset)


def proto(ids: list[int], **meta: Any) -> Any:
    from verl import DataProto

    n = len(ids)
    tensors = {
        "prompts": torch.tensor([[0, 40 + i % 7] for i in ids]), "responses": torch.tensor([[50, 1]] * n),
        "attention_mask": torch.tensor([[0, 1, 1, 1]] * n), "response_mask": torch.ones(n, 2, dtype=torch.long),
        "old_log_probs": torch.full((n, 2), -0.5),
        "token_level_scores": torch.tensor([[0.0, float(k % 2)] for k in range(n)]),
    }  # fmt: skip
    infos = np.array([{"index": i} for i in ids], dtype=object)
    return DataProto.from_dict(tensors=tensors, non_tensors={"extra_info": infos}, meta_info=meta)


@old_only
def test_the_sampler_walks_the_selection_and_takes_up_a_new_one(tmp_path: Path) -> None:
    from verl.experimental.dataset.sampler import AbstractCurriculumSampler

    first, second = [103, 104, 105, 106], [109, 110, 111, 100]
    select_into(tmp_path / "selected.jsonl", first)
    dataset, sampler = make_sampler(tmp_path, record=str(tmp_path / "rollouts"))
    assert isinstance(sampler, AbstractCurriculumSampler) and len(sampler) == 4
    epochs = [[i for batch in loader(dataset, sampler) for i in indices(batch)] for _ in range(3)]
    assert all(sorted(epoch) == first for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) > 1
    seen = []
    for step, batch in enumerate(loader(dataset, sampler)):
        seen.append(indices(batch))
        if step == 0:
            select_into(tmp_path / "selected.jsonl", second)
        sampler.update(batch=proto([i for i in seen[-1] for _ in range(2)], temperature=0.9))
    assert set(seen[0]) <= set(first) and sorted(seen[1] + seen[2]) == sorted(second) and len(seen) == 3
    files = sorted((tmp_path / "rollouts").iterdir())
    assert [path.name for path in files] == ["1.jsonl", "2.jsonl", "3.jsonl"]
    groups = list(read_trajectories(files[0]))
    assert {int(group.id) for group in groups} == set(seen[0])
    assert groups[0].prompt_ids == [40 + int(groups[0].id) % 7] and groups[0].logprobs == [[-0.5, -0.5]] * 2
    assert groups[0].rewards == [0.0, 1.0] and groups[0].temperature == pytest.approx(0.9)


@old_only
@pytest.mark.parametrize("change", [False, True])
def test_the_sampler_resumes_with_verls_checkpoints(tmp_path: Path, change: bool) -> None:
    first, second = [103, 104, 105, 106, 107, 108], [100, 101]
    select_into(tmp_path / "selected.jsonl", first)
    dataset, sampler = make_sampler(tmp_path)
    running = loader(dataset, sampler)
    whole, state = [], None
    for _ in range(2):
        for batch in running:
            whole.append(indices(batch))
            if len(whole) == 4:
                state = running.state_dict()
    if change:
        select_into(tmp_path / "selected.jsonl", second)
    dataset, sampler = make_sampler(tmp_path)
    resumed = loader(dataset, sampler)
    resumed.load_state_dict(state)
    rest = [indices(batch) for batch in resumed]
    assert (sorted(rest[0]) == second and len(rest) == 1) if change else rest == whole[4:]


# --------------------------------------------------------------------------------------- trainer (0.8 and later)
def trainer_on(folder: Path, options: dict[str, Any], **more: Any) -> Any:
    """The registered trainer as far as its data goes: no engine, no ray."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf, open_dict

    from cropi.trainers.verl.trainer import CropiTrainerSync

    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer")
    with open_dict(config):
        config.data = OmegaConf.merge(config.data, data_config(folder))
        config.data.val_batch_size = None
        config.trainer.update({"cropi": options, "default_local_dir": str(folder / "checkpoints"), "save_freq": 2,
                               "total_training_steps": 8, **more})  # fmt: skip
        config.trainer.v1.trainer_mode = "cropi_sync"
    trainer = CropiTrainerSync(config)
    trainer.tokenizer, trainer.processor, trainer.global_steps = make_tokenizer(chat=True), None, 1
    trainer.timing_raw = {}
    trainer.checkpoint_manager = SimpleNamespace(update_weights=lambda step: None)
    trainer._init_dataloader()
    return trainer


@new_only
def test_verl_finds_the_trainer_by_its_name() -> None:
    code = "import verl; from verl.trainer.ppo.v1 import get_trainer_cls; print(get_trainer_cls('cropi_sync').__name__)"
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "cropi.trainers.verl.trainer"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "CropiTrainerSync"


@new_only
def test_the_methods_that_the_trainer_overrides_are_still_called_by_verl() -> None:
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from cropi.trainers.verl.trainer import CropiTrainerSync

    for name in ("_init_dataloader", "on_train_begin", "step", "on_step_end"):
        assert name in vars(CropiTrainerSync)
        mine, theirs = (inspect.signature(getattr(c, name)) for c in (CropiTrainerSync, PPOTrainer))
        assert list(mine.parameters) == list(theirs.parameters), name
        assert f"self.{name}(" in inspect.getsource(PPOTrainer), name
    fit = inspect.getsource(PPOTrainer.fit)
    # A stage's checkpoint must be there before its selection is made, and the rollouts until they are recorded.
    assert (
        fit.index("self.step(")
        < fit.index("_save_checkpoint()")
        < fit.index("on_step_end()")
        < fit.index("kv_clear(")
    )


@new_only
def test_a_stage_ends_with_a_new_selection(tmp_path: Path) -> None:
    select_into(tmp_path / "selected.jsonl", [103, 104, 105, 106])
    write_lines(tmp_path / "next", [{"id": str(i)} for i in (110, 111, 100)])
    command = (
        f"echo {{stage}} {{step}} {{checkpoint}} >> {tmp_path}/calls && cp {tmp_path}/next {{selection}}"
    )
    options = {"selection": str(tmp_path / "selected.jsonl"), "stage_steps": 4, "command": command}
    trainer = trainer_on(tmp_path, options)
    assert trainer.total_training_steps == 8 and trainer.steps_per_epoch == 6
    # What verl does for its synchronous mode, by name: it must do it for this one.
    assert type(trainer.replay_buffer).__name__ == "ReplayBuffer" and trainer.trainer_mode == "sync"
    trainer.on_train_begin()
    drawn: dict[int, list[int]] = {}
    for step in range(1, 9):
        trainer.global_steps = step
        drawn[step] = [int(info["index"]) for info in trainer._fetch_one_gen_batch()["extra_info"]]
        trainer.on_step_end()
    assert {i for step in (1, 2, 3, 4) for i in drawn[step]} == {103, 104, 105, 106}
    assert {i for step in (5, 6, 7, 8) for i in drawn[step]} == {110, 111, 100}
    # Not at the last step: nothing is trained after it.
    checkpoint = tmp_path / "checkpoints" / "global_step_4" / "actor"
    assert (tmp_path / "calls").read_text() == f"1 4 {checkpoint}\n"
    assert "echo 1 4" in (tmp_path / "checkpoints" / "cropi_select.log").read_text()


@new_only
def test_a_run_that_died_at_the_end_of_a_stage_selects_again(tmp_path: Path) -> None:
    select_into(tmp_path / "selected.jsonl", [103, 104, 105, 106])
    write_lines(tmp_path / "next", [{"id": str(i)} for i in (110, 111)])
    options = {
        "selection": str(tmp_path / "selected.jsonl"),
        "stage_steps": 2,
        "command": f"cp {tmp_path}/next {{selection}}",
    }
    trainer = trainer_on(tmp_path, options)
    trainer._fetch_one_gen_batch()
    state = trainer.train_dataloader.state_dict()  # saved before the stage's selection is made
    trainer = trainer_on(tmp_path, options)
    trainer.train_dataloader.load_state_dict(state)
    trainer.global_steps = 3  # as fit() has it when it goes on after step 2
    trainer.on_train_begin()
    assert sorted(int(info["index"]) for info in trainer._fetch_one_gen_batch()["extra_info"]) == [110, 111]


@new_only
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "selection=FILE is missing"),
        ({"selection": "s", "stages": 4}, "trainer.cropi.stages is not known"),
        ({"selection": "s", "command": "x {model}", "stage_steps": 4}, "{model} is not known here"),
        ({"selection": "s", "command": "x"}, "stage_steps must be at least 1"),
        ({"selection": "s", "command": "x", "stage_steps": 5}, "stage_steps is 5 and trainer.save_freq 2"),
    ],
)
def test_trainer_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(CropiError) as caught:
        trainer_on(tmp_path, options)
    assert words in str(caught.value)


def queue_table(ids: list[int]) -> Any:
    """A table of the transfer queue: ragged tensors, and Python values."""
    from tensordict import TensorDict

    def ragged(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(values, layout=torch.jagged)

    lengths = [2 + k % 2 for k in range(len(ids))]
    table = TensorDict({
        "prompts": ragged([torch.tensor([40 + i % 7] * (1 + i % 2)) for i in ids]),
        "responses": ragged([torch.arange(60, 60 + n) for n in lengths]),
        "response_mask": ragged([torch.ones(n, dtype=torch.long) for n in lengths]),
        "rm_scores": ragged([torch.tensor([0.0] * (n - 1) + [float(n == 2)]) for n in lengths]),
        "rollout_log_probs": ragged([torch.full((n,), -0.25) for n in lengths]),
    }, batch_size=[len(ids)])  # fmt: skip
    from verl.utils import tensordict_utils as tu

    tu.assign_non_tensor_stack(table, "extra_info", [{"index": i} for i in ids])
    tu.assign_non_tensor_stack(table, "reward_model", [{"ground_truth": str(i)} for i in ids])
    return table


def check_queue_records(path: Path) -> None:
    groups = list(read_trajectories(path))
    assert [group.id for group in groups] == ["103", "104"]
    for group in groups:
        i = int(group.id)
        assert group.prompt_ids == [40 + i % 7] * (1 + i % 2) and group.answer == str(i)
        assert group.response_ids == [[60, 61], [60, 61, 62]] and group.rewards == [1.0, 0.0]
        assert group.logprobs == [[-0.25] * 2, [-0.25] * 3] and group.temperature == 0.8


@new_only
def test_rollouts_of_a_step_are_recorded_with_their_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transfer_queue

    select_into(tmp_path / "selected.jsonl", [103, 104])
    options = {"selection": str(tmp_path / "selected.jsonl"), "record": str(tmp_path / "rollouts")}
    trainer = trainer_on(tmp_path, options)
    trainer.config.actor_rollout_ref.rollout.temperature = 0.8
    trainer.config.actor_rollout_ref.rollout.calculate_log_probs = True
    ids = [103, 103, 104, 104, 104]  # the last row pads the batch
    keys = ["a_0_0", "a_1_0", "b_0_0", "b_1_0", "pad_0_0"]
    asked = {}

    def get(keys: list[str], partition_id: str, select_fields: list[str]) -> Any:
        asked["fields"] = select_fields
        return queue_table(ids)

    monkeypatch.setattr(transfer_queue, "kv_batch_get", get)
    base = type(trainer).__mro__[1]
    tags = [{}, {}, {}, {}, {"is_padding": True}]
    batch = SimpleNamespace(keys=keys, tags=tags, partition_id="train")
    monkeypatch.setattr(base, "step", lambda self, metrics, timing: batch)
    assert trainer.step({}, {}) is batch
    check_queue_records(tmp_path / "rollouts" / "1.jsonl")
    assert {"prompts", "responses", "response_mask", "rm_scores", "extra_info", "rollout_log_probs"} <= set(
        asked["fields"]
    )


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
    assert {group.policy for group in read_trajectories(out)} == {"step 4"}
    assert main([*words, "--id-key", "extra_info.name"]) == 2
    assert "no extra_info.name, which is the only stable id" in capsys.readouterr().err


@verl_only
def test_pickled_batches_are_read(tmp_path: Path) -> None:
    from cropi.cli import main

    (tmp_path / "6").mkdir()
    proto([103, 103, 104, 104], temperature=0.9).save_to_disk(tmp_path / "6" / "gen_batch.dp")
    out = tmp_path / "t.jsonl"
    assert main(["convert", str(tmp_path / "6" / "gen_batch.dp"), "--source", "verl", "--out", str(out)]) == 0
    groups = list(read_trajectories(out))
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
    from cropi.cli import _parser

    selection = select_into(tmp_path / "selected.jsonl", [1])
    (tmp_path / "select-2").mkdir()
    select_into(tmp_path / "select-2" / "selected.jsonl", [5, 6])
    words = [str(tmp_path / "actor"), "2", str(selection), "base", "t.jsonl", "a.jsonl", "b.jsonl"]
    script = ROOT / "examples" / "verl" / "select.sh"
    subprocess.run(["bash", str(script), *words], env=recorder(tmp_path), check=True)
    merge, run = calls(tmp_path)
    assert merge[:3] == ["-m", "verl.model_merger", "merge"]
    args = _parser().parse_args(run[2:])
    assert args.behaviour_model == "base" and args.valid == ["a.jsonl", "b.jsonl"] and args.stage == "2"
    assert [json.loads(line)["id"] for line in selection.read_text().splitlines()] == ["5", "6"]


@verl_only
def test_the_adapter_costs_next_to_nothing_per_batch(tmp_path: Path) -> None:
    """Looking for a new selection is one stat of a file."""
    from cropi.trainers.verl.selected import Selected

    selected = Selected(select_into(tmp_path / "s.jsonl", list(range(1000))), [str(i) for i in range(1000)])
    begin = time.process_time()
    for _ in range(100):
        assert not selected.refresh()
    assert time.process_time() - begin < 0.1
