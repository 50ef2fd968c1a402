"""Adapters of slime, OpenRLHF, SkyRL and NeMo-RL, against stand-ins of what these trainers hand over."""

from __future__ import annotations

import asyncio
import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.made_data import make_model, write_lines
from support.made_slime import RolloutDataSourceWithBuffer, Sample, slime

import cropi
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.trainers import openrlhf, skyrl
from cropi.trainers.nemo_rl import selected_batches
from cropi.trainers.slime.record import record_rollouts


def select(path: Path, ids: list[str]) -> str:
    """A selection, renamed into place as `cropi select` does."""
    write_lines(path.with_suffix(".new"), [{"id": name, "rank": i + 1} for i, name in enumerate(ids)])
    path.with_suffix(".new").rename(path)
    return str(path)


def arguments(folder: Path, ids: list[str], **changes: Any) -> SimpleNamespace:
    rows = [{"prompt": f"{i}+1=", "label": str(i + 1), "metadata": {"id": f"p{i}"}} for i in range(10)]
    given = {
        "prompt_data": str(write_lines(folder / "prompts.jsonl", rows)), "rollout_seed": 3, "rollout_shuffle": False,
        "rollout_global_dataset": True, "n_samples_per_prompt": 2, "rollout_batch_size": 2, "save": str(folder),
        "load": str(folder), "cropi_selection": select(folder / "selected.jsonl", ids), "rollout_temperature": 0.7,
        "over_sampling_batch_size": None, "cropi_record": str(folder / "record"), "reward_key": None,
    }  # fmt: skip
    return SimpleNamespace(**(given | changes))


def source(args: Any) -> Any:
    return importlib.import_module("cropi.trainers.slime.source").CropiDataSource(args)


def names(groups: list[list[Any]]) -> list[str]:
    for group in groups:
        assert len({sample.metadata["id"] for sample in group}) == 1 and len(group) == 2
    return [group[0].metadata["id"] for group in groups]


def test_slime_is_given_the_selected_prompts_and_new_ones_when_the_file_is_replaced(tmp_path: Path) -> None:
    with slime():
        held = source(arguments(tmp_path, ["p7", "p2", "p4"]))
        assert len(held) == 3
        assert names(held.get_samples(2)) == ["p7", "p2"]
        assert names(held.get_samples(2)) == ["p4", "p7"] and held.epoch_id == 1  # the next epoch
        waiting = held.get_samples(1)
        held.add_samples(waiting)  # a partial rollout is finished first, whatever is selected by then
        select(tmp_path / "selected.jsonl", ["p9", "p0"])
        assert names(held.get_samples(3)) == [*names(waiting), "p9", "p0"]
        assert len(held) == 2


@pytest.mark.parametrize("shuffle", [False, True])
def test_slime_goes_on_from_a_checkpoint_with_the_selection_that_is_there(
    tmp_path: Path, shuffle: bool
) -> None:
    with slime():
        args = arguments(tmp_path, ["p7", "p2", "p4", "p1", "p5"], rollout_shuffle=shuffle)
        held = source(args)
        held.get_samples(2)
        held.save(0)
        following = names(held.get_samples(3))
        again = source(args)
        again.load(0)
        assert names(again.get_samples(3)) == following
        select(tmp_path / "selected.jsonl", ["p3", "p8"])
        later = source(args)
        later.load(0)
        assert sorted(names(later.get_samples(2))) == ["p3", "p8"]


@pytest.mark.parametrize(
    ("ids", "changes", "problem"),
    [
        (["p1", "p99"], {}, "1 of 2 prompts of .* are not in the dataset, .* --rollout-max-prompt-len"),
        (["p1"], {}, "names 1 prompts, fewer than one training batch of 2, .* --rollout-batch-size"),
        (["p1", "p2"], {"over_sampling_batch_size": 4}, "fewer than one training batch of 4"),
        (
            ["p1", "p2"],
            {"cropi_selection": None},
            r"set cropi_selection in --custom-config-path, or \$CROPI_SELECTION",
        ),
        (["p1", "p2"], {"cropi_id_key": "uid"}, "the metadata of --prompt-data has no column 'uid'"),
        (["p1", "p2"], {"rollout_global_dataset": False}, "needs --rollout-global-dataset and --prompt-data"),
    ],
)
def test_what_slime_cannot_be_given_is_an_error_before_training(
    tmp_path: Path, ids: list[str], changes: dict[str, Any], problem: str
) -> None:
    with slime(), pytest.raises(CropiError, match=problem):
        source(arguments(tmp_path, ids, **changes))


