"""Every format of trajectory files: the same groups and the same sketches, and what is said of files that are none."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from data.make_formats import HERE, long_form, records
from support.made_data import make_model, make_records, save_policy, write_lines
from support.stores import sketches_of

from cropi.cli import main
from cropi.data import hub
from cropi.data.readers import read
from cropi.data.scan import scan
from cropi.errors import CropiError
from cropi.files import meant
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi_kernels import SketchSpec

datasets = pytest.importorskip("datasets")

COLUMNS = "prompt=question,rewards=scores,id=extra_info.index"
FILES = [
    path.name for path in sorted(HERE.iterdir()) if path.suffix != ".py" and not path.name.startswith("__")
]


def made(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [group.to_record() for group in read(source, **options)]


def sketched(policy: Policy, source: Any, **options: Any) -> dict[str, torch.Tensor]:
    job = SketchJob(source, None, spec=SketchSpec(dim=512), **options)
    summary = sketch(policy, job, progress=False)
    return sketches_of(summary.store)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(make_model())


@pytest.fixture(scope="module")
def expected(policy: Policy) -> dict[str, torch.Tensor]:
    return sketched(policy, records())


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_groups_and_the_same_sketches(
    name: str, policy: Policy, expected: dict[str, torch.Tensor]
) -> None:
    options = {"columns": COLUMNS} if name == "columns.jsonl" else {}
    got = made(HERE / name, **options)
    for record in got:
        record.pop("extra_info", None)
    assert got == records()
    assert {group.file for group in read(HERE / name, **options)} == {str(HERE / name)}, "of --per file"
    found = sketched(policy, [HERE / name], **options)
    assert found.keys() == expected.keys() == {record["id"] for record in records()}
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_saved_dataset_of_several_files_is_one(tmp_path: Path) -> None:
    datasets.Dataset.from_list(records()).save_to_disk(tmp_path / "d", num_shards=3)
    assert [group.where for group in read(tmp_path / "d")] == [f"{tmp_path / 'd'}, row {i}" for i in range(6)]
    assert {group.file for group in read(tmp_path / "d")} == {str(tmp_path / "d")}


def test_the_committed_files_are_what_the_script_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data import make_formats

    monkeypatch.setattr(make_formats, "HERE", tmp_path)
    make_formats.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    for name in FILES:
        if name.endswith((".jsonl", ".json")):  # the others hold versions of what wrote them
            assert (tmp_path / name).read_bytes() == (HERE / name).read_bytes(), name


def test_what_is_in_memory_is_read_as_files_are(policy: Policy, expected: dict[str, torch.Tensor]) -> None:
    rows = records()
    table = pyarrow.Table.from_pylist(rows)
    dataset = datasets.Dataset.from_list(rows)
    sources = {
        "list": rows, "tuple": tuple(rows), "dataset": dataset, "table": table, "groups": list(read(rows)),
        "long": long_form(), "long dataset": datasets.Dataset.from_list(long_form()), "frame": table.to_pandas(),
        "shuffled back": dataset.select([5, 4, 3, 2, 1, 0]).select([5, 4, 3, 2, 1, 0]),
        "stream": dataset.to_iterable_dataset(), "PromptGroups": read(rows),
    }  # fmt: skip
    for name, source in sources.items():
        assert made(source) == rows, name
        assert made(source) == rows, f"{name}, a second time"
    assert all(torch.equal(sketched(policy, dataset)[key], expected[key]) for key in expected)
    assert made([datasets.Dataset.from_list(rows[:2]), datasets.Dataset.from_list(rows[2:])]) == rows
    assert rows == records(), "what was given is not changed"


def test_arrays_tensors_and_tuples_are_lists() -> None:
    record = records()[0]
    arrays = record | {
        "rewards": np.array(record["rewards"], dtype=np.float32), "prompt_ids": torch.tensor(record["prompt_ids"]),
        "response_ids": [np.array(ids) for ids in record["response_ids"]], "responses": tuple(record["responses"]),
        "logprobs": [torch.tensor(part, dtype=torch.float64) for part in record["logprobs"]],
        "loss_mask": tuple(tuple(mask) for mask in record["loss_mask"]), "temperature": np.float32(0.5),
        "truncated": np.array(record["truncated"]), "level": np.int64(0),
    }  # fmt: skip
    assert made([arrays]) == [record]
    scalars = record | {"rewards": [np.float32(1), torch.tensor(0.0), 0.5]}
    assert made([scalars]) == [record]


def test_records_of_tables_are_written_as_json(tmp_path: Path) -> None:
    rows = [record | {"day": datetime.date(2026, 1, 31), "score": float("nan")} for record in records()]
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    (group,) = read(path).take(["p3"])
    assert json.loads(group.raw) == records()[3] | {"day": "2026-01-31", "score": None}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([records()[0] | {"png": b"\x89"}]), path)
    with pytest.raises(CropiError, match="'png' that JSON cannot hold"):
        _ = next(iter(read(path))).raw


def test_fingerprints_do_not_depend_on_packing_and_follow_content(tmp_path: Path) -> None:
    wanted = scan([HERE / "records.jsonl"]).fingerprint
    for name in (
        "records.jsonl.gz",
        "parts.jsonl.gz",
        "records.jsonl.zst",
        "records.jsonl.bz2",
        "records.jsonl.xz",
    ):
        assert scan([HERE / name]).fingerprint == wanted, name
    rows = records()
    other = [*rows[:-1], rows[-1] | {"level": 7}]
    for form in (list, datasets.Dataset.from_list, pyarrow.Table.from_pylist):
        assert scan(form(rows)).fingerprint == scan(form(rows)).fingerprint != scan(form(other)).fingerprint
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(other), tmp_path / "o.parquet")
    assert scan([tmp_path / "o.parquet"]).fingerprint != scan([HERE / "records.parquet"]).fingerprint


# A process reads its standard input once. These are forks, since to import what reads takes longer than they do.
GIVEN = """
import os, sys
import torch
import cropi.data.scan
from cropi.cli import main
for path in sys.argv[1:]:
    if os.fork() == 0:
        os.dup2(os.open(path, os.O_RDONLY), 0)
        sys.exit(main(["info", "-"]))
    assert os.wait()[1] == 0
