"""Selections for trainers (`cropi select --export`), and trainers' dumps to records (`cropi convert`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from support.commands import cropi, json_lines
from support.made_data import make_records, make_tokenizer, write_lines

from cropi.data.export import export
from cropi.data.readers import read
from cropi.data.scan import LossyTokens
from cropi.errors import CropiError
from cropi.ranking.scores import Scores
from cropi.ranking.selection import select
from cropi.ranking.selection_files import read_selection, write_selection
from cropi.ranking.table import write_scores
from cropi.store.rows import RowInfo
from cropi.trainers.dumps.auto import read_rollouts
from cropi.trainers.dumps.rollout import group_rollouts
from cropi.trainers.dumps.verl_batch import rollouts_of_proto

# ----------------------------------------------------------------------------------------------------- exports
ROWS = [{"prompt": [{"role": "user", "content": f"q{i}"}], "reward_model": {"ground_truth": str(i)},
         "extra_info": {"index": i, "split": "train"}} for i in range(6)]  # fmt: skip


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A dataset in verl's layout, with metadata of its own in the schema."""
    table = pyarrow.Table.from_pylist(ROWS).replace_schema_metadata({"made": "by us"})
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    return tmp_path / "data.parquet"


def test_rows_of_a_dataset_are_copied_whole_and_best_first(tmp_path: Path, parquet: Path) -> None:
    assert export(tmp_path / "out.parquet", ["4", "1"], format="parquet", dataset=parquet) == 2
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table.to_pylist() == [ROWS[4], ROWS[1]] and table.schema.metadata[b"made"] == b"by us"
    export(tmp_path / "out.jsonl", ["4", "1"], format="jsonl", dataset=parquet)
    assert json_lines(tmp_path / "out.jsonl") == [ROWS[4], ROWS[1]]
    export(tmp_path / "out.json", ["4", "1"], format="indices", dataset=parquet)
    assert json.loads((tmp_path / "out.json").read_text()) == [4, 1]
    named = write_lines(tmp_path / "named.jsonl", [{"name": f"p{i}", "question": i} for i in range(3)])
    export(tmp_path / "b.parquet", ["p2", "p0"], format="parquet", dataset=named, id_key="name")
    assert pyarrow.parquet.read_table(tmp_path / "b.parquet").to_pylist() == [
        {"name": "p2", "question": 2}, {"name": "p0", "question": 0}]  # fmt: skip
    export(tmp_path / "ids.txt", ["p2", "p0"], format="ids")
    assert (tmp_path / "ids.txt").read_text() == "p2\np0\n"
    # A reader of lines leaves out spaces, and ' p2' would become 'p2'.
    for name in ("a\nb", " p2", "p2 ", "  "):
        with pytest.raises(
            CropiError, match=f"the prompt id {re.escape(repr(name))} is not one line without spaces"
        ):
            export(tmp_path / "ids.txt", ["p2", name], format="ids")
    # Read again, the first was taken for JSON, and of the second the mark was lost without a word.
    for name in ("{a", '{"id": "x"}', "\ufeffb"):
        with pytest.raises(CropiError, match=f"the prompt id {re.escape(repr(name))} begins with"):
            export(tmp_path / "ids.txt", [name, "p2"], format="ids")
    export(tmp_path / "ids.txt", ["p2", "\ufeffb"], format="ids")
    assert read_selection(tmp_path / "ids.txt") == ["p2", "\ufeffb"], "no mark of the file's, in a later line"
    with pytest.raises(CropiError, match=r"the prompt id 'p\\ud83d' has half of a surrogate pair"):
        export(tmp_path / "ids.txt", ["p2", "p\ud83d"], format="ids")