class Other(RolloutDataSourceWithBuffer):
    def get_samples(self) -> Any:  # type: ignore[override]
        return []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"RolloutDataSourceWithBuffer": None},
            "slime.rollout.data_source has no RolloutDataSourceWithBuffer; .*PyPI",
        ),
        (
            {"RolloutDataSourceWithBuffer": Other},
            r"get_samples does not take \(num_samples\): too many positional",
        ),
    ],
)
def test_a_slime_of_another_kind_is_named(changes: dict[str, Any], problem: str) -> None:
    with slime(**changes), pytest.raises(CropiError, match=problem):
        importlib.import_module("cropi.trainers.slime.source")


def test_slime_that_is_not_installed_is_named() -> None:
    with pytest.raises(
        ModuleNotFoundError, match="CropiDataSource runs inside slime, which is not installed"
    ):
        importlib.import_module("cropi.trainers.slime.source")


def response(name: str, ids: list[int], reward: Any, **changes: Any) -> Sample:
    given = {
        "prompt": "1+1=", "tokens": [20, 21, 22, *ids], "response_length": len(ids), "label": "2", "reward": reward,
        "rollout_log_probs": [-0.5 - t for t in range(len(ids))], "status": Sample.Status.COMPLETED,
        "metadata": {"id": name},
    }  # fmt: skip
    return Sample(**(given | changes))


def test_slimes_rollouts_are_recorded_exactly(tmp_path: Path) -> None:
    """What is written is what slime's tensors hold, and a sketch of it is that of the same records written by hand."""
    args = arguments(tmp_path, ["p1", "p2"], reward_key="right")
    samples = [
        response("a", [5, 6, 1], {"right": 1.0}, loss_mask=[1, 0, 1]),
        response("a", [7, 8], {"right": 0.0}, status=Sample.Status.TRUNCATED),
        response("a", [9], {"right": 0.0}, status=Sample.Status.ABORTED),
        response("b", [9, 1], {"right": 0.5}),
        response("b", [4, 1], {"right": 0.25}, remove_sample=True),
        response("b", [3, 1], {"right": float("nan")}),
        response("b", [2, 1], {"right": 0.25}),
    ]
    assert record_rollouts(4, args, samples, {}, 1.5) is False
    path = tmp_path / "record" / "4.jsonl"
    a, b = read(str(path))
    assert (a.id, a.prompt_ids, a.response_ids, a.rewards) == (
        "a",
        [20, 21, 22],
        [[5, 6, 1], [7, 8]],
        [1.0, 0.0],
    )
    assert a.loss_mask == [[1, 0, 1], [1, 1]] and a.logprobs == [[-0.5, 0.0, -2.5], [-0.5, -1.5]]
    assert a.temperature == 0.7 and a.truncated == [False, True] and a.answer == "2" and a.policy == "step 4"
    assert b.response_ids == [[9, 1], [2, 1]] and b.rewards == [0.5, 0.25]
    by_hand = [
        {"id": "a", "prompt_ids": [20, 21, 22], "response_ids": [[5, 6, 1], [7, 8]], "rewards": [1.0, 0.0],
         "loss_mask": [[1, 0, 1], [1, 1]], "logprobs": [[-0.5, -9.0, -2.5], [-0.5, -1.5]], "temperature": 0.7},
        {"id": "b", "prompt_ids": [20, 21, 22], "response_ids": [[9, 1], [2, 1]], "rewards": [0.5, 0.25],
         "logprobs": [[-0.5, -1.5], [-0.5, -1.5]], "temperature": 0.7},
    ]  # fmt: skip
    model = make_model()
    options: dict[str, Any] = {"dim": 1024, "progress": False, "behaviour_check": "off", "verify": False}
    stores = [cropi.sketch(model, records, **options) for records in (str(path), by_hand)]
    for (_, first), (_, second) in zip(*(store.shards() for store in stores)):
        assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------- OpenRLHF