"""


@pytest.mark.long
def test_standard_input_is_read_like_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(HERE / name) for name in ("records.jsonl", "records.jsonl.gz", "records.parquet")]
    done = subprocess.run([sys.executable, "-c", GIVEN, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = ""
    for path in paths:
        assert main(["info", path]) == 0
        shown += capsys.readouterr().out.replace(path, "-")
    assert done.stdout == shown and shown.count("6 prompts, 18 responses") == 3
    command = [sys.executable, "-W", "default", "-m", "cropi", "info", "-"]
    done = subprocess.run(command, input=(HERE / "records.jsonl").read_bytes(), capture_output=True)
    assert b"6 prompts" in done.stdout and b"unclosed" not in done.stderr


@pytest.mark.parametrize("name", ["saved", "records.parquet", "long.jsonl"])
def test_info_counts_every_format(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(HERE / name)]) == 0
    assert "6 prompts, 18 responses" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- refusals
def other_formats(folder: Path) -> dict[str, str]:
    """Files of other formats, with the words that name them."""
    torch.save({"a": 1}, folder / "t.pt")
    safetensors.torch.save_file({"a": torch.zeros(2)}, folder / "m.safetensors")
    np.save(folder / "a.npy", np.zeros(3))
    with zipfile.ZipFile(folder / "z.zip", "w") as file:
        file.writestr("records.jsonl", "{}")
    shutil.make_archive(str(folder / "t"), "tar", HERE / "saved")
    for name, data in {
        "p.pkl": pickle.dumps([1]),
        "i.png": b"\x89PNG\r\n\x1a\n....",
        "i.jpg": b"\xff\xd8\xff\xe0....",
        "s.db": b"SQLite format 3\x00",
        "u.jsonl": '{"id": 1}'.encode("utf-16"),
        "little.jsonl": '{"id": 1}'.encode("utf-16-le"),
        "big.json": '[{"id": 1}]'.encode("utf-16-be"),
        "w.jsonl": b"<!DOCTYPE html><html>",
        "l.jsonl": b"version https://git-lfs.github.com/spec/v1\noid sha256:1",
        "g.gguf": b"GGUF\x03\x00\x00\x00",
        "b.bin": b"abc\x00\x01",
        "d.pdf": b"%PDF-1.7",
        "r.csv": b"id,prompt\np0,1+1=\n",
    }.items():
        (folder / name).write_bytes(data)  # fmt: skip
    return {
        "t.pt": "zip archive, as torch.save", "m.safetensors": "safetensors file", "a.npy": "a numpy array",
        "z.zip": "a zip archive", "t.tar": "a tar archive", "p.pkl": "a pickle", "i.png": "a PNG picture",
        "i.jpg": "a JPEG picture", "s.db": "SQLite", "u.jsonl": "text in UTF-16", "little.jsonl": "text in UTF-16",
        "big.json": "text in UTF-16", "w.jsonl": "a web page",
        "l.jsonl": "a pointer of Git LFS", "g.gguf": "model weights", "b.bin": "a binary file (it begins with 61 62",
        "d.pdf": "a PDF document", "r.csv": "is a table of text (.csv or .tsv); write it as parquet",
    }  # fmt: skip


@pytest.mark.parametrize("name, score", [("a.csv", "reward"), ("b.tsv", "score"), ("c.csv", "")])
def test_what_the_message_of_a_text_table_says_works(
    name: str, score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a table of prompts, and of one that is parted by tabs."""
    monkeypatch.chdir(tmp_path)
    rows = [["id", "prompt", "response", score], ["01", "7", "12", "1"], ["01", "7", "13", "0"]]
    parted = "\t" if name.endswith("tsv") else ","
    (tmp_path / name).write_text("".join(parted.join(row[: 4 if score else 2]) + "\n" for row in rows))
    with pytest.raises(CropiError) as caught:
        list(read(name))
    eval(
        "pandas" + str(caught.value).partition("for example by pandas")[2],
        {"pandas": pytest.importorskip("pandas")},
    )
    made = Path(name).with_suffix(".parquet")
    if score:
        (group,) = read(made, columns={"reward": score})
        assert (group.id, group.prompt, group.responses, group.rewards) == (
            "01",
            "7",
            ["12", "13"],
            [1.0, 0.0],
        )
    else:
        assert pyarrow.parquet.read_table(made).to_pylist() == [{"id": "01", "prompt": "7"}] * 2


