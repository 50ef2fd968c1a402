"""Makes the files of this folder: the same few records in every format that is read.

Run it as ``python tests/data/make_formats.py`` after a change, and commit what it writes.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = {"responses": "completions", "loss_mask": "response_mask", "response_ids": "completion_ids",
         "prompt_ids": "prompt_token_ids"}  # fmt: skip
RESPONSE = ("response_ids", "logprobs", "loss_mask", "truncated")


def records() -> list[dict[str, Any]]:
    """Prompts of three responses with token ids, log-probs and masks; text holds what is hard to store."""
    rng, made = random.Random(0), []
    for i in range(6):
        ids = [[rng.randint(2, 96) for _ in range(rng.randint(3, 6))] for _ in range(3)]
        made.append({
            "id": f"p{i}", "prompt": f"{i} + {i + 1} = ? \u2028 \u00e9 \U0001f600", "answer": str(2 * i + 1),
            "responses": ["a", "b\nc", "d \u0085"], "rewards": [1.0, 0.0, 0.5], "prompt_ids": [5 + i, 6, 7],
            "response_ids": ids, "logprobs": [[-rng.randint(1, 64) / 16 for _ in row] for row in ids],
            "loss_mask": [[1, *(rng.randint(0, 1) for _ in row[1:])] for row in ids],
            "truncated": [False, False, True], "temperature": 0.5, "task": f"t{i % 2}", "set": "v", "level": i,
        })  # fmt: skip
    return made


def long_form() -> list[dict[str, Any]]:
    """A row a response, the rows of one prompt apart from each other."""
    rows = []
    for k in range(3):
        for record in records():
            row = {
                key: value for key, value in record.items() if key not in (*RESPONSE, "responses", "rewards")
            }
            row |= {key: record[key][k] for key in RESPONSE}
            rows.append(row | {"response": record["responses"][k], "reward": record["rewards"][k]})
    return rows


def main() -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    rows = records()
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
    plain = b"".join(lines)
    written = {
        "records.jsonl": plain,
        "marked.jsonl": b"\xef\xbb\xbf" + b"\xef\xbb\xbf".join(lines),  # files with marks, put behind each other
        "array.json": json.dumps(rows, indent=1).encode(),
        "records.jsonl.gz": gzip.compress(plain, mtime=0),
        "parts.jsonl.gz": gzip.compress(lines[0], mtime=0) + gzip.compress(b"".join(lines[1:]), mtime=0),
        "records.jsonl.bz2": bz2.compress(plain),
        "records.jsonl.xz": lzma.compress(plain),
        "long.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in long_form()),
        "columns.jsonl": b"".join(
            json.dumps({("question" if k == "prompt" else "scores" if k == "rewards" else k): v for k, v in row.items()
                        if k != "id"} | {"extra_info": {"index": row["id"]}}).encode() + b"\n" for row in rows),
        "names.jsonl": b"".join(
            json.dumps({NAMES.get(k, k): v for k, v in row.items()}).encode() + b"\n" for row in rows),
    }  # fmt: skip
    for name, data in written.items():
        (HERE / name).write_bytes(data)
    with pyarrow.CompressedOutputStream(str(HERE / "records.jsonl.zst"), "zstd") as file:
        file.write(plain)
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, HERE / "records.parquet", row_group_size=4)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(long_form()), HERE / "long.parquet")
    with pyarrow.ipc.new_file(str(HERE / "records.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=4)
    with pyarrow.ipc.new_stream(str(HERE / "stream.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=4)
    shutil.rmtree(HERE / "saved", ignore_errors=True)
    datasets.Dataset.from_list(rows).save_to_disk(HERE / "saved")


if __name__ == "__main__":
    main()