def outputs(reward: Any, ids: list[int], ranges: list[tuple[int, int]], **changes: Any) -> dict[str, Any]:
    probs = [0.0] * 2 + [-0.25 * t for t in range(1, len(ids) - 1)]
    return {
        "prompt": "<user>1+1=", "label": "2", "reward": reward, "scores": reward, "observation_tokens": ids,
        "action_ranges": ranges, "rollout_log_probs": probs, "extra_logs": {},
    } | changes  # fmt: skip


class Executor:
    """As OpenRLHF's: one coroutine, which returns a table."""

    def __init__(self, made: list[Any]) -> None:
        self.made = made

    async def execute(
        self,
        prompt: Any,
        label: Any,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
    ) -> Any:
        sampling_params.temperature = 99.0  # a later turn's
        return self.made.pop(0)


def test_openrlhfs_rollouts_are_recorded_exactly(tmp_path: Path) -> None:
    two_turns = [20, 21, 5, 6, 30, 31, 7, 1, 40]  # 30 and 31 are the environment's, and so is 40
    made = [
        outputs(torch.tensor([1.0]), two_turns, [(2, 4), (6, 8)], truncated=False),
        outputs(0.0, [20, 21, 8, 9], [(2, 4)], truncated=True),
        outputs(None, [20, 21, 8, 1], [(2, 4)]),
        outputs(0.5, [20, 21, 8, 1], [(2, 9)]),
    ]
    kept = list(made)
    held = openrlhf.recording(Executor, tmp_path / "rollouts")(made)
    for expected in kept:
        params = SimpleNamespace(temperature=0.6)
        assert asyncio.run(held.execute("<user>1+1=", "2", params, 64, None, llm_engine=None)) is expected
    (path,) = (tmp_path / "rollouts").iterdir()
    assert len(path.read_text().splitlines()) == 2  # without a reward, and with a range beyond the tokens
    (group,) = read(str(path))
    assert group.prompt_ids == [20, 21] and group.response_ids == [[5, 6, 30, 31, 7, 1], [8, 9]]
    assert group.truncated == [False, True]
    assert group.loss_mask == [[1, 1, 0, 0, 1, 1], [1, 1]] and group.rewards == [1.0, 0.0]
    assert group.logprobs == [[-0.25, -0.5, 0.0, 0.0, -1.25, -1.5], [-0.25, -0.5]]
    assert group.temperature == 0.6 and group.answer == "2" and group.prompt == "<user>1+1="


def test_rows_of_several_processes_are_put_together(tmp_path: Path) -> None:
    """Engines share the responses to a prompt; each process writes a file."""
    for number, reward in enumerate((1.0, 0.0)):
        made = [outputs(reward, [20, 21, 5 + number, 1], [(2, 4)])]
        held = openrlhf.recording(Executor, tmp_path / str(number))(made)
        asyncio.run(held.execute("<user>1+1=", "2", SimpleNamespace(temperature=0.6), 64, None, None))
    files = sorted(tmp_path.glob("*/*.jsonl"))
    with pytest.raises(CropiError, match="put the files together into one"):
        list(read(files))
    (tmp_path / "all.jsonl").write_text("".join(file.read_text() for file in files))
    (group,) = read(tmp_path / "all.jsonl")
    assert group.response_ids == [[5, 1], [6, 1]] and group.rewards == [1.0, 0.0]


def test_an_executor_of_another_kind_is_named(tmp_path: Path) -> None:
    class Plain:
        def execute(self, prompt: Any) -> Any:
            return json.dumps(prompt)

    with pytest.raises(CropiError, match=r"Plain.execute\(prompt\) is not an executor's"):
        openrlhf.recording(Plain, tmp_path)


# ---------------------------------------------------------------------------------------------------- SkyRL
@dataclass
class TrajectoryID:
    instance_id: str
    repetition_id: int


class Generator:
    """As SkyRL's: one coroutine, from a batch to lists over its trajectories."""

    def __init__(self, output: dict[str, Any]) -> None:
        self.output = output

    async def generate(self, input_batch: dict[str, Any], disable_tqdm: bool = False) -> dict[str, Any]:
        return self.output