def test_other_formats_are_named_also_with_skip_bad_and_inside_gzip(tmp_path: Path) -> None:
    for name, words in other_formats(tmp_path).items():
        packed = tmp_path / f"{name}.packed"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        for path in (tmp_path / name, packed):
            with pytest.raises(CropiError) as caught:
                list(read(path, skip_bad=True))
            assert words in str(caught.value) and str(path) in str(caught.value), name


def test_a_link_to_nothing_is_called_so(tmp_path: Path) -> None:
    """The misspelt name that is nearest to it is its own. A link to a folder is none, and brackets need no pattern."""
    (tmp_path / "a.jsonl").symlink_to("b.jsonl")
    with pytest.raises(CropiError, match="a.jsonl: .* it is a link to 'b.jsonl', which is not there"):
        list(read(tmp_path / "a.jsonl"))
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    with pytest.raises(
        CropiError, match="link to 'b.jsonl', and links from there lead round in a circle; give"
    ):
        list(read(tmp_path / "a.jsonl"))
    # What two names share by their endings makes them no nearer.
    (tmp_path / "train.jsonl").touch()
    assert meant(tmp_path / "valid.jsonl") == meant(tmp_path / "no.jsonl") == ""
    for near in ("trian.jsonl", "train.json", "train", "trai.jsnl"):
        assert meant(tmp_path / near) == "did you mean 'train.jsonl'? "
    (tmp_path / "run[1].jsonl").mkdir()
    (tmp_path / "link").symlink_to("run[1].jsonl")
    assert meant(tmp_path / "link") == "it is a folder; "
    os.mkfifo(tmp_path / "pipe")
    assert meant(tmp_path / "pipe") == "it is a pipe or a device; "
    with pytest.raises(CropiError, match=r"a pattern is .* did you mean 'run\[1\].jsonl'\? give"):
        list(read(tmp_path / "run[1].json"))


def test_folders_of_datasets_that_cannot_be_read(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records())}).save_to_disk(tmp_path / "d")
    with pytest.raises(
        CropiError, match="holds the splits train; give the folder of one, for example .*d/train"
    ):
        list(read(tmp_path / "d"))
    assert made(tmp_path / "d/train") == records()
    next((tmp_path / "d/train").glob("*.arrow")).unlink()
    with pytest.raises(CropiError, match="its file data-00000-of-00001.arrow is missing"):
        list(read(tmp_path / "d/train"))
    with pytest.raises(CropiError, match="splits|dictionary of data sets"):
        read(datasets.DatasetDict({"train": datasets.Dataset.from_list(records())}))


