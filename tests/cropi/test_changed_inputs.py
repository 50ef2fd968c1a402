"""Trajectory files that change between the check and the pass that sketches them: named, and what is right is kept."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_model, make_records, make_tokenizer, write_lines

from cropi.data.places import kept_places
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import scan_groups, sketch
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


def written(path: Path, records: list[dict[str, Any]], form: str) -> Path:
    if form == "parquet":
        parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    elif form == "gz":
        path.write_bytes(gzip.compress(b"".join(json.dumps(record).encode() + b"\n" for record in records)))
    else:
        write_lines(path, records)
    return path


@pytest.mark.parametrize("form", ["jsonl", "gz", "parquet"])
@pytest.mark.parametrize(
    ("change", "message", "kept"),
    [
        (
            lambda records: [*records[:10], records[10] | {"rewards": [0.0, 1.0, 1.0, 0.5]}, *records[11:]],
            "line 11 is another",
            10,
        ),
        (lambda records: [*records, records[0] | {"id": "late"}], "it has grown", 20),
        (lambda records: records[:15], "it is shorter", 15),
    ],
    ids=["rewritten", "appended", "truncated"],
)  # fmt: skip
def test_a_file_that_changes_ends_the_job(
    tmp_path: Path, form: str, change: Any, message: str, kept: int
) -> None:
    records, policy = make_records(20), Policy(make_model(), make_tokenizer())
    path = written(tmp_path / f"t.{form}", records, form)
    job = SketchJob([path], tmp_path / "s", SketchSpec(dim=512), shard_rows=1, tokens_per_batch=60)
    scan = scan_groups(policy, job)
    written(path, change(records), form)
    if form == "parquet":  # its bytes are compared before its rows are read
        message, kept = "was changed while this job used it", 0
    with pytest.raises(
        CropiError, match=f"t.{form} was changed.*{message}" if form != "parquet" else message
    ):
        sketch(policy, job, scan=scan, progress=False)
    store = SketchStore.open(tmp_path / "s")
    assert len(store) <= kept and {row.id for row in store.rows()} <= {
        record["id"] for record in records[:kept]
    }
    # The file as it was: the job goes on, and is the one that nobody disturbed.
    written(path, records, form)
    if form != "parquet":  # whose bytes are another file's at every writing
        sketch(policy, job, progress=False)
        whole = sketch(
            policy, SketchJob([path], None, SketchSpec(dim=512), tokens_per_batch=60), progress=False
        ).store
        assert whole is not None
        assert [(r.id, r.norm) for r in SketchStore.open(tmp_path / "s").rows()] == [
            (r.id, r.norm) for r in whole.rows()
        ]


@pytest.mark.parametrize("form", ["jsonl", "gz", "parquet"])
def test_a_share_of_a_job_notices_it_too(tmp_path: Path, form: str) -> None:
    records, policy = make_records(20), Policy(make_model(), make_tokenizer())
    path = written(tmp_path / f"t.{form}", records, form)

    def job(out: str) -> SketchJob:
        return SketchJob(
            [path], tmp_path / out, SketchSpec(dim=512), shard_rows=1, tokens_per_batch=60, shard=(1, 2)
        )

    sketch(policy, job("whole"), progress=False)
    scan = scan_groups(policy, job("s"))
    written(path, records[::-1], form)
    with pytest.raises(CropiError, match=f"t.{form} was changed while this job used it"):
        sketch(policy, job("s"), scan=scan, progress=False)
    assert not SketchStore.open(tmp_path / "s").rows()
    written(path, records, form)
    if form != "parquet":  # whose bytes are another file's at every writing
        sketch(policy, job("s"), progress=False)
        assert SketchStore.open(tmp_path / "s").rows() == SketchStore.open(tmp_path / "whole").rows()


def test_records_that_are_read_by_their_places_are_of_the_prompts_that_were_there(tmp_path: Path) -> None:
    """As ranks read them, and stages within a budget: the ids alone are compared."""
    records = make_records(6)
    path = write_lines(tmp_path / "t.jsonl", records)
    groups = read(path)
    ids = [group.id for group in groups.each()]
    places = kept_places(groups.sources, groups.columns)
    assert places is not None and [group.id for group in groups.at(places, ids[3:])] == ids[3:]
    write_lines(path, records[::-1])
    with pytest.raises(CropiError, match="t.jsonl was changed while it was used: '.*' is elsewhere"):
        list(groups.at(places, ids[3:]))


def test_places_of_files_that_are_made_anew_do_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cropi.data.places._MOST_PROMPTS", 10)
    files = [read(write_lines(tmp_path / f"{i}.jsonl", make_records(6))) for i in range(3)]
    large = read(write_lines(tmp_path / "large.jsonl", make_records(12)))
    for groups in files:
        assert len(list(groups)) == 6
    assert [kept_places(groups.sources, {}) is not None for groups in files] == [False, False, True]
    list(large)
    assert kept_places(large.sources, {}) is not None and kept_places(files[2].sources, {}) is None
