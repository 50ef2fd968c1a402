"""Trajectory files that change between the check and the pass that sketches them: named, and what is right is kept."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_model, make_records, make_tokenizer, write_lines

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
