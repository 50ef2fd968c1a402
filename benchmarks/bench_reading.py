"""What reading trajectories costs, by pytest-benchmark: 19 MB of records with token ids and log-probs, in every format.

    pytest benchmarks/bench_reading.py --benchmark-only

``json`` is a reader in plain Python: :func:`json.loads` of every line, with no check at all. ``scan`` is the
first pass of every job (parse, check, count, SHA-256); ``read`` a later one.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cropi.data.readers import read
from cropi.data.scan import scan

PROMPTS, RESPONSES, TOKENS = 75, 8, 1000


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    rng, folder = random.Random(0), tmp_path_factory.mktemp("reading")
    rows = []
    for i in range(PROMPTS):
        ids = [[rng.randrange(150_000) for _ in range(TOKENS)] for _ in range(RESPONSES)]
        rows.append({
            "id": f"p{i}", "prompt": "What is 2+2? " * 20, "prompt_ids": [rng.randrange(150_000) for _ in range(80)],
            "responses": ["a b c " * 600] * RESPONSES, "response_ids": ids, "answer": "4", "task": "t",
            "logprobs": [[-2 * rng.random() for _ in part] for part in ids],
            "rewards": [float(rng.random() < 0.5) for _ in range(RESPONSES)],
        })  # fmt: skip
    lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    made = {name: folder / f"records.{name}" for name in ("jsonl", "jsonl.gz", "json", "parquet")}
    made["jsonl"].write_bytes(lines)
    made["jsonl.gz"].write_bytes(gzip.compress(lines, 1))
    made["json"].write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), made["parquet"])
    return made


def through(source: Any) -> None:
    deque(source, maxlen=0)


def json_alone(path: Path) -> None:
    with open(path, "rb") as file:
        through(map(json.loads, file))


@pytest.mark.parametrize("name", ["json", "read", "scan", "read jsonl.gz", "read json", "read parquet"])
def test_reading(benchmark: Any, files: dict[str, Path], name: str) -> None:
    kind, _, form = name.partition(" ")
    path = files[form or "jsonl"]
    work: dict[str, Callable[[], Any]] = {
        "json": lambda: json_alone(path), "read": lambda: through(read(path)), "scan": lambda: scan([path]),
    }  # fmt: skip
    benchmark.group = "reading"
    benchmark.extra_info["megabytes"] = files["jsonl"].stat().st_size / 1e6
    assert sum(1 for _ in read(path)) == PROMPTS
    benchmark.pedantic(work[kind], rounds=5, warmup_rounds=1)
