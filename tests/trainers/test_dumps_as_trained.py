"""What trainers write of runs with images, several turns, several rewards or validation: read as it is trained on, or
refused by name."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_tokenizer, write_lines
from support.made_dumps import KINDS, MORE, ROLLOUTS, TEMPERATURE, made, write

from cropi.cli import main
from cropi.data.readers import read
from cropi.data.trainer_rows import trainer_row
from cropi.errors import CropiError, RecordError
from cropi.gradient.tokenize import Tokenize
from cropi.trainers.dumps.auto import opened, read_rollouts
from cropi.trainers.dumps.fields import BadSample
from cropi.trainers.dumps.named import DatasetPrompts
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, write_groups
from cropi.trainers.dumps.verl_batch import rollouts_of_proto
from cropi.trainers.openrlhf import recording
from cropi.trainers.skyrl.record import rollout_of as of_skyrl
from cropi.trainers.trl.rollout_log import RolloutLog

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
PIXELS = {"pixel_values": torch.zeros(2, 3)}


def rewards(path: Any, **given: Any) -> list[list[float]]:
    return [group.rewards for group in read(opened(path, reading=Reading(temperature=0.7, **given)))]


# ---------------------------------------------------------------------------------------------------- images
@pytest.mark.parametrize(
    ("kind", "key", "seen", "blind"),
    [
        ("slime", "multimodal_train_inputs", PIXELS, None),
        ("slime", "multimodal_inputs", {"images": ["x.png"]}, {"images": []}),
        ("vllm", "multi_modal_placeholders", {"image": [{"offset": 1, "length": 4}]}, {}),
    ],
)
def test_a_sample_whose_policy_saw_an_image_is_refused(
    kind: str, key: str, seen: Any, blind: Any, tmp_path: Path
) -> None:
    content = made(kind)
    samples = content["samples"] if kind == "slime" else content
    path = tmp_path / ("7.pt" if kind == "slime" else "7.json")
    samples[1][key] = blind
    assert rewards(write(path, content)) == rewards(write(path, made(kind)))
    samples[1][key] = seen
    with pytest.raises(CropiError, match=rf"{key}: holds what the policy saw besides tokens"):
        rewards(write(path, content))


def test_a_batch_of_verl_with_images_is_refused() -> None:
    def rows(inputs: list[Any]) -> list[Any]:
        tensors = {
            "prompts": torch.tensor([[0, 7], [6, 7]]), "responses": torch.tensor([[8, 1], [9, 0]]),
            "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]), "rm_scores": torch.eye(2),
        }  # fmt: skip
        other = {
            "extra_info": [{"index": 3}, {"index": 4}],
            "multi_modal_inputs": np.array(inputs, dtype=object),
        }
        return list(rollouts_of_proto(SimpleNamespace(batch=tensors, non_tensor_batch=other), 1))

    blind = rows([{}, {"pixel_values": torch.zeros(0, 3)}])
    assert [(one.prompt_ids, one.response_ids) for one in blind] == [([7], [8, 1]), ([6, 7], [9])]
    with pytest.raises(BadSample, match="row 1, multi_modal_inputs: holds what"):
        rows([{}, PIXELS])


def test_recorders_leave_out_images_and_rewards_of_a_process(tmp_path: Path) -> None:
    output = {
        "prompt_token_ids": [[5, 6]], "response_ids": [[7, 1]], "rewards": [1.0], "loss_masks": [[1, 1]],
        "trajectory_ids": ["a"], "pixel_values": [None],
    }  # fmt: skip
    assert of_skyrl({}, output, 0, 1, "here").response_ids == [7, 1]
    with pytest.raises(BadSample, match="pixel_values: holds what"):
        of_skyrl({}, output | {"pixel_values": [torch.zeros(2, 3)]}, 0, 1, "here")
    with pytest.raises(BadSample, match="process_rewards: are beside the reward"):
        of_skyrl({}, output | {"process_rewards": [[0.0, 1.0]]}, 0, 1, "here")


# --------------------------------------------------------------------------------------------------- rewards
def test_a_remote_reward_models_list_of_one_is_recorded(tmp_path: Path) -> None:
    class Executor:
        async def execute(self, prompt: Any, label: Any, sampling_params: Any, **others: Any) -> Any:
            return {
                "prompt": prompt, "label": label, "observation_tokens": [5, 6, 7, 1], "action_ranges": [(2, 4)],
                "reward": label, "rollout_log_probs": None, "images": others.get("images"),
            }  # fmt: skip

    held = recording(Executor, tmp_path)()
    for label, images in (([0.25], None), ([1.0, 2.0], None), ([0.5], ["x.png"])):
        asyncio.run(held.execute("q", label, SimpleNamespace(temperature=1.0), images=images))
    (path,) = tmp_path.iterdir()
    assert [json.loads(line)["reward"] for line in path.read_text().splitlines()] == [0.25]


def test_the_reward_of_several_is_named(tmp_path: Path) -> None:
    content = made("slime")
    for sample in content["samples"]:
        sample["reward"] = {"right": sample["reward"], "form": 0.5}
    path = write(tmp_path / "7.pt", content)
    with pytest.raises(CropiError, match=r"is a table: 'right', 'form'; .* with --columns reward=NAME"):
        rewards(path)
    with pytest.raises(
        CropiError, match="there is no 'wrong', which --columns reward= names; there are 'right', 'form'"
    ):
        rewards(path, columns={"reward": "wrong"})
    plain = write(tmp_path / "8.pt", made("slime"))
    with pytest.raises(
        CropiError, match=r"reward: is 1\.0, no table with the 'right' that --columns reward= names; leave"
    ):
        rewards(plain, columns={"reward": "right"})
    expected = rewards(plain)
    assert rewards(path, columns={"reward": "right"}) == expected
    assert rewards(path, columns={"reward": "right+form"}) == [[one + 0.5 for one in row] for row in expected]
    path = write(tmp_path / "completions_00001.parquet", made("trl"))
    assert rewards(path, columns={"reward": "accuracy+form"}) == rewards(path)


def test_verls_penalty_for_long_responses_is_not_guessed(tmp_path: Path) -> None:
    content = made("verl text")
    for row in content:
        row["overlong_reward"] = 0
    path, plain = tmp_path / "7.jsonl", rewards(write(tmp_path / "8.jsonl", made("verl text")))
    assert rewards(write(path, content)) == plain
    content[1]["overlong_reward"] = -0.5
    with pytest.raises(
        CropiError, match=r"7.jsonl:2, score: may be with or without the penalty .* -0.5 here"
    ):
        rewards(write(path, content))
    assert rewards(path, columns={"reward": "score"}) == plain
    changed = [row[:] for row in plain]
    place = next(
        (g, k) for g, row in enumerate(plain) for k, one in enumerate(row) if one == content[1]["score"]
    )
    changed[place[0]][place[1]] -= 0.5
    assert rewards(path, columns={"reward": "score+overlong_reward"}) == changed


# ----------------------------------------------------------------------------------------- turns and validation
@pytest.mark.parametrize("field", ["rollout_id", "group_id"])
def test_several_sequences_with_one_reward_are_refused(field: str, tmp_path: Path) -> None:
    """slime has called the rollout of a sample by both names."""
    content, path = made("slime"), tmp_path / "7.pt"
    for sample in content["samples"]:
        sample[field] = sample["index"]
    assert rewards(write(path, content)) == rewards(write(tmp_path / "8.pt", made("slime")))
    content["samples"][2][field] = 3
    with pytest.raises(CropiError, match=f"sample 2, {field}: 3 is that of several samples"):
        rewards(write(path, content))


def test_the_turns_of_areal_are_refused(tmp_path: Path) -> None:
    content, path = made("areal"), tmp_path / "3.jsonl"
    texts = (("prompt", "q0"), ("gen", "r"), ("context", "tool"), ("gen", "1"))
    content[1]["segments"] = [{"role": role, "len": 1, "text": text} for role, text in texts]
    with pytest.raises(CropiError, match=r"3.jsonl:2, segments: are several turns"):
        rewards(write(path, content))


@pytest.mark.parametrize("kind", ["trl", "skyrl", "areal", "openrlhf", "verl text", "slime", "vllm"])
def test_a_prompt_in_text_is_what_the_policy_read(kind: str, tmp_path: Path) -> None:
    """Rendered by a template before, or tokenised without one: no template is applied to it, here or in a trainer."""
    path = write(tmp_path / (KINDS | MORE)[kind][0], made(kind))
    held = min(read(opened(path)), key=lambda group: str(group.prompt))
    tokens = Tokenize(make_tokenizer(chat=True), 98)
    text = replace(
        held, prompt_ids=None, response_ids=None, responses=["a", "b"], loss_mask=None, logprobs=None
    )
    assert tokens(text).prompt == make_tokenizer()("q0")["input_ids"]
    with pytest.raises(
        CropiError, match="is text as the policy read it .* own --dataset with --format jsonl"
    ):
        trainer_row("slime", replace(held, answer="g"))


def test_a_server_makes_a_message_of_a_prompt_in_text(tmp_path: Path) -> None:
    content = made("openai")
    for row in content:
        row["prompt"] = row.pop("messages")[0]["content"]
    for group in read(opened(write(tmp_path / "step_7.jsonl", content))):
        assert isinstance(group.prompt, str) and group.extra["rendered"] is False


def test_calls_of_several_tools_in_trls_table_keep_their_own_arguments(tmp_path: Path) -> None:
    """A table has a value in every row for each key of any row."""

    def call(name: str, **arguments: Any) -> list[dict[str, Any]]:
        calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
        return [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "name": name, "content": "3"},
            {"role": "assistant", "content": "3"},
        ]

    prompt, said = [{"role": "user", "content": "1+2"}], [call("add", a=1, b=2), call("show", page="x")]
    content = [
        {"step": 1, "prompt": prompt, "completion": made, "right": float(k), "advantage": k - 0.5}
        for k, made in enumerate(said)
    ]
    path = tmp_path / "completions_00001.parquet"
    with pytest.raises(CropiError, match="row 0, tools: are missing: the response calls tools"):
        rewards(write(path, content))
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "show")]
    (group,) = read(opened(write(path, [row | {"tools": tools} for row in content])))
    assert (group.prompt, group.responses, group.rewards, group.tools) == (prompt, said, [0.0, 1.0], tools)


def test_a_folder_stands_for_its_files_without_those_of_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    validation = made("slime")
    for sample in validation["samples"]:
        sample["tokens"] = [90, *sample["tokens"]]
    folder = tmp_path / "rollout_data"
    folder.mkdir()
    write(folder / "eval_7.pt", validation)
    out = tmp_path / "out.jsonl"
    assert main(["convert", str(folder), "--out", str(out), *TEMPERATURE]) == 0  # alone it is meant
    assert json.loads(out.read_text().splitlines()[0])["prompt_ids"][0] == 90
    write(folder / "7.pt", made("slime"))
    assert main(["convert", str(folder), "--out", str(out), *TEMPERATURE]) == 0
    assert f"left out      {folder}: eval_7.pt, which" in capsys.readouterr().out
    kept = {tuple(json.loads(line)["prompt_ids"]) for line in out.read_text().splitlines()}
    assert kept == {tuple(prompt) for prompt, *_ in ROLLOUTS}
    results = tmp_path / "results"
    results.mkdir()
    write(results / "sums.jsonl", made("skyrl"))
    write(results / "aggregated_results.jsonl", [{"eval/all/avg_score": 0.5}])
    with pytest.warns(UserWarning, match=r"aggregated_results.jsonl, which by their names are of validation"):
        assert len(rewards(results)) == 2


# ------------------------------------------------------------------------------------------- whose prompts they are
def test_slimes_ids_are_those_of_the_metadata(tmp_path: Path) -> None:
    """Where `cropi select --format slime` has put them; without one a prompt is named by a hash."""
    content = made("slime")
    path = write(tmp_path / "7.pt", content)
    assert [rollout.id for rollout in read_rollouts(path, "slime")] == ["m0", "m0", "m1", "m1"]
    for sample in content["samples"][2:]:
        sample["metadata"] = {"name": "m1"}
    ids = [rollout.id for rollout in read_rollouts(write(tmp_path / "8.pt", content), "slime")]
    assert ids[:2] == ["m0", "m0"] and ids[2] == ids[3] and ids[2].startswith("text-")


@pytest.mark.parametrize("held", ["text", "messages"])
@pytest.mark.parametrize("chat", [True, False])
def test_prompts_that_a_dump_does_not_name_are_found_in_the_dataset(
    tmp_path: Path, held: str, chat: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """NeMo-RL writes tokens alone, verl the text without special tokens, ms-swift messages."""
    tokenizer = make_tokenizer(chat=chat)
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [[{"role": "user", "content": f"q{i}"}] for i in range(2)]
    rows = [{"id": f"p{i}", "prompt": turns[i] if held == "messages" else f"q{i}"} for i in range(2)]
    texts = [
        tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False)
        if chat
        else one[0]["content"]
        for one in turns
    ]
    data = write_lines(tmp_path / "data.jsonl", rows)
    tokens = [tokenizer(text, add_special_tokens=not chat)["input_ids"] for text in texts]
    exact = [
        {"content": ["..."], "rewards": [float(k)], "input_lengths": [len(ids) + 2], "token_ids": [[*ids, 5, 1]],
         "token_loss_mask": [[0] * len(ids) + [1, 1]], "sample_loss_mask": [1.0],
         "generation_logprobs": [[0.0] * len(ids) + [-1.0, -1.0]]} for ids in tokens for k in range(2)
    ]  # fmt: skip
    nemo = write_lines(tmp_path / "train_data_step1.jsonl", [row | {"idx": i} for i, row in enumerate(exact)])
    lossy = [
        {"input": one, "output": f"a{k}", "gts": "g", "score": k, "step": 1}
        for one in texts
        for k in range(2)
    ]
    verl = write_lines(tmp_path / "1.jsonl", lossy)
    as_record = turns[0] if chat else "q0"
    for source in (nemo, verl):
        command = ["convert", str(source), "--out", str(tmp_path / "out.jsonl"), "--temperature", "1"]
        command += ["--dataset", str(data), "--model", str(tmp_path / "model")]
        assert main(command) == 0, capsys.readouterr().err
        found = list(read(tmp_path / "out.jsonl"))
        assert [group.id for group in found] == ["p0", "p1"] and found[0].prompt == as_record
        # What is scored are the tokens that the policy read.
        assert list(Tokenize(tokenizer, 98)(found[0]).prompt) == tokens[0]
    # Its columns may have names of their own; that of the dump's rewards is named beside them.
    other = [{"id": row["id"], "prompt": "x", "asked": {"of": row["prompt"]}} for row in rows]
    write_lines(data, other)
    assert main([*command, "--columns", "prompt=asked.of,reward=score"]) == 0, capsys.readouterr().err
    assert next(iter(read(tmp_path / "out.jsonl"))).prompt == as_record
    write_lines(data, rows)
    # An adapter has the tokenizer of its base.
    (tmp_path / "adapter").mkdir()
    base = {"base_model_name_or_path": str(tmp_path / "model")}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(base))
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    assert main([*command[:-1], str(tmp_path / "adapter")]) == 0
    write_lines(data, rows[1:])
    assert main([*command, "--skip-bad"]) == 0
    assert "left out      2 samples: 2 by prompt" in capsys.readouterr().out
    assert main(command) == 2 and "no row of the dataset renders to" in capsys.readouterr().err


def test_prompts_that_differ_in_outer_blanks_alone_are_told_apart_where_a_dump_can(tmp_path: Path) -> None:
    """Tokens and whole texts name their row; a text without its blanks is not taken for one of two."""
    tokenizer = make_tokenizer()
    rows = [{"prompt": "q"}, {"prompt": "q "}, {"prompt": " r "}]
    prompts = DatasetPrompts(rows, ["p0", "p1", "p2"], tokenizer)

    def named(**read: Any) -> str:
        return prompts.named(Rollout("", 1.0, 0, "dump:1", response="a", **read)).id

    for name, row in zip(("p0", "p1", "p2"), rows, strict=True):
        assert named(prompt_ids=tokenizer(row["prompt"])["input_ids"]) == name
    assert [named(prompt=text) for text in ("q ", "r", " r ", "r ")] == ["p1", "p2", "p2", "p2"]
    with pytest.raises(BadSample, match="the rows 'p0' and 'p1' of the dataset are 'q' but for outer blanks"):
        named(prompt="q")
    with pytest.raises(CropiError, match="the prompts 'p0' and 'p1' have the same text"):
        DatasetPrompts([rows[0], rows[0]], ["p0", "p1"], tokenizer)
    rows = [{"instruction": "Solve it.", "input": text, "output": "7"} for text in "qr"]  # NeMo-RL's columns
    prompts = DatasetPrompts(rows, ["p0", "p1"], tokenizer)
    assert [named(prompt_ids=tokenizer(text)["input_ids"]) for text in "qr"] == ["p0", "p1"]
    with pytest.raises(
        CropiError, match="its columns are text: name the one with .* by --columns prompt=NAME"
    ):
        DatasetPrompts([{"text": "q"}], ["p0"], tokenizer)
    with pytest.raises(CropiError, match=r"has no prompt \(ask\); its columns are prompt: name"):
        DatasetPrompts([{"prompt": "q"}], ["p0"], tokenizer, "ask")


# ------------------------------------------------------------------------------------- what the adapters record
def recorded(name: str, response: int) -> dict[str, Any]:
    return {"id": name, "prompt_ids": [5, 6], "response_ids": [[response, 1], [8, 1]], "rewards": [1, 0]}


def step(folder: Path, number: int, names: str, response: int) -> None:
    """What `record_step` writes: records, and their checksums beside them."""
    write_groups(folder / f"{number}.jsonl", read([recorded(name, response) for name in names]))


def test_of_recorded_steps_the_newest_responses_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt of two epochs stands in two files; by number, ``10`` is newer than ``9``."""
    for number, names, response in ((9, "abc", 20), (10, "cd", 21)):
        step(tmp_path, number, names, response)
    said: list[str] = []
    [source] = opened(str(tmp_path), say=said.append)
    found = {group.id: group.response_ids for group in read(source)}
    assert {name: ids[0][0] for name, ids in found.items() if ids} == {"a": 20, "b": 20, "c": 21, "d": 21}
    assert "4 prompts, of each the responses of its newest step; 1 earlier ones are left out" in said[0]
    assert main(["convert", str(tmp_path), "--out", str(tmp_path.with_suffix(".jsonl"))]) == 0
    assert "trajectories" in capsys.readouterr().out
    assert {group.id: group.response_ids for group in read(tmp_path.with_suffix(".jsonl"))} == found
    # Named one by one, in the order of a shell (10, 9), or in two folders, they have no order.
    one, other = tmp_path / "9.jsonl", tmp_path / "10.jsonl"
    assert main(["convert", str(other), str(one), "--out", str(tmp_path.with_suffix(".json"))]) == 2
    assert "the prompt id 'c' was used before" in capsys.readouterr().err
    (tmp_path / "run" / "step_1").mkdir(parents=True)
    (tmp_path / "run" / "step_2").mkdir()
    step(tmp_path / "run" / "step_1", 1, "ab", 20)
    step(tmp_path / "run" / "step_2", 0, "bc", 21)
    with pytest.raises(CropiError, match="the prompt id 'b' was used before"):
        list(read(opened(str(tmp_path / "run"))))
    # Other names are no steps: one id twice stays an error.
    (tmp_path / "9.jsonl").rename(tmp_path / "more.jsonl")
    (tmp_path / "9.jsonl.sha256").unlink()
    with pytest.raises(CropiError, match="the prompt id 'c' was used before"):
        list(read(opened(str(tmp_path))))


