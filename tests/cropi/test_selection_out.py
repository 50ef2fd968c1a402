"""A selection in every form that it leaves in, each read back by what consumes it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.commands import json_lines
from support.made_data import make_records, save_policy, write_lines

from cropi.cli import main
from cropi.data.export import FORMATS, export
from cropi.data.readers import HashedIds, read
from cropi.data.trainer_rows import FILES
from cropi.errors import CropiError
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection
from cropi.ranking.selection_files import read_selection
from cropi.store.rows import RowInfo

RECORDS = [
    {
        **record,
        "answer": 7 if i % 2 else "7",
        "data_source": "sums",
        "level": i,
        "extra_info": {"split": "test"},
    }
    for i, record in enumerate(make_records(10))
]
IDS = [record["id"] for record in RECORDS]
META = {"metric": "cosine", "train": {"stage": "0", "model": {"weights": "aa"}}}


def scores(p_selected: list[float] | None = None) -> Scores:
    """The best prompts are the last ones."""
    rows = [RowInfo(name, pass_rate=0.5) for name in IDS]
    p = None if p_selected is None else np.array(p_selected)
    return Scores(rows, ["x", "y"], np.linspace(0, 1, 20).reshape(10, 2), META, p_selected=p)


def chosen() -> Selection:
    return scores().select(0.2)


def without(record: dict[str, Any]) -> dict[str, Any]:
    left = (
        "responses",
        "rewards",
        "response_ids",
        "logprobs",
        "prompt_ids",
        "truncated",
        "temperature",
        "policy",
    )
    return {key: value for key, value in record.items() if key not in left}


# ------------------------------------------------------------------------------------------------ data sets
def test_a_dataset_keeps_its_columns_features_and_order(tmp_path: Path) -> None:
    held = datasets.Dataset.from_list(
        [{"id": name, "kind": i % 2, "q": f"q{i}"} for i, name in enumerate(IDS)]
    )
    held = held.cast_column("kind", datasets.ClassLabel(names=["easy", "hard"])).shuffle(seed=1)
    got = chosen().to_dataset(held)
    assert got["id"][:] == IDS[:-3:-1] and got.features == held.features and got["q"][:] == ["q9", "q8"]
    held.save_to_disk(str(tmp_path / "saved"))
    assert chosen().to_dataset(tmp_path / "saved").features == held.features
    assert chosen().save(tmp_path / "out", rows=tmp_path / "saved") == 2
    assert chosen().save(tmp_path / "out", rows=held) == 2  # in place of the first
    assert datasets.load_from_disk(str(tmp_path / "out")).to_list() == got.to_list()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_dataset_may_be_a_list_of_prompts_or_a_frame(tmp_path: Path) -> None:
    rows = [{"id": name, "question": f"q{i}"} for i, name in enumerate(IDS)]
    want = [rows[9], rows[8]]
    frame = pytest.importorskip("pandas").DataFrame(rows)
    for held in (rows, tuple(rows), frame, pyarrow.Table.from_pylist(rows)):
        assert chosen().to_dataset(held).to_list() == want
        assert chosen().save(tmp_path / "p.jsonl", rows=held) == 2
        assert json_lines(tmp_path / "p.jsonl") == want
    other = [{"uid": row["id"], "question": row["question"]} for row in rows]
    assert chosen().to_dataset(other, id_key="uid").to_list() == [other[9], other[8]]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (3, "dataset: got int; give a datasets.Dataset"), ([], "dataset: the list holds no row; give"),
        ({"id": "a"}, "dataset: got dict; give"),
        (type("DataFrame", (), {"__module__": "polars.dataframe.frame", "to_arrow": None})(),
         r"got polars.DataFrame; give dataset\.to_arrow\(\)$"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"id": IDS})), "a DatasetDict of train: give one"),
        (datasets.Dataset.from_dict({"id": IDS}).to_iterable_dataset(), "got datasets.IterableDataset; give"),
        ([{"id": "a", "question": "q"}], "the list: 2 of 2 prompts have no row"),
        ([{"question": "q"}], r"name it with --id-key \(in Python id_key=\)"),
    ],
)  # fmt: skip
def test_rows_that_are_no_dataset_are_named(held: Any, words: str) -> None:
    with pytest.raises(CropiError, match=words):
        chosen().to_dataset(held)


@pytest.mark.parametrize("form", ["conversation", "apart", "pair", "prompt"])
def test_rows_without_ids_are_found_by_what_their_ids_are_hashes_of(form: str) -> None:
    """Demonstrations and prompts: the ids that their records got, in a list, a data set and a frame."""
    said = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    rows: list[dict[str, Any]] = {
        "conversation": [
            {"messages": [{**said[0], "content": f"{i}+1="}, said[1]], "of": i} for i in range(6)
        ],
        "apart": [
            {"messages": [*said, {**said[0], "content": f"{i}+1="}], "response": "2", "of": i}
            for i in range(6)
        ],
        "pair": [{"prompt": f"{i}+1=", "completion": str(i), "of": i} for i in range(6)],
        "prompt": [{"prompt": f"{i}+1=", "answer": str(i), "of": i} for i in range(6)],
    }[form]
    records = [row | {"response": "3", "reward": 1.0} for row in rows] if form == "prompt" else rows
    with pytest.warns(HashedIds):
        names = [group.id for group in read(records, rewards=None)]
    held = Scores([RowInfo(name) for name in names], ["valid"], np.arange(6.0)[:, None], "cosine")
    best = Selection([4, 2], [4, 2], np.zeros(6), "rrf", held)
    for given in (rows, datasets.Dataset.from_list(rows), pyarrow.Table.from_pylist(rows).to_pandas()):
        assert best.to_dataset(given)["of"] == [4, 2]
    with pytest.raises(CropiError, match="1 of 2 prompts have no row.*hashes of their prompts"):
        best.to_dataset(rows[:4])
    with pytest.raises(CropiError, match="2 of 2 prompts have no row"):  # nothing that a hash is of
        best.to_dataset([{"of": 4}])
    with pytest.raises(CropiError, match="no stable prompt id"):  # two rows of one prompt
        best.to_dataset([*rows, rows[4]])


def test_rows_without_ids_are_found_in_tables_that_fill_up_their_messages() -> None:
    """A table has every key of any message in all of them; beside it a row that is no record, and an answer of one."""
    said = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    rows: list[dict[str, Any]] = [
        {"messages": [{**said[0], "content": f"{i}+1="}, said[1]], "of": i} for i in range(3)
    ]
    rows[1]["messages"][0]["name"] = "ann"
    rows[0]["answer"] = "1"
    with pytest.warns(HashedIds):
        names = [group.id for group in read(rows, rewards=None)]
    held = Scores([RowInfo(name) for name in names], ["valid"], np.arange(3.0)[:, None], "cosine")
    best = Selection([2, 0, 1], [2, 0, 1], np.zeros(3), "rrf", held)
    rows.append({"messages": said[1:], "of": 3})
    for given in (rows, datasets.Dataset.from_list(rows), pyarrow.Table.from_pylist(rows).to_pandas()):
        assert best.to_dataset(given)["of"] == [2, 0, 1]


def test_a_folder_that_is_no_data_set_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    with pytest.raises(CropiError, match="is there already and is not a saved data set"):
        chosen().save(tmp_path / "mine", rows=make_records(10))
    assert (tmp_path / "mine/thesis.txt").read_text() == "x"


def test_rows_of_records_are_the_prompts_without_their_rollouts(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.jsonl", make_records(10))
    want = [without(make_records(10)[i]) for i in (9, 8)]
    assert chosen().to_dataset(source).to_list() == want
    assert chosen().to_dataset(make_records(10)).to_list() == want
    chosen().save(tmp_path / "p.parquet", rows=source)
    assert pyarrow.parquet.read_table(tmp_path / "p.parquet").to_pylist() == want
    # a table of rollouts is records, too, and not a dataset whose rollouts would be handed on
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(make_records(10)), tmp_path / "t.parquet")
    assert set(chosen().to_dataset(tmp_path / "t.parquet").column_names) == set(want[0])


def test_without_rows_the_selection_itself_is_written(tmp_path: Path) -> None:
    for name in ("s.jsonl", "s.parquet", "folder"):
        assert chosen().save(tmp_path / name) == 2
    rows = json_lines(tmp_path / "s.jsonl")
    assert [row["id"] for row in rows] == IDS[:-3:-1] == read_selection(tmp_path / "s.jsonl")
    assert rows[0] == {"id": IDS[9], "rank": 1, "value": 2.0, "score[x]": 18 / 19, "score[y]": 1.0}
    assert pyarrow.parquet.read_table(tmp_path / "s.parquet").to_pylist() == rows
    assert datasets.load_from_disk(str(tmp_path / "folder")).to_list() == rows
    chosen().save(tmp_path / "s.txt")
    assert (tmp_path / "s.txt").read_text().splitlines() == IDS[:-3:-1]
    with pytest.raises(CropiError, match="format must be one of .*, got None; or let the path end in"):
        chosen().save(tmp_path / "s.csv")
    # Options that nothing would read.
    for name, given, said in (
        ("n.txt", {"rows": RECORDS}, "format ids writes ids alone; leave rows out"),
        ("n.jsonl", {"id_key": "id"}, r"id_key 'id' names a column of a dataset.*\(in Python rows="),
        (
            "n.parquet",
            {"data_source": "x"},
            "data_source 'x' is for format verl, not for parquet; leave it out",
        ),
    ):
        with pytest.raises(CropiError, match=said):
            chosen().save(tmp_path / name, **given)
    with pytest.raises(CropiError, match="id_key 'id' names a column of a dataset"):
        chosen().to_dataset(id_key="id")


# -------------------------------------------------------------------------------------------------- weights
def test_weights_are_the_chance_to_be_chosen_in_the_order_of_the_dataset(tmp_path: Path) -> None:
    p = [0.0, 0.25, 0, 0, 0.25, 0, 0, 0, 0.5, 1.0]
    held = datasets.Dataset.from_list([{"id": name} for name in [*IDS[::-1], "another"]])
    one = scores(p).select(0.2)
    assert one.save(tmp_path / "w.json", "weights", rows=held) == 11
    assert json.loads((tmp_path / "w.json").read_text()) == [*p[::-1], 0.0]
    with pytest.raises(CropiError, match="the scores hold no p_selected .* --draws 200"):
        chosen().save(tmp_path / "w.json", "weights", rows=held)
    with pytest.raises(CropiError, match="is of choices of 2 prompts, and this selection has 3"):
        _ = scores(p).select(0.3).weights


# -------------------------------------------------------------------------------------------------- trainers
def test_verl_reads_the_columns_that_its_dataset_class_asks_for(tmp_path: Path) -> None:
    export(tmp_path / "v.parquet", [IDS[3], IDS[0]], format="verl", trajectories=RECORDS)
    rows = list(datasets.load_dataset("parquet", data_files=str(tmp_path / "v.parquet"), split="train",
                                      cache_dir=str(tmp_path / "cache")))  # as verl loads it  # fmt: skip
    assert rows[0]["prompt"] == [{"role": "user", "content": RECORDS[3]["prompt"]}]
    assert (
        rows[0]["reward_model"] == {"style": "rule", "ground_truth": "7"} and rows[0]["data_source"] == "sums"
    )
    assert rows[0]["extra_info"] == {"split": "test", "level": 3, "index": IDS[3]}
    assert rows[0]["ability"] == RECORDS[3]["task"]


def test_slime_and_openrlhf_rows(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    records = [{**RECORDS[0], "prompt": messages, "tools": [{"name": "f"}]}, *RECORDS[1:]]
    export(tmp_path / "s.jsonl", [IDS[1], IDS[0]], format="slime", trajectories=records)
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_json(tmp_path / "s.jsonl", lines=True, dtype={"label": str})  # as slime reads it
    assert frame["label"].tolist() == ["7", "7"] and frame["prompt"][1] == messages
    assert frame["metadata"][0] == {"id": IDS[1], "level": 1, "extra_info": {"split": "test"}}
    assert frame["tools"][1] == [{"name": "f"}]
    export(tmp_path / "o.jsonl", [IDS[1], IDS[0]], format="openrlhf", trajectories=records)
    rows = list(datasets.load_dataset("json", data_files=str(tmp_path / "o.jsonl"), split="train",
                                      cache_dir=str(tmp_path / "cache")))  # as OpenRLHF loads it  # fmt: skip
    assert rows[1] == {"input": messages, "label": "7", "datasource": "sums", "id": IDS[0]}


@pytest.mark.parametrize("trainer", list(FILES))
def test_what_a_trainer_needs_and_a_record_lacks_is_named(tmp_path: Path, trainer: str) -> None:
    def refused(words: str, **change: Any) -> None:
        records = [{k: v for k, v in {**record, **change}.items() if v is not None} for record in RECORDS]
        with pytest.raises(CropiError, match=words):
            export(tmp_path / "out", IDS[:1], format=trainer, trajectories=records)
        assert not (tmp_path / "out").exists()

    refused("has no 'answer'.*--columns answer=NAME", answer=None)
    refused("has prompt_ids but no text", prompt=None, prompt_ids=[5, 6])
    if trainer == "verl":
        refused("neither 'data_source' nor 'task'.*--data-source NAME", data_source=None, task=None)
    with pytest.raises(CropiError, match="makes rows from the records.*leave --dataset out"):
        export(tmp_path / "out", IDS[:1], format=trainer, dataset=tmp_path / "x.parquet")


# ------------------------------------------------------------------------------------------------------- hub
def test_a_push_sends_the_chosen_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    def push(self: Any, name: str, **options: Any) -> Any:  # what datasets.Dataset.push_to_hub is called with
        sent.update(rows=self.to_list(), name=name, options=options)
        return SimpleNamespace(repo_url=f"https://hub/datasets/{name}")

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", push)
    with pytest.raises(CropiError, match="nobody is logged in"):
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        chosen().push_to_hub("me/chosen", RECORDS)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    with pytest.raises(CropiError, match="give owner/name"):
        chosen().push_to_hub("a b/c", make_records(10))
    where = chosen().push_to_hub("me/chosen", make_records(10), private=True, split="train")
    assert where == "https://hub/datasets/me/chosen"
    assert sent["name"] == "me/chosen" and sent["options"] == {"private": True, "split": "train"}
    assert [row["id"] for row in sent["rows"]] == IDS[:-3:-1] and "responses" not in sent["rows"][0]

    def fail(self: Any, name: str, **options: Any) -> Any:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(datasets.Dataset, "push_to_hub", fail)
    with pytest.raises(CropiError, match="403 Forbidden; log in with `hf auth login`"):
        chosen().push_to_hub("me/chosen", make_records(10))


# ------------------------------------------------------------------------------------------------------- run
@pytest.mark.long
def test_run_exports_from_the_command_line_and_from_a_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_policy(tmp_path / "model")
    write_lines(tmp_path / "train.jsonl", [{**r, "answer": "1"} for r in make_records(20)])
    write_lines(tmp_path / "valid.jsonl", make_records(8, seed=1))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {tmp_path}/model\ntrain: {tmp_path}/train.jsonl\nvalid: {tmp_path}/valid.jsonl\nout: {tmp_path}/run\n"
        f"sketch: {{dim: 512}}\nprogress: false\nreport: false\n"
        f"export: {{export: {tmp_path}/out.parquet, format: verl, data-source: mine}}\n"
    )
    assert main(["run", "--config", str(config)]) == 0
    ids = read_selection(tmp_path / "run/selected.jsonl")
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["extra_info"]["index"] for row in rows] == ids and rows[0]["data_source"] == "mine"
    assert "export        2 prompts as verl" in capsys.readouterr().out
    write_lines(
        tmp_path / "train.jsonl",
        make_records(20) + [{**make_records(1, seed=5)[0], "id": "z", "answer": None}],
    )
    capsys.readouterr()
    assert main(["run", "--config", str(config), "--out", str(tmp_path / "other")]) == 2  # before any work
    assert "has no 'answer'" in capsys.readouterr().err and not (tmp_path / "other").exists()
    assert main(["run", "--config", str(config), "--export", str(tmp_path / "train.jsonl")]) == 2
    assert "is the file that --train reads" in capsys.readouterr().err


def test_every_format_is_a_choice_of_the_command_line() -> None:
    from cropi.cli import options

    assert options.FORMATS == FORMATS
