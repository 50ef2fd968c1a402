"""Files as they lie behind real runs: several steps and versions of the policy, evaluations, tools, folders."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from support.made_dumps import ROLLOUTS, made, messages, write

from cropi.cli import main
from cropi.data.readers import read
from cropi.data.scan import LossyTokens, check_pool, scan
from cropi.errors import CropiError
from cropi.trainers.dumps.auto import opened
from cropi.trainers.dumps.evaluated import EvaluatedStep
from cropi.trainers.dumps.folders import files_of
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, group_rollouts

lossy = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


def groups(path: Any, skip_bad: bool = False, **given: Any) -> list[Any]:
    return list(read(opened(path, skip_bad=skip_bad, reading=Reading(**given)), skip_bad=skip_bad))


def rewards(path: Any, **given: Any) -> list[list[float]]:
    return [group.rewards for group in groups(path, **given)]


def logged(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """The completions of one step as TRL logs them, or as ms-swift does."""
    if kind == "trl":
        return write(folder / "completions_00004.parquet", [{"step": 4} | row for row in rows])
    columns: dict[str, Any] = {key: [row[key] for row in rows] for key in rows[0]}
    columns |= {"advantages": columns.pop("advantage"), "step": ["4"] * len(rows)}
    return write(folder / "completions.jsonl", [columns])


# ------------------------------------------------------------------------------------------------------ steps
@lossy
def test_areals_step_is_the_newest_version_of_a_sample(tmp_path: Path) -> None:
    """The smallest one is that of the prompt's tokens, -1, and told no versions apart."""
    for version in (9, 10):
        (tmp_path / f"{version}").mkdir()
        rows = [
            row | {"tail_version": version, "completion": f"of {version}", "reward": k % 2 * version}
            for k, row in enumerate(made("areal"))
        ]
        write(tmp_path / f"{version}/3.jsonl", rows)
    for group in groups(tmp_path):
        assert (group.policy, group.responses, group.rewards) == ("step 10", ["of 10"] * 2, [0.0, 10.0])


@lossy
def test_areals_tasks_with_several_prompts_are_of_several_turns(tmp_path: Path) -> None:
    rows, path = made("areal"), tmp_path / "3.jsonl"
    # A run that began anew counts its tasks from 0 again.
    again = [row | {"prompt": "q5"} for row in rows[:2]]
    assert rewards(write(path, rows[:2] + again)) == [[1.0, 0.0]] * 2
    rows[3]["prompt"] = "q1 and a turn"
    with pytest.raises(
        CropiError, match=r"3.jsonl:3, prompt: differs from that of a row beside it that is of the same task"
    ):
        groups(write(path, rows))
    # Both of its samples are left out.
    assert rewards(path, skip_bad=True) == [[1.0, 0.0]]


@lossy
def test_a_step_that_ms_swift_writes_again_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    lines = made("ms-swift")
    first, second = (line | {"step": ["8"] * 4} for line in lines)
    found = groups(write(path, [first, *lines]))
    assert [group.responses for group in found] == [["x"] * 2] * 2  # of step 8
    found = groups(write(path, [*lines, first, second]))
    assert [group.responses for group in found] == [["r0", "r1"], ["r2", "r3"]]
    assert [group.policy for group in found] == ["step 8"] * 2


@lossy
def test_ms_swifts_rows_of_several_steps_are_not_put_together(tmp_path: Path) -> None:
    rows = [
        {"gen_step": step, "prompt": f"q{k // 2}", "completion": f"r{k} of {step}", "reward": reward}
        for step in (1, 2)
        for k, (*_, reward) in enumerate(ROLLOUTS)
    ]
    found = groups(write(tmp_path / "completions.jsonl", rows))
    assert [group.responses for group in found] == [["r0 of 2", "r1 of 2"], ["r2 of 2", "r3 of 2"]]


