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

import pytest
from support.commands import json_lines
from support.made_data import make_tokenizer, write_lines
from support.made_verl import (
    HAS_VERL,
    NEW,
    check_queue_records,
    data_config,
    dataset_file,
    indices,
    loader,
    make_dataset,
    new_only,
    old_only,
    proto,
    queue_table,
    select_into,
    verl_only,
)  # fmt: skip

from cropi.data.export import export
from cropi.data.readers import read
from cropi.errors import CropiError


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


# ---------------------------------------------------------------------------------------------------- export
@verl_only
def test_verls_own_dataset_reads_an_export(tmp_path: Path) -> None:
    """`--format verl` from records: parquet, in order, with what its reward manager and samplers look up."""
    records = [
        {"id": f"p{i}", "prompt": f"{i}+{i}=", "answer": 2 * i, "task": "sums", "responses": ["a", "b"], "level": i,
         "rewards": [1.0, 0.0]} for i in range(4)
    ]  # fmt: skip
    export(tmp_path / "chosen.parquet", ["p3", "p1"], format="verl", trajectories=records)
    dataset = make_dataset(
        data_config(tmp_path, train_files=[str(tmp_path / "chosen.parquet")], shuffle=False)
    )
    assert len(dataset) == 2
    row = dataset[0]
    assert row["raw_prompt"][0]["content"] == "3+3=" and row["index"] == "p3"
    assert row["data_source"] == "sums" and row["reward_model"]["ground_truth"] == "6"
    assert row["extra_info"]["index"] == "p3" and row["extra_info"]["level"] == 3


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
    rows = json_lines(tmp_path / "train.jsonl")
    rows[3]["extra_info"]["index"] = 100
    write_lines(tmp_path / "train.jsonl", rows)
    with pytest.raises(CropiError, match="rows 0 and 3 have the same extra_info.index '100'"):
        make_dataset(config)
    config.cropi.id_key = "extra_info.key"
    with pytest.raises(CropiError, match="row 0 has the extra_info.key None"):
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
    files = sorted((tmp_path / "rollouts").glob("*.jsonl"))
    assert [path.name for path in files] == ["1.jsonl", "2.jsonl", "3.jsonl"]
    groups = list(read(files[0]))
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


@verl_only
def test_the_adapter_costs_next_to_nothing_per_batch(tmp_path: Path) -> None:
    """Looking for a new selection is one stat of a file."""
    from cropi.data.prompt_ids import PromptIds
    from cropi.trainers.verl.selected import Selected

    rows = PromptIds([{"id": i} for i in range(1000)], "id")
    selected = Selected(select_into(tmp_path / "s.jsonl", list(range(1000))), rows)
    begin = time.process_time()
    for _ in range(100):
        assert not selected.refresh()
    assert time.process_time() - begin < 0.1