def test_line_separators_inside_strings_do_not_end_a_line(
    tmp_path: Path,
) -> None:
    """JSON lets U+2028, U+2029 and U+0085 stand in a string as they are, and str.splitlines cuts at each of them."""
    name = "p\u2028\u20291\x85"
    rows = [{"id": name, "question": "a\u2028b"}, {"id": "q", "question": "\x85c"}]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    export(tmp_path / "out.jsonl", [name], dataset=data)
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8")) == rows[0]

    scores = Scores([RowInfo(name), RowInfo("q")], ["x"], np.array([[1.0], [0.5]]),
                    {"train": {"stage": "0", "model": {"weights": "aa"}}})  # fmt: skip
    write_selection(tmp_path / "selected.jsonl", scores, select(scores, fraction=1.0))
    assert read_selection(tmp_path / "selected.jsonl") == [name, "q"]

    dump = tmp_path / "1.jsonl"
    texts = [{"input": "q\u2028", "output": f"a\x85{k}", "score": k, "step": 1} for k in (0, 1)]
    dump.write_text("".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts), encoding="utf-8")
    with pytest.warns(LossyTokens):
        assert [r.response for r in read_rollouts(dump, "verl")] == ["a\x850", "a\x851"]
    lines_of_nemo = [{**row, "content": ["\u2028"]} for row in nemo_lines()]
    dump = tmp_path / "train_data_step3.jsonl"
    dump.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in lines_of_nemo), encoding="utf-8"
    )
    assert len(list(read_rollouts(dump, "nemo-rl"))) == len(lines_of_nemo)


def test_without_a_dataset_the_prompts_come_from_the_records(tmp_path: Path) -> None:
    records = make_records(5)
    source = write_lines(tmp_path / "t.jsonl", [record | {"level": 3} for record in records])
    export(tmp_path / "out.jsonl", [records[3]["id"], records[0]["id"]], trajectories=[source])
    got = json_lines(tmp_path / "out.jsonl")
    assert [row["id"] for row in got] == [records[3]["id"], records[0]["id"]]
    assert (
        set(got[0]) == {"id", "prompt", "answer", "task", "level"}
        and got[0]["prompt"] == records[3]["prompt"]
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"format": "csv"},
            "format must be one of jsonl, parquet, ids, indices, weights, save_to_disk, verl, slime, openrlhf, got "
            "'csv'",
        ),
        ({"format": "indices"}, "needs a dataset"),
        ({"format": "jsonl"}, "give --dataset or --trajectories"),
        ({"dataset": "data.parqet"}, "data.parqet; did you mean 'data.parquet'? give the path of one"),
        ({"dataset": "data.parquet", "ids": ["9"]}, "1 of 1 prompts have no row, for example '9'"),
        (
            {"dataset": "data.parquet", "id_key": "key"},
            "no stable prompt id (column 'key' is not among its columns",
        ),
        ({"dataset": "no_ids.jsonl"}, "no stable prompt id (one of id, extra_info.index, index, uid"),
        ({"dataset": "twice.jsonl"}, "rows 0 and 2 have the same id '1'"),
        ({"dataset": "broken.jsonl"}, "broken.jsonl:1 is not JSON"),
    ],
)
def test_exports_that_cannot_be(tmp_path: Path, parquet: Path, options: dict[str, Any], words: str) -> None:
    write_lines(tmp_path / "no_ids.jsonl", [{"question": 1}])
    write_lines(tmp_path / "twice.jsonl", [{"id": 1}, {"id": 2}, {"id": 1}])
    (tmp_path / "broken.jsonl").write_text("{")
    given = dict(options)
    ids = given.pop("ids", ["1"])
    if "dataset" in given:
        given["dataset"] = tmp_path / given["dataset"]
    with pytest.raises(CropiError) as caught:
        export(tmp_path / "out", ids, **given)
    assert words in str(caught.value) and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- dumps
PROMPTS = {0: [5, 6, 7], 1: [8, 9]}
RESPONSES = {0: [[10, 11, 1], [12, 1]], 1: [[13, 1], [14, 15, 16]]}
REWARDS = {0: [1.0, 0.0], 1: [0.0, 1.0]}


def logprobs(ids: list[int]) -> list[float]:
    return [-token / 8 for token in ids]  # exact in float32


