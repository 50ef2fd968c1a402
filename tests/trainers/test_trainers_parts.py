"""The parts under the trainer adapters: prompt ids, logs of rollouts, agreement among ranks."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from support.commands import json_lines
from support.made_data import make_model, make_records, make_tokenizer, write_lines

from cropi.data.prompt_ids import PromptIds
from cropi.data.readers import read as read_groups
from cropi.data.writers import replace_records
from cropi.errors import CropiError
from cropi.ranking.table import read_scores
from cropi.trainers import newest as newest_rollouts
from cropi.trainers.dumps.auto import read_rollouts
from cropi.trainers.dumps.fields import BadSample, finite, only_tokens, whole
from cropi.trainers.dumps.folders import files_of
from cropi.trainers.dumps.rows import named_reward
from cropi.trainers.newest import Newest, merge_rollouts
from cropi.trainers.trl.options import Curriculum
from cropi.trainers.trl.ranks import Ranks
from cropi.trainers.trl.rollout_log import RolloutLog, cut_unfinished_line, log_files, rewind
from cropi.trainers.trl.scoring import choose_prompts
from cropi_kernels import SketchSpec


# --------------------------------------------------------------------------------------------- prompt ids
def test_ids_and_places() -> None:
    ids = PromptIds([{"id": 7}, {"id": "a"}, {"id": 0}], "id")
    assert ids.names == ["7", "a", "0"] and ids.places(["0", "7"]) == [2, 0] and len(ids) == 3
    assert "a" in ids and "b" not in ids
    assert PromptIds([{"info": {"index": 3}}, {"info": {"index": 5}}], "info.index").names == ["3", "5"]
    assert PromptIds([{"info.index": 3, "info": {"index": 5}}], "info.index").names == ["3"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": 7}, {"id": "7"}], "rows 0 and 1 have the same id '7'"),
        ([{"id": "a"}, {"id": None}], "row 1 has the id None"),
        ([{"id": True}], "row 0 has the id True"),
        ([{"id": ""}], "row 0 has the id ''"),
        ([{"prompt": "x"}], r"no column 'id' \(its columns: prompt\).*Recording\(id_key="),
        (iter([{"id": 1}]), "can only be streamed"),
    ],
)
def test_bad_ids(rows: Any, message: str) -> None:
    with pytest.raises(CropiError, match=message):
        PromptIds(rows, "id")


def test_a_nested_id_that_is_missing_names_the_row_and_the_option() -> None:
    with pytest.raises(CropiError, match="data: row 1 has the info.index None.*no other row has"):
        PromptIds([{"info": {"index": 3}}, {"info": None}], "info.index", "data", "--id-key")
    with pytest.raises(CropiError, match="rows 0 and 1 have the same info.index '3'.*with --id-key"):
        PromptIds([{"info": {"index": 3}}, {"info": {"index": 3}}], "info.index", "data", "--id-key")


# --------------------------------------------------------------------------------------------------- logs
def record(name: str, step: int, **more: Any) -> dict[str, Any]:
    return {"id": name, "prompt": "p", "responses": ["é", "b"], "rewards": [0, 1], "step": step} | more


def test_log_goes_on_after_an_unfinished_line(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path / "new", 3)
    log.append("train", [record("a", 0)])
    log.append("train", [])
    path = tmp_path / "new" / "train-rank00003.jsonl"
    assert log.sync() == {path.name: path.stat().st_size}
    with open(path, "ab") as file:
        file.write(b'{"id": "half' + b"x" * 200_000)
    again = RolloutLog(tmp_path / "new", 3)
    again.append("train", [record("b", 1), record("c", 1)])
    assert [r["id"] for r in json_lines(path)] == ["a", "b", "c"]
    path.write_bytes(b"no newline at all")
    cut_unfinished_line(path)
    assert path.read_bytes() == b""


class Full:
    """A file on a disk with room for a few bytes more: it takes them, and fails only when it is called again."""

    def __init__(self, file: IO[bytes], room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: memoryview) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = self.file.write(data[: self.room])
        self.room -= done
        return done

    def close(self) -> None:
        self.file.close()


def test_a_record_that_does_not_fit_on_the_disk_is_an_error_and_harms_no_other(tmp_path: Path) -> None:
    log = RolloutLog(tmp_path, 0)
    log.append("train", [record("a", 0)])
    log._open["train"] = Full(log._open["train"], 20)  # type: ignore[assignment]
    with pytest.raises(
        CropiError, match="cannot write .*train-rank00000.jsonl: no space left .*; free some space"
    ):
        log.append("train", [record("b", 0)])
    log.append("train", [record("c", 1)])
    assert [r["id"] for r in json_lines(log.path("train"))] == ["a", "c"]


def test_rewind_keeps_what_the_checkpoint_knows(tmp_path: Path) -> None:
    logs = [RolloutLog(tmp_path, rank) for rank in (0, 1)]
    logs[0].append("train", [record("a", 0)])
    sizes = logs[0].sync()
    for log in logs:
        log.append("train", [record("b", 1)])
        log.append("valid", [record("c", 1)])
    rewind(tmp_path, sizes)
    assert [path.name for path in log_files(tmp_path, "*")] == ["train-rank00000.jsonl"]
    assert json_lines(tmp_path / "train-rank00000.jsonl") == [record("a", 0)]
    with pytest.raises(CropiError, match="has 0 bytes, but the checkpoint knows of 9: rollouts"):
        rewind(tmp_path, {"train-rank00007.jsonl": 9})
    # Nothing is cut when something is missing.
    assert json_lines(tmp_path / "train-rank00000.jsonl") == [record("a", 0)]


def test_merge_keeps_one_record_a_prompt(tmp_path: Path) -> None:
    first = write_lines(
        tmp_path / "r0.jsonl", [record("b", 0, n=1), record("a", 3, n=2), record("a", 3, n=3)]
    )
    second = write_lines(tmp_path / "r1.jsonl", [record("b", 2, n=4), record("a", 1, n=5)])
    with open(second, "a", encoding="utf-8") as file:
        file.write('{"id": "b", "st')  # another rank is writing
    out = tmp_path / "merged.jsonl"
    for logs in ([first, second], [second, first]):
        assert merge_rollouts(logs, out) == 2
        assert [(r["id"], r["n"]) for r in json_lines(out)] == [("a", 3), ("b", 4)]
    with pytest.raises(CropiError, match="no rollout has been recorded yet"):
        merge_rollouts([], out)
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    with pytest.raises(CropiError, match="bad.jsonl: a line is not a recorded rollout"):
        merge_rollouts([tmp_path / "bad.jsonl"], out)
    assert [(r["id"], r["n"]) for r in json_lines(out)] == [("a", 3), ("b", 4)]


def test_a_log_that_grows_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, parsed, key = [tmp_path / f"r{rank}.jsonl" for rank in (0, 1)], [], newest_rollouts._key
    monkeypatch.setattr(newest_rollouts, "_key", lambda line, path: parsed.append(line) or key(line, path))
    newest, rng, out = Newest(), random.Random(0), tmp_path / "merged.jsonl"
    lines = [json.dumps(record(rng.choice("abcdefgh"), n // 4, n=n)) + "\n" for n in range(120)]
    for n, line in enumerate(lines):
        with open(logs[rng.randrange(2) if n > 1 else n], "a", encoding="utf-8") as file:
            file.write(line[:9])
            file.flush()
            if n % 5 == 3:
                merge_rollouts(logs, out, newest)
            file.write(line[9:])
        if n % 7 == 6:
            merge_rollouts(logs, out, newest)
            inquired = len(parsed)
            merge_rollouts(logs, tmp_path / "whole.jsonl")
            del parsed[inquired:]
            assert out.read_text() == (tmp_path / "whole.jsonl").read_text()
    merge_rollouts(logs, out, newest)
    assert sorted(parsed) == sorted(line.encode() for line in lines)
    kept = logs[1].read_text()
    logs[1].write_text(kept.replace('"rewards": [', '"rewards":[ ') + lines[0])
    with pytest.raises(CropiError, match=r"r1\.jsonl has changed where it had been read"):
        merge_rollouts(logs, out, newest)
    logs[1].write_text(lines[0])
    with pytest.raises(CropiError, match=r"r1\.jsonl has become shorter"):
        merge_rollouts(logs, out, newest)


def test_replace_puts_newer_records_in_place(tmp_path: Path) -> None:
    stored = write_lines(tmp_path / "stored.jsonl", [record("a", 0), record("b", 0)])
    newer = write_lines(tmp_path / "newer.jsonl", [record("b", 5), record("c", 5)])
    counts = replace_records([stored], newer, tmp_path / "both.jsonl")
    assert (counts.replaced, counts.unknown, counts.without_logprobs) == (1, 1, 2)
    assert [(r["id"], r["step"]) for r in json_lines(tmp_path / "both.jsonl")] == [("a", 0), ("b", 5)]


# -------------------------------------------------------------------------------------------------- ranks
def test_one_process_is_rank_zero_of_one() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
    assert ranks.gather("a") == ["a"] and ranks.share([1]) == [1] and ranks.agree(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        ranks.agree(lambda: 1 // 0)


# ------------------------------------------------------------------------------------------- fields of dumps
def test_numbers_of_no_dimension_are_numbers() -> None:
    """Of NumPy and torch, as a pickled step has them; a list of one number is finite, and no integer."""
    for one in (np.array(3), torch.tensor(3), np.int64(3), 3):
        assert whole(one, "step", "here") == finite(one, "reward", "here") == 3
    for one in (np.array([3]), torch.tensor([3])):
        assert finite(one, "reward", "here") == 3
        with pytest.raises(BadSample, match="should be an integer"):
            whole(one, "step", "here")
    for two in (np.array([3, 4]), torch.tensor([3, 4])):
        with pytest.raises(BadSample, match="should be a finite number"):
            finite(two, "reward", "here")


def test_empty_images_are_none() -> None:
    for empty in (np.zeros((0, 3)), torch.zeros(0, 3), [[], {}], None):
        only_tokens({"pixel_values": empty}, "here")
    for held in (np.zeros((1, 3)), torch.zeros(1, 3), torch.tensor(1.0)):
        with pytest.raises(BadSample, match="pixel_values"):
            only_tokens({"pixel_values": held}, "here")


def test_a_named_reward_may_have_a_plus_in_its_name() -> None:
    row = {"a": 1.0, "b": 2.0, "a+c": 5.0}
    assert named_reward(row, "a+b", "here") == 3.0 and named_reward(row, "a+c", "here") == 5.0


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("openrlhf", {"input": "1+1=", "output": "2", "reward": 1.0, "label": "two"}),
        (
            "skyrl",
            {"input_prompt": "1+1=", "output_response": "2", "score": 1.0, "data_source": "sums",
             "env_extras": {"reward_spec": {"ground_truth": "two"}}},
        ),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_text_keeps_its_answer(source: str, row: dict[str, Any], tmp_path: Path) -> None:
    (rollout,) = read_rollouts(write_lines(tmp_path / "1.jsonl", [row]), source)
    assert (rollout.answer, rollout.extra.get("task")) == ("two", row.get("data_source"))


def test_files_are_looked_for_three_folders_down(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "c" / "1.jsonl"
    file.parent.mkdir(parents=True)
    file.touch()
    assert files_of(tmp_path) == [file] and files_of(tmp_path, 2) == []


# ---------------------------------------------------------------------------------------------- selecting
@pytest.mark.long
@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_a_policy_in_training_mode_is_scored_without_its_dropout_and_left_as_it_was(tmp_path: Path) -> None:
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    files = {
        "train": [write_lines(tmp_path / "train.jsonl", make_records(20))],
        "valid": [write_lines(tmp_path / "valid.jsonl", make_records(8, seed=1))],
    }
    options = Curriculum(stage_steps=1, fraction=0.3, **files, spec=SketchSpec(dim=512))
    found = {}
    for mode in (False, True):
        model.train(mode)
        before = torch.get_rng_state()
        folder = tmp_path / str(mode)
        choose_prompts(
            model, make_tokenizer(), options, stage=0, folder=folder, **files, known=lambda name: True,
            ranks=Ranks(), seed=0, progress=False,
        )  # fmt: skip
        assert all(module.training is mode for module in model.modules())
        assert torch.equal(torch.get_rng_state(), before)
        found[mode] = read_scores(folder / "scores.parquet").table
    np.testing.assert_array_equal(found[True], found[False])


@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_a_curriculums_files_may_be_dumps(tmp_path: Path) -> None:
    """Told by what stands in them, unless the source is named; records are left as they are."""
    row = {"input_prompt": "q", "output_response": "r", "score": 1.0}
    steps = tmp_path / "steps"
    steps.mkdir()
    write_lines(steps / "step_1.jsonl", [row, row | {"output_response": "s", "score": 0.0}])
    stored = write_lines(tmp_path / "stored.jsonl", [record("a", 0)])
    options = Curriculum(stage_steps=1, train=steps, valid=stored)
    (group,) = read_groups(options.opened("train"))
    assert group.responses == ["r", "s"] and group.rewards == [1.0, 0.0]
    assert options.opened("valid") == [stored]
    with pytest.raises(CropiError, match="train: there is no trajectory file .*did you mean .stored.jsonl"):
        Curriculum(stage_steps=1, train=tmp_path / "stord.jsonl", valid=stored)
    with pytest.raises(CropiError, match="source must be one of auto, records, .*, got 'sky'"):
        Curriculum(stage_steps=1, train=steps, valid=stored, source="sky")