def test_skyrls_rollouts_are_recorded_exactly(tmp_path: Path) -> None:
    names = [TrajectoryID("a", 0), TrajectoryID("a", 1), TrajectoryID("b", 0), TrajectoryID("b", 1)]
    chat = [{"role": "user", "content": "1+1="}]
    batch = {
        "prompts": [chat] * 4, "env_classes": ["gsm8k"] * 4, "env_extras": None, "trajectory_ids": names,
        "sampling_params": {"temperature": 0.8},
        "batch_metadata": SimpleNamespace(global_step=7, training_phase="train"),
    }  # fmt: skip
    output = {
        "prompt_token_ids": [[20, 21]] * 4, "response_ids": [[5, 30, 1], [6, 7], [8, 1], []],
        "rewards": [[0.0, 0.0, 1.0], [0.25, 0.25], [0.0, float("nan")], [0.0]],
        "loss_masks": [[1, 0, 1], [1, 1], [1, 1], []], "stop_reasons": ["stop", "length", "stop", "stop"],
        "rollout_logprobs": [[-0.5, 0.0, -0.25], [-1.0, -2.0], [-0.5, -0.5], []], "rollout_metrics": {},
    }  # fmt: skip
    held = skyrl.recording(Generator, tmp_path)(output)
    assert asyncio.run(held.generate(batch, disable_tqdm=True)) is output
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("train-000007-")
    (a,) = read(str(path))  # of b one reward is not a number, and the other response is empty
    assert (a.id, a.prompt, a.prompt_ids, a.response_ids) == ("a", chat, [20, 21], [[5, 30, 1], [6, 7]])
    assert a.rewards == [1.0, 0.5] and a.loss_mask == [[1, 0, 1], [1, 1]] and a.truncated == [False, True]
    assert a.logprobs == [[-0.5, 0.0, -0.25], [-1.0, -2.0]] and a.temperature == 0.8
    with pytest.raises(CropiError, match=r"Source.generate\(\) is not a generator's"):
        skyrl.recording(type("Source", (), {"generate": lambda self: None}), tmp_path)


# -------------------------------------------------------------------------------------------------- NeMo-RL
def loader(rows: int = 20, size: int = 4) -> Any:
    """As NeMo-RL's: a dataset by row number, and a collate function."""
    data = [{"message_log": [f"row {i}"], "idx": i} for i in range(rows)]

    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        return {key: [item[key] for item in items] for key in items[0]}

    return torch.utils.data.DataLoader(data, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]


def test_nemo_rl_is_given_the_selected_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "selected.json"
    monkeypatch.setenv("CROPI_INDICES", str(path))
    path.write_text("[3, 11, 5, 19, 7, 2]")
    loaders, iterators = {"math": loader()}, {"math": object()}
    seen: list[int] = []
    for _ in range(6):
        batch, back = selected_batches(iterators, loaders, step=1)
        assert back is iterators and len(batch["message_log"]) == 4
        assert batch["message_log"] == [[f"row {i}"] for i in batch["idx"]]
        seen += batch["idx"]
    for epoch in range(4):
        assert sorted(seen[6 * epoch : 6 * epoch + 6]) == [2, 3, 5, 7, 11, 19]
    assert seen[:6] != seen[6:12]
    (tmp_path / "new.json").write_text("[0, 1, 4, 6]")
    (tmp_path / "new.json").rename(path)
    assert sorted(selected_batches(iterators, loaders)[0]["idx"]) == [0, 1, 4, 6]
    other = {"math": loader()}
    for text, problem in (
        ("[3, 20]", "names row 20, and the dataset has 20"), ("{}", "is not a list of row numbers"),
        ('["a"]', "is not a list of row numbers"), ("[", "cannot be read"),
        ("[3, 4]", "names 2 rows, fewer than one batch of 4"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(CropiError, match=problem):
            selected_batches(iterators, other)
    with pytest.raises(CropiError, match=r"there are 2 dataloaders \(math, code\)"):
        selected_batches({}, {"math": loader(), "code": loader()})
    monkeypatch.delenv("CROPI_INDICES")
    with pytest.raises(CropiError, match=r"set \$CROPI_INDICES to the file"):
        selected_batches(iterators, other)