@pytest.mark.parametrize("key", ["gen_step", "global_step", "iteration", "weight_version"])
def test_rows_of_several_policies_are_no_group(key: str, tmp_path: Path) -> None:
    rows = [{"prompt": "q", "response": f"r{k}", "reward": k, key: k // 2} for k in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        CropiError, match=rf"are of several policies \({key} \[0, 0, 1, 1\]\).*--columns {key}="
    ):
        list(read(path))
    assert next(iter(read(path, columns=f"{key}="))).size == 4


@lossy
def test_a_file_and_its_copy_do_not_count_twice(tmp_path: Path) -> None:
    write(tmp_path / "7.jsonl", made("verl text"))
    shutil.copy(tmp_path / "7.jsonl", tmp_path / "7 (copy).jsonl")
    for path in (tmp_path, [tmp_path / "7.jsonl"] * 2):
        with pytest.raises(CropiError, match="holds the same as .*, so that its rollouts would count twice"):
            groups(path)
    # As long, and another step.
    write(tmp_path / "7 (copy).jsonl", [row | {"step": 8} for row in made("verl text")])
    assert {group.policy for group in groups(tmp_path)} == {"step 8"}


def test_ids_of_responses_are_no_ids_of_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": f"r{k}", "prompt": "q", "response": f"r{k}", "reward": k} for k in range(4)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert main(["info", str(path)]) == 0
    assert "4 prompts: one response; where the ids are those of responses" in capsys.readouterr().out
    with pytest.raises(CropiError, match=r"\(4 with one response; where .* --columns id=, .* others\)"):
        check_pool(scan(path), "rows")
    assert main(["info", str(path), "--columns", "id="]) == 0
    assert "1 prompt, 4 responses, 1 prompt usable" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------- no reward
@lossy
@pytest.mark.parametrize(
    "kind", ["verl text", "areal", "skyrl", "openrlhf", "open-instruct", "nemo-gym", "records"]
)
def test_a_first_response_without_a_reward_is_one_of_all(kind: str, tmp_path: Path) -> None:
    """What wrote the file is told all the same, and --skip-bad goes on."""
    plain = [
        {"id": k // 2, "prompt": f"q{k // 2}", "response": f"r{k}", "reward": float(k)} for k in range(4)
    ]
    rows = plain if kind == "records" else made(kind)
    rows[0][next(key for key in ("reward", "score") if key in rows[0])] = None
    path = write(tmp_path / "7.jsonl", rows)
    with pytest.raises(
        CropiError, match="7.jsonl:1.*(is missing: the responses are not scored|finite number, got None)"
    ):
        groups(path)
    # Of records it is the whole prompt that is left out.
    assert sum(group.size for group in groups(path, skip_bad=True)) == (2 if kind == "records" else 3)


@lossy
@pytest.mark.parametrize("kind", ["trl", "ms-swift"])
def test_functions_that_give_no_reward_are_left_out_of_the_sum(kind: str, tmp_path: Path) -> None:
    """As the trainers add them up (``nansum``). A completion that no function scored is left out, and counted."""
    scores = [(1.0, math.nan), (math.nan, 0.5), (0.25, 0.5), (math.nan, math.nan)]
    rows = [
        {"prompt": "q", "completion": f"r{k}", "right": right, "form": form, "advantage": advantage}
        for k, ((right, form), advantage) in enumerate(zip(scores, (0.4375, -0.0625, 0.1875, -0.5625)))
    ]
    (held,) = opened(logged(tmp_path, kind, rows))
    assert [group.rewards for group in read(held)] == [[1.0, 0.5, 0.75]] and held.left.counts == {"right": 1}


# ------------------------------------------------------------------------------------------------ evaluations
@lossy
@pytest.mark.parametrize("kind", ["trl", "ms-swift"])
def test_a_prompt_that_lost_completions_to_an_evaluation_is_left_out(kind: str, tmp_path: Path) -> None:
    """TRL keeps as many rows as a batch has; an evaluation's push out the first ones."""
    whole = [
        {"prompt": "q", "completion": f"r{k}", "right": float(k == 3), "advantage": -0.5 + 2 * (k == 3)}
        for k in range(4)
    ]
    evaluated = [
        {"prompt": "v", "completion": f"r{k}", "right": float(k), "advantage": k - 0.5} for k in range(2)
    ]
    assert sorted(rewards(logged(tmp_path, kind, whole + evaluated))) == [[0.0, 0.0, 0.0, 1.0], [0.0, 1.0]]
    for part in (whole[1:], whole[2:], whole[3:], whole[1:3]):
        (held,) = opened(logged(tmp_path, kind, part + evaluated))
        assert held.left.counts == {"advantage": len(part)} and [group.prompt for group in read(held)] == [
            "v"
        ]
    # Advantages that are not centred are of another kind, and say nothing of this.
    other = [row | {"advantage": row["advantage"] + 1} for row in whole[1:3] + evaluated]
    assert len(rewards(logged(tmp_path, kind, other))) == 2


@lossy
@pytest.mark.parametrize("kind", ["trl", "ms-swift"])
def test_completions_of_a_step_with_an_evaluation_are_told(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "completions").mkdir(parents=True)
    name = "completions/completions_00007.parquet" if kind == "trl" else "completions.jsonl"
    path = write(run / name, made(kind))
    step = next(group.policy for group in groups(path))
    assert step is not None
    number = int(step.removeprefix("step "))
    for checkpoint, evaluated in ((2, number), (10, number + 1)):
        log = [{"step": number, "loss": 0.1}, {"step": evaluated, "eval_loss": 0.2}]
        (run / f"checkpoint-{checkpoint}").mkdir()
        (run / f"checkpoint-{checkpoint}/trainer_state.json").write_text(json.dumps({"log_history": log}))
    with warnings.catch_warnings():
        # The newest checkpoint knows all evaluations.
        warnings.simplefilter("error", EvaluatedStep)
        before = groups(path)
    shutil.rmtree(run / "checkpoint-10")
    with pytest.warns(
        EvaluatedStep, match=rf"evaluated at the steps {number} \(.*checkpoint-2/trainer_state.json\)"
    ):
        assert groups(path) == before
    (run / "checkpoint-2/trainer_state.json").write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error", EvaluatedStep)
        groups(path)


# ----------------------------------------------------------------------------------------------------- text
@lossy
@pytest.mark.parametrize("kind", ["areal", "skyrl"])
def test_text_with_special_tokens_says_which_responses_were_cut(kind: str, tmp_path: Path) -> None:
    """An end token is appended to those that are not."""
    rows, column = made(kind), {"areal": "completion", "skyrl": "output_response"}[kind]
    for k, row in enumerate(rows):
        row[column] += "<|im_end|>" * (k % 2)
        row.pop("stop_reason", None)
    assert [group.truncated for group in groups(write(tmp_path / "7.jsonl", rows))] == [[True, False]] * 2


@lossy
def test_rolls_messages_are_rendered_and_its_prompts_are_not(tmp_path: Path) -> None:
    (columns,) = made("roll")
    path = tmp_path / "rollout_dump_data.step_7.jsonl"
    for group in groups(write(path, [columns])):
        assert (group.prompt, group.task, group.answer) == (f"q{group.id}", "sums", "g") and group.extra[
            "rendered"
        ]
        assert group.temperature == 0.7
    (other,) = made("roll")
    table, empty = {"generation_config": {"temperature": 0.5}}, '{"generation_config": {}}'
    for settings, temperature in (("{}", None), (None, None), (empty, None), (table, 0.5)):
        other["sampling_params"] = [settings] * 4
        assert [one.temperature for one in groups(write(path, [other]))] == [temperature] * 2
    other["sampling_params"][1] = '{"generation_config": {"temperature": "warm"}}'
    with pytest.raises(
        CropiError, match=r"response 1, sampling_params.generation_config.temperature: should be"
    ):
        groups(write(path, [other]))
    columns["messages"] = [json.dumps(messages(k // 2)) for k in range(4)]
    for group in groups(write(path, [columns])):
        assert group.prompt == messages(int(group.id)) and "rendered" not in group.extra
    columns["messages"][2] = "[x"
    with pytest.raises(CropiError, match=r"jsonl:1, response 2, messages: should be JSON, got '\[x'"):
        groups(write(path, [columns]))


# ---------------------------------------------------------------------------------------------------- folders
def test_a_folder_of_folders_stands_for_the_files_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (2, 10):
        (run / f"{step}/0").mkdir(parents=True)
        write(run / f"{step}/0/tq_batch.pt", made("verl") | {"global_steps": step})
        (run / f"{step}/0/meta.json").write_text('{"global_steps": 2}')
    (run / ".git").mkdir()
    (run / ".git/x").write_text("x")
    out = tmp_path / "out.jsonl"
    assert main(["convert", str(run), "--temperature", "0.7", "--out", str(out)]) == 0
    assert f"left out      {run}: 10/0/meta.json, 2/0/meta.json, which" in capsys.readouterr().out
    assert {group.policy for group in read(out)} == {"step 10"}
    assert main(["info", str(run)]) == 0
    assert "2 prompts, 4 responses, 2 prompts usable" in capsys.readouterr().out
    # One whose name says that it is of validation is left out; records are read, too.
    records = tmp_path / "records"
    for name in ("a", "eval-rollout"):
        (records / name).mkdir(parents=True)
        shutil.copy(out, records / name / "1.jsonl")
    (records / "a" / "_SUCCESS").touch()  # as Spark leaves it
    assert main(["info", str(records)]) == 0
    assert "2 prompts, 4 responses, 2 prompts usable" in capsys.readouterr().out
    # Two runs beside each other are not one.
    (records / "b").mkdir()
    shutil.copy(out, records / "b" / "1.jsonl")
    (records / "README.md").write_text("# A model card, as TRL writes one\n")
    assert main(["info", str(records)]) == 2
    assert f"{records} holds the folders a, b, which are not the steps of one run" in capsys.readouterr().err


def test_marks_of_spark_and_dask_are_no_files_of_a_run_and_what_begins_alike_is_one(tmp_path: Path) -> None:
    for name in (
        "_SUCCESS",
        "_metadata",
        "_common_metadata",
        "_committed_17",
        "_started_17",
        "_train",
        "a.jsonl",
    ):
        (tmp_path / name).touch()
    assert sorted(path.name for path in files_of(tmp_path)) == ["_train", "a.jsonl"]


def test_many_files_of_text_are_said_to_be_text_once(tmp_path: Path) -> None:
    for step in range(5):
        write(tmp_path / f"{step}.jsonl", [row | {"tail_version": step} for row in made("areal")])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opened(tmp_path)
    assert sum(issubclass(one.category, LossyTokens) for one in told) == 1 and "0.jsonl holds" in str(
        told[0].message
    )


@lossy
@pytest.mark.parametrize("kind", ["verl text", "nemo-rl", "areal", "open-instruct", "prime-rl traces"])
def test_a_last_line_that_was_cut_off_is_said_to_be_that(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train_data_step7.jsonl", made(kind))
    whole = path.read_bytes()
    for size in (2, 20):
        path.write_bytes(whole[:-size])
        with pytest.raises(
            CropiError, match=r"jsonl:4, line: not a JSON object: .*, where the file ends: it was not"
        ):
            groups(path)
        assert sum(group.size for group in groups(path, skip_bad=True)) == 3
    path.write_bytes(whole[:-3] + b"\n")
    with pytest.raises(
        CropiError, match=r"jsonl:4, line: not a JSON object: .* at column \d+, where the line ends: .*jq -c"
    ):
        groups(path)


def test_a_response_that_was_cut_stays_so_beside_one_of_which_nothing_is_said() -> None:
    """All responses of its prompt had got an end token."""
    said = [Rollout("a", float(k), 0, f"f:{k}", prompt="p", response="r", truncated=cut)
            for k, cut in enumerate((None, True, False))]  # fmt: skip
    (group,) = group_rollouts(said)
    assert group.truncated == [False, True, False]
    (group,) = group_rollouts(said[:1])
    assert group.truncated is None


@lossy
def test_a_prompt_belongs_to_the_dump_with_its_newest_responses(tmp_path: Path) -> None:
    """A choice from every file by itself (--per file) takes dumps that are given together for what they are."""
    rows = made("areal")
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    parts = {
        "first": [row | {"tail_version": 1} for row in rows],
        "second": [row | {"tail_version": 2} for row in rows if row["prompt"] == prompts[1]],
        "third": [row | {"tail_version": 1, "prompt": f"{row['prompt']}?"} for row in rows],
    }
    for name, part in parts.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "1.jsonl", part)
    given = [tmp_path / "first" / "1.jsonl", tmp_path / "second", tmp_path / "third"]
    found = {group.prompt: group for group in read(opened(given))}
    files = {prompt: group.file for prompt, group in found.items()}
    assert files == {
        prompts[0]: f"{given[0]}, as records", prompts[1]: f"{given[1]}, as records",
        **{f"{prompt}?": f"{given[2]}, as records" for prompt in prompts},
    }  # fmt: skip
    assert found[prompts[1]].policy == "step 2" and found[prompts[0]].policy == "step 1"
    # Whose prompts are all newer in another one has none.
    later = write(tmp_path / "later.jsonl", [row | {"tail_version": 3} for row in rows])
    assert {group.file for group in read(opened([given[0], later]))} == {f"{later}, as records"}