Polars = type("DataFrame", (), {"__module__": "polars.dataframe.frame", "to_arrow": None})


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([], "is empty; give at least one record"),
        ({"id": 1}, "is one dictionary; give a list of records"),
        (7, "must be a path, .*, a pyarrow table or a pandas frame, got int$"),
        (Polars(), r"got polars.DataFrame; give records\.to_arrow\(\)$"),
        ([1, 2], r"records\[0\]: a record is a dictionary"),
        ([{"id": 1}, "t.jsonl"], "paths and records are mixed"),
        ((row for row in records()), "is a generator, which can be read once"),
        ("none.jsonl", "there is no such file"),
        ("parts/*.jsonl", "a pattern is for the shell, which replaces it outside of quotes"),
        ("x" * 5000, "there is no such file"),
    ],
)
def test_sources_that_are_none(source: Any, words: str) -> None:
    with pytest.raises(CropiError, match=words) as caught:
        list(read(source))
    assert len(str(caught.value)) < 2000


def test_a_rollout_that_is_not_finished_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.part").touch()
    with pytest.raises(CropiError, match="only train.jsonl.part, which is not finished; run the command"):
        list(read(tmp_path / "train.jsonl"))


# ----------------------------------------------------------------------------------------------------- hub
def test_hub_names_are_told_from_paths() -> None:
    for name in (
        "openai/gsm8k",
        "hf://openai/gsm8k",
        "a/b@main?split=train",
        "hf://datasets/a/b/train.parquet",
    ):
        assert hub.is_hub_name(name), name
    for name in (
        "data/train.jsonl",
        "train.jsonl",
        "/data/train",
        "./a/b",
        "a/b/c",
        "data/t.jsonl.gz",
        Path("a/b"),
    ):
        assert not hub.is_hub_name(name), name


def test_a_data_set_of_the_hub_is_loaded_by_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    splits = {
        "train": datasets.Dataset.from_list(records()),
        "test": datasets.Dataset.from_list(records()[:2]),
    }

    def load(name: str, config: str | None, *, split: str | None, revision: str | None) -> Any:
        asked.append((name, config, split, revision))
        return splits[split] if split else datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert made("hf://datasets/me/rollouts@v1?split=test&config=main") == records()[:2]
    assert made("me/rollouts?split=train") == records()
    assert asked == [("me/rollouts", "main", "test", "v1"), ("me/rollouts", None, "train", None)]
    with pytest.raises(CropiError, match=r"has the splits train, test; name one: me/rollouts\?split=train"):
        made("me/rollouts")
    with pytest.raises(CropiError, match="a data set of the hub is named as owner/name"):
        made("hf://rollouts")
    splits.clear()
    with pytest.raises(CropiError, match="me/rollouts has no splits, so no rows"):
        made("me/rollouts")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: str(HERE / "records.parquet"))
    assert made("hf://datasets/me/rollouts/data/train.parquet") == records()


def test_without_a_network_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*words: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\n" * 100)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        CropiError, match="cannot be loaded from the hub .ConnectionError: Couldn't reach"
    ) as caught:
        made("me/rollouts")
    assert "the network" in str(caught.value) and len(str(caught.value)) < 1000


def test_a_path_that_is_not_there_is_told_from_a_data_set_without_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        CropiError, match=r"^me/rollouts: there is no such file here; .*: pip install datasets$"
    ):
        made("me/rollouts")
    with pytest.raises(ModuleNotFoundError, match=r"^the package 'datasets' .*: pip install datasets$"):
        made("hf://datasets/me/rollouts")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_a_run_on_tables_with_other_columns_selects_what_a_run_on_records_selects(tmp_path: Path) -> None:
    save_policy(tmp_path / "model")
    columns = {"prompt": "q", "responses": "outs", "rewards": "score"}
    for name, rows in (("train", make_records(12)), ("valid", make_records(6, seed=1))):
        write_lines(tmp_path / f"{name}.jsonl", rows)
        other = [
            {columns.get(k, k): v for k, v in row.items() if k != "id"} | {"at": {"id": row["id"]}}
            for row in rows
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(other), tmp_path / f"{name}.parquet")
    named = ",".join(f"{name}={column}" for name, column in columns.items()) + ",id=at.id"
    for suffix, more in (("jsonl", []), ("parquet", ["--columns", named])):
        files = ["--train", tmp_path / f"train.{suffix}", "--valid", tmp_path / f"valid.{suffix}"]
        words = [
            "run",
            "--model",
            tmp_path / "model",
            *files,
            "--out",
            tmp_path / suffix,
            "--dim",
            512,
            "--no-progress",
        ]
        assert main([str(word) for word in [*words, *more]]) == 0
    assert (tmp_path / "jsonl/selected.jsonl").read_bytes() == (
        tmp_path / "parquet/selected.jsonl"
    ).read_bytes()