def test_steps_without_a_common_prompt_are_read_as_they_are(tmp_path: Path) -> None:
    step(tmp_path, 1, "ab", 20)
    step(tmp_path, 2, "c", 21)
    assert opened(str(tmp_path)) == [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]


def test_of_trls_folder_the_merged_rollouts_are_read(tmp_path: Path) -> None:
    for name in ("train", "valid", "train-rank00000", "valid-rank00000"):
        step(tmp_path, 1, "ab" if name.startswith("train") else "v", 20)
        (tmp_path / "1.jsonl").rename(tmp_path / f"{name}.jsonl")
    said: list[str] = []
    assert opened(str(tmp_path), say=said.append) == [tmp_path / "train.jsonl"]
    assert "train-rank00000.jsonl, valid-rank00000.jsonl, valid.jsonl, which by their names" in said[0]


def test_of_a_killed_runs_logs_the_newest_responses_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL's adapter merges the logs of its ranks before a selection: a run killed before the first has them alone."""
    folder = tmp_path / "rollouts"
    for rank, visits in enumerate(((("ab", 1, 20), ("c", 2, 21)), (("a", 2, 22), ("c", 1, 23)))):
        log = RolloutLog(folder, rank)
        for names, at, response in visits:
            log.append("train", [recorded(name, response) | {"step": at} for name in names])
        log.append("valid", [recorded("v", 20) | {"step": 1}])
        log.close()
    with open(folder / "train-rank00001.jsonl", "a", encoding="utf-8") as file:
        file.write('{"id": "d", "prompt_ids"')  # where the kill came
    said: list[str] = []
    [source] = opened(str(folder), say=said.append)
    found = {group.id: group.response_ids for group in read(source)}
    assert {name: ids[0][0] for name, ids in found.items() if ids} == {"a": 22, "b": 20, "c": 21}
    assert (
        "valid-rank00000.jsonl" in said[0]
        and "3 prompts" in said[1]
        and "; 2 earlier ones are left" in said[1]
    )
    assert said[2] == "  left out    the last line of a log, which was not written to its end"
    assert main(["convert", str(folder), "--out", str(tmp_path / "made.jsonl")]) == 0
    assert {group.id: group.response_ids for group in read(tmp_path / "made.jsonl")} == found
    # One log by its name is read alike; one in which no prompt stands twice is read as it is.
    (one,) = opened(str(folder / "train-rank00001.jsonl"), say=said.append)
    assert [group.id for group in read(one)] == ["a", "c"] and one != folder / "train-rank00001.jsonl"
    assert opened(str(folder / "train-rank00000.jsonl")) == str(folder / "train-rank00000.jsonl")
    # All of them, one by one and in any order, are the run, also beside other files.
    logs = [str(folder / f"train-rank0000{rank}.jsonl") for rank in (1, 0)]
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(recorded("o", 30)) + "\n")
    one, plain = opened([logs[0], str(other), logs[1]])
    assert {group.id: group.response_ids for group in read(one)} == found and plain == str(other)
    assert main(["convert", *logs, "--out", str(tmp_path / "named.jsonl")]) == 0
    assert (tmp_path / "named.jsonl").read_bytes() == (tmp_path / "made.jsonl").read_bytes()
    # A log that is named twice is one; of other programs' steps, 3.0 and "3" are numbers, and others are no steps.
    said.clear()
    mixed = tmp_path / "mixed" / "train-rank00000.jsonl"
    mixed.parent.mkdir()
    for step, newest in ((3.0, 50), ("3", 50), (1.0, 51)):
        rows = [recorded("m", 50) | {"step": step}, recorded("m", 51) | {"step": 2}]
        mixed.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        assert [group.response_ids[0][0] for group in read(opened([str(mixed)] * 2, say=said.append)[0])] == [
            newest
        ]
    assert len(said) == 3  # and none of a line that was not written to its end
    mixed.write_text(json.dumps(recorded("m", 50) | {"step": "x"}) + "\n")
    with pytest.raises(RecordError, match=r"\(byte 0\): 'step' is 'x', and should be an integer"):
        opened(str(mixed))
    # A bad record is an error that says how to go on, and then the newest good one counts.
    with open(logs[0], "a", encoding="utf-8") as file:  # behind the line that was not finished
        file.write("\n" + json.dumps(recorded("c", 40) | {"step": 9, "rewards": [1.0, "x"]}) + "\n")
    with pytest.raises(RecordError, match=r"train-rank00001.jsonl \(byte \d+\).*pass --skip-bad"):
        opened(logs)
    said.clear()
    [source] = opened(logs, skip_bad=True, say=said.append)
    assert {group.id: group.response_ids for group in read(source)} == found
    assert "left out    2 bad records, the first" in said[1]
