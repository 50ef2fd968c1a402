"""Dumps that large runs and made-up inputs brought up."""

from __future__ import annotations

import gc
import json
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from support.made_data import write_lines
from support.made_dumps import ROLLOUTS, chat, logprobs, queue, trl, write

from cropi.cli import main
from cropi.data.readers import read
from cropi.data.scan import LossyTokens
from cropi.errors import CropiError
from cropi.trainers.dumps.auto import _of_steps, opened, read_rollouts
from cropi.trainers.dumps.fields import Left
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.recognise import MOST_OPCODES, recognise


def test_a_large_batch_of_verl_is_told_by_the_class_of_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last of its keys stands behind all rows, further than is looked."""
    table = type("TensorDict", (), {"__module__": "tensordict._td"})
    module = types.ModuleType("tensordict._td")
    module.TensorDict = table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensordict", types.ModuleType("tensordict"))
    monkeypatch.setitem(sys.modules, "tensordict._td", module)
    keys = [f"{i}_0_0" for i in range(MOST_OPCODES)]
    torch.save({"tensordict": table(), "keys": keys, "tags": [], "global_steps": 7}, tmp_path / "x.pt")
    assert recognise(tmp_path / "x.pt") == "verl"


@pytest.mark.parametrize(
    "change",
    [{"advantage": 10**400}, {"accuracy": 10**400}, {"form": -(10**400)}],
    ids=lambda row: next(iter(row)),
)
def test_numbers_of_trl_that_no_float_holds_are_left_out(change: dict[str, int], tmp_path: Path) -> None:
    rows = trl()
    rows[1] |= change
    path, out = write(tmp_path / "c.jsonl", rows), tmp_path / "out.jsonl"
    assert main(["convert", str(path), "--out", str(out)]) == 0
    sizes = [group.size for group in read(out)]
    assert sizes == ([2, 2] if "advantage" in change else [1, 2])


def test_a_column_of_trl_without_a_name_is_a_column(tmp_path: Path) -> None:
    """It took the place of what names the prompts, whose advantages are compared."""
    rows = [row | {"": 0.0} for row in trl()]
    path = tmp_path / "completions_00007.jsonl"
    write_lines(path, rows)
    rollouts = read_rollouts(path, "trl", Reading(temperature=0.7), Left())
    assert [one.reward for one in rollouts] == [1.0, 0.0, 0.5, 1.0]


def test_the_folder_of_a_sources_records_goes_with_it_and_without_a_warning(tmp_path: Path) -> None:
    """TemporaryDirectory warns of what is not closed: an error where a user's tests allow no warning."""
    write(tmp_path / "completions_00007.jsonl", trl())
    for number in (1, 2):
        record = {"id": "a", "prompt_ids": [5], "response_ids": [[number]], "rewards": [1]}
        write_lines(tmp_path / f"{number}.jsonl", [record])
    dump, steps = tmp_path / "completions_00007.jsonl", [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for look in (lambda: opened([dump]), lambda: _of_steps(steps, tmp_path, False, None)):
        sources = look()
        folder = sources[0].file.parent
        assert folder.name.startswith("cropi-") and list(folder.iterdir())
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            del sources
            gc.collect()
        assert not folder.exists() and not told


def test_token_ids_of_llama_cpp(tmp_path: Path) -> None:
    """What llama-server (b11549) wrote for SmolLM2-135M: the end token has an id, and neither a text nor bytes."""
    said = [(56, "H", -5.405514), (18122, "annah", -5.198355), (30, ".", -1.958725), (2, "", -0.146354)]
    content = [
        {"id": token, "token": word, "bytes": list(word.encode()), "logprob": value,
         "top_logprobs": [{"id": 30, "token": ".", "bytes": [46], "logprob": -1.958725}]}
        for token, word, value in said
    ]  # fmt: skip
    choice = {
        "finish_reason": "stop", "index": 0, "message": {"role": "assistant", "content": "Hannah."}, "reward": 0.0,
        "logprobs": {"content": content},
    }  # fmt: skip
    row = {"messages": [{"role": "user", "content": "Your name?"}], "choices": [choice], "temperature": 1.0}
    (group,) = read(opened(write(tmp_path / "llama.jsonl", [row])))
    assert group.response_ids == [[token for token, *_ in said]]
    assert group.logprobs == [[value for *_, value in said]]
    del content[1]["id"]
    with pytest.warns(LossyTokens):
        (group,) = read(opened(write(tmp_path / "one.jsonl", [row])))
    assert group.response_ids is None


def test_token_ids_of_sglangs_chats(tmp_path: Path) -> None:
    """SGLang 0.5.23 writes both kinds into the choices, and the tokens beside log-probs as text."""
    rows = chat()
    for row, (_, ids, *_) in zip(rows, ROLLOUTS):
        body = row["response"]["body"]
        (choice,) = body["choices"]
        choice |= {"prompt_token_ids": body.pop("prompt_token_ids"), "response_token_ids": ids}
        for entry in choice["logprobs"]["content"]:
            entry["token"] = "A"
    groups = list(read(opened(write(tmp_path / "sglang.jsonl", rows))))
    wanted = [ROLLOUTS[n : n + 2] for n in (0, 2)]
    assert [group.prompt_ids for group in groups] == [two[0][0] for two in wanted]
    assert [group.response_ids for group in groups] == [[ids for _, ids, *_ in two] for two in wanted]
    assert [group.logprobs for group in groups] == [[logprobs(ids) for _, ids, *_ in two] for two in wanted]


@pytest.mark.parametrize("indent", [2, None])
def test_episodes_of_rllm_are_named(indent: int | None, tmp_path: Path) -> None:
    """One object over many lines in a file, as its trainer writes it, and one on a line."""
    step = {
        "reward": 1.0,
        "done": True,
        "model_response": "2",
        "chat_completions": [{"role": "user", "content": "1"}],
    }
    episode = {
        "training_step": 1, "epoch": 0, "episode_id": "a:0", "task": {"question": "1+1="}, "is_correct": True,
        "trajectories": [{"name": "agent", "uid": "u", "reward": 1.0, "num_steps": 1, "steps": [step]}],
    }  # fmt: skip
    folder = tmp_path / "train_step_1_epoch_0"
    folder.mkdir()
    path = folder / "episode_hash0_ida_0.json"
    path.write_text(json.dumps(episode, indent=indent) + "\n")
    for given in (path, folder):
        with pytest.raises(CropiError, match=r"episode_hash0_ida_0\.json.* is an episode of rLLM"):
            opened(given)


# As tinker-cookbook 0.6.1 writes them: `{split}_rollout_summaries.jsonl` of an iteration, and `capture/sample.jsonl`.
SUMMARY = {
    "schema_version": 1, "split": "train", "iteration": 0, "group_idx": 0, "traj_idx": 1, "tags": ["math"],
    "sampling_client_step": None, "total_reward": 1.0, "final_reward": 0.0, "trajectory_metrics": {}, "final_ob_len": 8,
    "steps": [{"step_idx": 0, "ob_len": 5, "ac_len": 3, "reward": 1.0, "episode_done": True, "metrics": {}}],
}  # fmt: skip
CAPTURED = {
    "kind": "sample", "scope": {"iteration": 0, "group_idx": 0}, "created_at": 1.0, "prompt_tokens": [1, 2, 3],
    "prompt_length": 3, "num_samples": 1, "status": "ok",
    "samples": [{"tokens": [4, 5], "logprobs": [-0.1, -0.2], "stop_reason": "stop"}],
}  # fmt: skip


@pytest.mark.parametrize(("row", "lacks"), [(SUMMARY, "neither text nor tokens"), (CAPTURED, "no rewards")])
def test_files_of_tinker_cookbook_are_named(row: dict[str, object], lacks: str, tmp_path: Path) -> None:
    """They were told to name a column of responses, which they do not have."""
    path = write_lines(tmp_path / "sample.jsonl", [row])
    record = {"id": "a", "prompt": "q", "responses": ["x", "y"], "rewards": [0, 1]}
    assert recognise(write_lines(tmp_path / "own.jsonl", [record | row])) == "records"
    with pytest.raises(CropiError, match=f":1 is a .*tinker-cookbook.*{lacks}.*trajectory records"):
        opened(path)


def test_what_a_rank_of_slime_trained_on_is_named(tmp_path: Path) -> None:
    """`--dump-details` writes it beside the rollouts."""
    data = {
        "partition": range(2),
        "tokens": [[1, 2, 3]] * 2,
        "response_lengths": [1, 1],
        "rewards": [-0.7, 0.7],
    }
    torch.save({"rollout_id": 0, "rank": 0, "rollout_data": data}, tmp_path / "0_0.pt")
    with pytest.raises(CropiError, match=r"one rank of slime trained on.*rollout_data/ of --dump-details"):
        recognise(tmp_path / "0_0.pt")


def test_columns_that_a_dump_does_not_read_are_said(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", chat())
    with pytest.warns(UserWarning, match="columns: 'response' has no effect on .*, read as chat completions"):
        opened(path, columns="response=zzz")
    path = write(tmp_path / "completions.jsonl", trl())
    with pytest.warns(
        UserWarning, match="columns: 'rewards', 'id' have no effect on .*, read as completions of TRL"
    ):
        opened(path, columns="rewards=accuracy,id=zzz,reward=accuracy")
    torch.save(queue(), tmp_path / "tq_batch.pt")
    with pytest.raises(
        CropiError, match="--columns: 'reward' has no effect on a batch of verl's transfer queue"
    ):
        list(read_rollouts(tmp_path / "tq_batch.pt", "verl", Reading(columns={"reward": "score"})))