@pytest.mark.long
def test_a_terminal_that_lacks_a_letter_does_not_end_the_export(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", [{**r, "prompt": "x\u00b2 \u2264 7"} for r in make_records(10)])
    rows = [RowInfo(r["id"], pass_rate=0.5) for r in make_records(10)]
    meta = {"metric": "cosine", "train": {"stage": "0", "model": {"weights": "aa"}}}
    table = np.linspace(0, 1, 10)[:, None]
    write_scores(tmp_path / "s.parquet", Scores(rows, ["x"], table, meta))
    command = [sys.executable, "-m", "cropi", "select", "--scores", "s.parquet", "--out", "selected.jsonl",
               "--trajectories", "t.jsonl", "--export", "ids", "--format", "ids"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "x\\xb2 \\u2264 7" in done.stdout and (tmp_path / "ids").read_text() == f"{rows[-1].id}\n"


def check_records(path: Path, names: list[str] | None = None) -> None:
    groups = list(read(path))
    if names is not None:
        assert [group.id for group in groups] == names
    assert sorted(group.prompt_ids for group in groups) == sorted(PROMPTS.values())  # type: ignore[type-var]
    for group in groups:
        i = next(i for i, prompt in PROMPTS.items() if prompt == group.prompt_ids)
        assert group.response_ids == RESPONSES[i] and group.rewards == REWARDS[i] and group.temperature == 0.7
        assert group.logprobs == [logprobs(ids) for ids in RESPONSES[i]]


def rows() -> list[tuple[int, int, list[int], list[int], float]]:
    return [(i, k, PROMPTS[i], ids, REWARDS[i][k]) for i in PROMPTS for k, ids in enumerate(RESPONSES[i])]


class Proto:
    """What a DataProto looks like from outside: prompts padded on the left, responses on the right."""

    def __init__(self) -> None:
        def left(values: list[Any], pad: float) -> torch.Tensor:
            width = max(map(len, values))
            return torch.tensor([[pad] * (width - len(v)) + list(v) for v in values])

        def right(values: list[Any], pad: float) -> torch.Tensor:
            width = max(map(len, values))
            return torch.tensor([list(v) + [pad] * (width - len(v)) for v in values])

        prompts, responses = [row[2] for row in rows()], [row[3] for row in rows()]
        scores = [[0.0] * (len(row[3]) - 1) + [row[4]] for row in rows()]
        mask = right([[1] * len(ids) for ids in responses], 0)
        self.batch = {
            "prompts": left(prompts, 0), "responses": right(responses, 0), "response_mask": mask,
            "attention_mask": torch.cat([left([[1] * len(p) for p in prompts], 0), mask], dim=1),
            "rollout_log_probs": right([logprobs(ids) for ids in responses], 0.0),
            "old_log_probs": torch.full(mask.shape, -9.0), "token_level_scores": right(scores, 0.0),
        }  # fmt: skip
        self.non_tensor_batch: dict[str, Any] = {
            "extra_info": [{"index": row[0] + 40} for row in rows()],
            "reward_model": [{"ground_truth": "g"} for _ in rows()], "data_source": ["sums"] * 4,
            "raw_prompt": [[{"role": "user", "content": f"q{row[0]}"}] for row in rows()],
        }  # fmt: skip
        self.meta_info = {"temperature": 0.7}


def test_verl_padded_batches_keep_every_token(tmp_path: Path) -> None:
    from cropi.trainers.dumps.rollout import write_groups

    groups = list(group_rollouts(rollouts_of_proto(Proto(), 3)))
    write_groups(tmp_path / "t.jsonl", groups)
    check_records(tmp_path / "t.jsonl", ["40", "41"])
    assert groups[0].policy == "step 3" and groups[0].task == "sums" and groups[0].answer == "g"
    assert groups[0].prompt == [{"role": "user", "content": "q0"}]
    proto = Proto()
    del proto.batch["rollout_log_probs"]
    old = list(group_rollouts(rollouts_of_proto(proto, 3)))
    assert old[0].logprobs == [[-9.0] * 3, [-9.0] * 2]


def test_verl_padded_batches_that_cannot_be_used() -> None:
    def error(change: Any) -> str:
        proto = Proto()
        change(proto)
        with pytest.raises(CropiError) as caught:
            list(group_rollouts(rollouts_of_proto(proto, 0)))
        return str(caught.value)

    assert "row 0, extra_info.index: is missing, which is the only stable id" in error(
        lambda p: p.non_tensor_batch["extra_info"].__setitem__(0, {})
    )
    assert "row 0, reward: is missing" in error(lambda p: p.batch.pop("token_level_scores"))
    assert "DataProto, responses: is missing" in error(lambda p: p.batch.pop("responses"))
    assert "row 1, attention_mask: has gaps" in error(
        lambda p: p.batch["attention_mask"].__setitem__((1, 3), 0)
    )
    assert "old_log_probs: has the shape [4, 2], responses [4, 3]" in error(
        lambda p: p.batch.__setitem__("old_log_probs", torch.zeros(4, 2))
    )
    same = [{"index": 0}] * 4
    assert "another prompt" in error(lambda p: p.non_tensor_batch.__setitem__("extra_info", same))


def dump_of_verl(folder: Path, tokenizer: Any, records: list[dict[str, Any]], step: int) -> Path:
    """What trainer.rollout_data_dir writes: each side decoded on its own, without special tokens."""
    path = folder / f"{step}.jsonl"
    dumped = []
    for record in records:
        rendered = tokenizer.apply_chat_template(record["prompt"], add_generation_prompt=True, tokenize=False)
        for text, reward in zip(record["responses"], record["rewards"]):
            dumped.append({"input": rendered, "output": text, "gts": record["answer"], "score": reward, "step": step,
                           "uid": "x_0_0"})  # fmt: skip
    return write_lines(path, dumped)


def test_verl_text_dumps_are_read_and_called_lossy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.save_pretrained(tmp_path / "model")
    records = [r | {"prompt": [{"role": "user", "content": r["prompt"]}]} for r in make_records(4)]
    files = [
        dump_of_verl(tmp_path, tokenizer, records[:3], 1),
        dump_of_verl(tmp_path, tokenizer, records[2:], 2),
    ]
    convert = ["convert", *files, "--source", "verl", "--out", tmp_path / "t.jsonl"]
    assert cropi(*convert) == 0
    shown = capsys.readouterr()
    assert "4 prompts, 16 responses; token ids in 0 records" in shown.out
    assert "text without special tokens" in shown.err and "skip.rollout_tq" in shown.err
    groups = {group.answer: group for group in read(tmp_path / "t.jsonl")}
    assert groups[records[2]["answer"]].policy == "step 2" and groups[records[0]["answer"]].policy == "step 1"
    assert all(group.id.startswith("text-") for group in groups.values())
    assert all(group.extra == {"lossy": True, "rendered": True} for group in groups.values())
    # With the dataset the prompts have their ids and messages again.
    rows = [{"prompt": r["prompt"], "extra_info": {"index": i + 10}} for i, r in enumerate(records)]
    write_lines(tmp_path / "data.jsonl", rows)
    # Of its name the other rows of a table hold an empty one.
    rows[0]["prompt"] = [rows[0]["prompt"][0] | {"name": "a"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "dumps").mkdir()
    dumps = [file.rename(tmp_path / "dumps" / file.name) for file in files]
    for data, given in (("data.jsonl", [*dumps, "--source", "verl"]), ("data.parquet", [tmp_path / "dumps"])):
        source = [*given, "--out", tmp_path / "t.jsonl"]
        dataset = ["--dataset", tmp_path / data, "--model", tmp_path / "model"]
        assert cropi("convert", *source, *dataset) == 0
        found = {group.id: group for group in read(tmp_path / "t.jsonl")}
        assert {name: group.prompt for name, group in found.items() if name != "10"} == {
            str(i + 10): record["prompt"] for i, record in enumerate(records) if i}  # fmt: skip
        assert found["10"].responses == records[0]["responses"]
    files = dumps
    convert[1:3] = dumps
    assert cropi(*convert, "--id-key", "nothing") == 2
    assert "nothing: is missing, which --id-key names; there are 'input', 'output'" in capsys.readouterr().err
    write_lines(tmp_path / "data.jsonl", rows[1:])
    assert (
        cropi(
            "convert",
            *dumps,
            "--out",
            tmp_path / "t.jsonl",
            *dataset[:1],
            tmp_path / "data.jsonl",
            *dataset[2:],
        )
        == 2
    )
    assert "no row of the dataset renders to" in capsys.readouterr().err


def slime_samples() -> list[dict[str, Any]]:
    return [
        {"tokens": prompt + ids, "response_length": len(ids), "reward": reward, "rollout_log_probs": logprobs(ids),
         "loss_mask": [1] * len(ids), "group_index": i, "index": 2 * i + k, "label": "g", "prompt": f"q{i}",
         "metadata": {"id": f"m{i}"}}
        for i, k, prompt, ids, reward in rows()
    ]  # fmt: skip


def test_slime_dumps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"rollout_id": 7, "samples": slime_samples()}, tmp_path / "7.pt")
    convert = [
        "convert",
        tmp_path / "7.pt",
        "--source",
        "slime",
        "--out",
        tmp_path / "t.jsonl",
        "--temperature",
        0.7,
    ]
    assert cropi(*convert, "--id-key", "id") == 0
    check_records(tmp_path / "t.jsonl", ["m0", "m1"])
    assert cropi(*convert) == 0
    check_records(tmp_path / "t.jsonl")
    capsys.readouterr()
    assert cropi(*convert, "--id-key", "nothing") == 2
    assert "sample 0, metadata: has no 'nothing'" in capsys.readouterr().err
    (tmp_path / "7.pt").write_bytes(b"")
    assert cropi(*convert) == 2
    assert "7.pt is not a rollout dump of slime" in capsys.readouterr().err


def nemo_lines() -> list[dict[str, Any]]:
    """One rollout a line, every value in a list of one, padded to the step's longest."""
    made = []
    for number, (_, _, prompt, ids, reward) in enumerate(rows()):
        pad = [0] * (6 - len(prompt) - len(ids))
        made.append({
            "content": ["..."], "rewards": [reward], "input_lengths": [len(prompt) + len(ids)],
            "token_ids": [prompt + ids + pad], "token_loss_mask": [[0] * len(prompt) + [1] * len(ids) + pad],
            "sample_loss_mask": [1.0], "advantages": [[0.5] * 6], "prev_logprobs": [[0.0] * 6],
            "generation_logprobs": [[0.0] * len(prompt) + logprobs(ids) + pad], "idx": number,
        })  # fmt: skip
    return made


def test_nemo_rl_dumps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "train_data_step3.jsonl", nemo_lines())
    convert = ["convert", source, "--source", "nemo-rl", "--out", tmp_path / "t.jsonl", "--temperature", 0.7]
    assert cropi(*convert) == 0
    check_records(tmp_path / "t.jsonl")
    assert {group.policy for group in read(tmp_path / "t.jsonl")} == {"step 3"}
    columns = {name: [row[name][0] for row in nemo_lines()] for name in nemo_lines()[0] if name != "idx"}
    write_lines(source, [columns])
    assert cropi(*convert) == 0
    check_records(tmp_path / "t.jsonl")
    capsys.readouterr()
    columns["rewards"] = columns["rewards"][1:]
    write_lines(source, [columns])
    assert cropi(*convert) == 2
    assert (
        "'token_ids': should have one value for each of 3 rollouts, got 4 values" in capsys.readouterr().err
    )
    assert cropi(*convert, "--dataset", source) == 2
    assert "--dataset and --model are needed together" in capsys.readouterr().err


def test_rollouts_of_several_policies_need_logprobs() -> None:
    steps = [rollout for step in (1, 2) for rollout in rollouts_of_proto(Proto(), step)]
    assert [group.size for group in group_rollouts(steps)] == [2, 2]
    assert [group.size for group in group_rollouts(steps, steps="all")] == [4, 4]
    bare = [type(r)(**{**vars(r), "logprobs": None}) for r in steps]
    with pytest.raises(CropiError, match="rolled out at several steps"):
        list(group_rollouts(bare, steps="all"))
    with pytest.raises(CropiError, match="holds no rollout"):
        group_rollouts([])
