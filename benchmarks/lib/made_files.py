"""Files of every kind that is read, of any size: what :mod:`benchmarks.reading_memory` measures.

Token ids are of a vocabulary of 150,000, log-probs float32, and text does not repeat.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESPONSES, TOKENS = 8, 500


class Made:
    """Rollouts of one prompt after the other; their numbers are cut from a long list of drawn ones."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        # Small ids are frequent, as in every tokenizer.
        self.ids: list[int] = (150_000 * rng.random(200_000) ** 3).astype(int).tolist()
        self.probs: list[float] = (-rng.exponential(0.3, 200_000)).astype(np.float32).tolist()
        words = random.Random(0)
        self.text = "".join(words.choices("abcdefghijklmnopqrstuvwxyz     .,\n", k=400_000))

    def cut(self, held: Any, i: int, size: int) -> Any:
        at = (i * 7919) % (len(held) - size)
        return held[at : at + size]

    def response(self, i: int) -> tuple[list[int], list[float], str, float]:
        size = TOKENS // 2 + i * 37 % TOKENS
        return (
            self.cut(self.ids, i, size),
            self.cut(self.probs, i, size),
            self.cut(self.text, i, 4 * size),
            float(i % 2),
        )

    def prompt(self, p: int) -> tuple[list[int], str]:
        return [p % 150_000, p // 150_000, *self.cut(self.ids, p, 98)], f"{p} {self.cut(self.text, p, 390)}"


MADE = Made()
Rows = Iterator[dict[str, Any]]


def records(text: bool = False) -> Rows:
    for p in range(10**9):
        ids, words = MADE.prompt(p)
        made = [MADE.response(RESPONSES * p + k) for k in range(RESPONSES)]
        row = {
            "id": f"p{p}",
            "prompt": words,
            "responses": [m[2] for m in made],
            "rewards": [m[3] for m in made],
        }
        if not text:
            row |= {"prompt_ids": ids, "response_ids": [m[0] for m in made], "logprobs": [m[1] for m in made]}
        yield row


def singles() -> Iterator[tuple[int, int, list[int], str, list[int], list[float], str, float]]:
    for i in range(10**9):
        yield i, i // RESPONSES, *MADE.prompt(i // RESPONSES), *MADE.response(i)


def rows_of_one() -> Rows:
    for _, p, _, prompt, _, _, text, reward in singles():
        yield {"id": f"p{p}", "prompt": prompt, "response": text, "reward": reward}


def prompts() -> Rows:
    for p in range(10**9):
        yield {
            "id": f"p{p}",
            "prompt": MADE.prompt(p)[1],
            "prompt_ids": MADE.prompt(p)[0],
            "answer": "4",
            "extra_info": {"index": p},
        }


def columns(**names: str) -> Callable[[], Rows]:
    """Rows of text, under other names; the values of those that are not of a rollout are given as they are."""

    def rows() -> Rows:
        for _, p, _, prompt, _, _, text, reward in singles():
            held = {"prompt": prompt, "response": text, "reward": reward, "step": 7, "name": f"m{p}",
                    "advantage": reward - 0.5}  # fmt: skip
            yield {key: held.get(value, value) for key, value in names.items()}

    return rows


def nemo() -> Rows:
    for i, _, ids, _, response, probs, _, reward in singles():
        zeros = [0] * len(ids)
        yield {
            "content": ["..."], "rewards": [reward], "input_lengths": [len(ids) + len(response)],
            "token_ids": [ids + response], "token_loss_mask": [zeros + [1] * len(response)],
            "sample_loss_mask": [1.0], "generation_logprobs": [zeros + probs], "prev_logprobs": [zeros + probs],
            "idx": i,
        }  # fmt: skip


def vllm() -> Rows:
    for i, _, ids, prompt, response, probs, text, reward in singles():
        tables = [{str(t): {"logprob": p, "rank": 1, "decoded_token": "x"}} for t, p in zip(response, probs)]
        output = {"index": 0, "text": text, "token_ids": response, "logprobs": tables, "finish_reason": "stop",
                  "reward": reward}  # fmt: skip
        yield {"request_id": str(i), "prompt": prompt, "prompt_token_ids": ids, "outputs": [output]}


def openai() -> Rows:
    for i, p, ids, prompt, response, probs, text, reward in singles():
        entries = [{"token": f"token_id:{t}", "logprob": x, "bytes": [65], "top_logprobs": []}
                   for t, x in zip(response, probs)]  # fmt: skip
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": {"content": entries},
                  "finish_reason": "stop"}  # fmt: skip
        yield {"id": f"b{i}", "custom_id": f"m{p}", "reward": reward, "messages": [{"role": "user", "content": prompt}],
               "response": {"status_code": 200, "body": {"choices": [choice], "prompt_token_ids": ids}}}  # fmt: skip


def prime() -> Rows:
    for _, p, ids, prompt, response, probs, text, reward in singles():
        turn = {"prompt_ids": ids, "completion_ids": response, "completion_mask": [1] * len(response),
                "completion_logprobs": probs}  # fmt: skip
        yield {"example_id": p, "task": "sums", "prompt": [{"role": "user", "content": prompt}], "reward": reward,
               "completion": [{"role": "assistant", "content": text}], "trajectory": [{"tokens": turn}]}  # fmt: skip


def slime_samples() -> Rows:
    for i, p, ids, prompt, response, probs, text, reward in singles():
        yield {"tokens": ids + response, "response_length": len(response), "reward": reward, "rollout_log_probs": probs,
               "loss_mask": [1] * len(response), "group_index": p, "index": i, "label": "g", "prompt": prompt,
               "response": text, "status": "completed", "metadata": {"id": f"m{p}"}}  # fmt: skip


def selected() -> Rows:
    for p in range(10**9):
        yield {"id": f"train-{p:09d}", "rank": p + 1, "fused": 1 / (60 + p), "method": "rrf",
               "scores": {"math": MADE.probs[p % 1000], "code": MADE.probs[p % 999]}}  # fmt: skip


def lines(path: Path, rows: Rows, size: int, pack: Any = open) -> None:
    # Packed bytes reach the file in parts, so that what goes in is counted; it packs to two fifths.
    left = size if pack is open else 5 * size // 2
    with pack(path, "wb") as file:
        for row in rows:
            line = json.dumps(row).encode() + b"\n"
            file.write(line)
            left -= len(line)
            if left <= 0:
                return


def array(path: Path, rows: Rows, size: int) -> None:
    with open(path, "wb") as file:
        file.write(b"[")
        for number, row in enumerate(rows):
            file.write(b"," * bool(number) + json.dumps(row).encode())
            if file.tell() >= size:
                break
        file.write(b"]")


def zstd(path: Path, mode: str) -> Any:
    import pyarrow

    return pyarrow.CompressedOutputStream(str(path), "zstd")


def table(path: Path, rows: Rows, size: int) -> None:
    """Parquet with one group of rows, as pandas and pyarrow write it; arrow in batches of 1000."""
    import pyarrow
    import pyarrow.parquet

    parts, held, made = [], [], 0
    for row in rows:
        held.append(row)
        if len(held) == 64:
            parts.append(pyarrow.Table.from_pylist(held))
            made, held = made + parts[-1].nbytes, []
            if made >= size * (1.6 if path.suffix == ".parquet" else 1):
                break
    whole = pyarrow.concat_tables(parts).combine_chunks()
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(whole, path)
    else:
        make = pyarrow.ipc.new_stream if path.suffix == ".stream" else pyarrow.ipc.new_file
        with make(str(path), whole.schema) as file:
            file.write_table(whole, max_chunksize=1000)


def saved(path: Path, rows: Rows, size: int) -> None:
    import datasets

    table(path.with_suffix(".parquet"), rows, size)
    datasets.Dataset.from_parquet(str(path.with_suffix(".parquet")), cache_dir=str(path.parent)).save_to_disk(
        path
    )


def some(rows: Rows, size: int, bytes_of_one: int) -> list[dict[str, Any]]:
    return [row for row, _ in zip(rows, range(max(1, size // bytes_of_one)))]


def slime(path: Path, rows: Rows, size: int) -> None:
    import torch

    torch.save({"rollout_id": 7, "samples": some(rows, size, 10_600)}, path)


def queue(path: Path, rows: Any, size: int) -> None:
    """verl's transfer queue, with plain dictionaries for its classes."""
    import torch

    n = max(1, size // 16_000)
    held = [one for one, _ in zip(singles(), range(n))]
    table = {
        "prompts": [torch.tensor(one[2]) for one in held], "responses": [torch.tensor(one[4]) for one in held],
        "response_mask": [torch.ones(len(one[4]), dtype=torch.long) for one in held],
        "rm_scores": [torch.tensor([0.0] * (len(one[4]) - 1) + [one[7]]) for one in held],
        "rollout_log_probs": [torch.tensor(one[5]) for one in held],
        "extra_info": [{"index": one[1]} for one in held], "reward_model": [{"ground_truth": "g"}] * n,
    }  # fmt: skip
    keys = [f"{one[1]}_{one[0]}_0" for one in held]
    torch.save({"tensordict": table, "keys": keys, "tags": [{}] * n, "global_steps": 7}, path)


class Batch:
    """What a DataProto looks like; pickled as one, by its name."""

    __module__ = "verl"

    def __init__(self, state: Any) -> None:
        self.state = state

    def __getstate__(self) -> Any:
        return self.state


def proto(path: Path, rows: Any, size: int) -> None:
    import torch

    n = max(8, size // (2100 * 8 + 1100 * 8 + 1000 * 20))
    held = [one for one, _ in zip(singles(), range(n))]
    responses, seen, probs = (
        torch.zeros(n, 1000, dtype=torch.long),
        torch.zeros(n, 1000, dtype=torch.long),
        torch.zeros(n, 1000),
    )
    for i, one in enumerate(held):
        responses[i, : len(one[4])], seen[i, : len(one[4])] = torch.tensor(one[4]), 1
        probs[i, : len(one[5])] = torch.tensor(one[5])
    scores = torch.zeros(n, 1000)
    scores[:, 0] = torch.tensor([one[7] for one in held])
    batch = {
        "prompts": torch.tensor([one[2] for one in held]), "responses": responses,
        "attention_mask": torch.cat([torch.ones(n, 100, dtype=torch.long), seen], 1),
        "response_mask": seen, "old_log_probs": probs, "token_level_scores": scores,
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(batch, buffer)
    infos = np.array([{"index": one[1]} for one in held], dtype=object)
    sys.modules["verl"] = types.ModuleType("verl")
    sys.modules["verl"].Batch = Batch  # type: ignore[attr-defined]
    path.write_bytes(pickle.dumps(Batch((buffer.getvalue(), {"extra_info": infos}, {"temperature": 1.0}))))
    del sys.modules["verl"]


def outputs(path: Path, rows: Rows, size: int) -> None:
    path.write_bytes(pickle.dumps(some(rows, size, 22_000)))


def names(path: Path, rows: Any, size: int) -> None:
    path.write_text("".join(f"train-{i:09d}\n" for i in range(size // 16)), encoding="utf-8")


def scores(path: Path, rows: Any, size: int) -> None:
    from cropi.ranking.scores import Scores
    from cropi.ranking.table import write_scores
    from cropi.store.rows import RowInfo

    n, rng = max(10, size // 80), np.random.default_rng(0)
    infos = [RowInfo(f"train-{i:09d}", pass_rate=0.5, tokens=i, norm=float(i)) for i in range(n)]
    write_scores(path, Scores(infos, ["a", "b", "c", "d"], rng.random((n, 4)), {}))


def store(path: Path, rows: Any, size: int) -> None:
    import torch

    from benchmarks.bench_store import manifest
    from cropi.store.codec import encode
    from cropi.store.rows import RowInfo
    from cropi.store.store import SketchStore

    n, dim = max(8, size // 8192), 4096
    held = encode(torch.randn(n, dim), "float16")
    with SketchStore.create(path, manifest(dim, "float16")) as made:
        for first in range(0, n, 256):
            infos = [
                RowInfo(f"p{i}", pass_rate=0.5, tokens=9, norm=1.0, row=i - first)
                for i in range(first, min(n, first + 256))
            ]
            made.append(infos, {name: tensor[first : first + 256] for name, tensor in held.items()})


def moments(path: Path, rows: Any, size: int) -> None:
    import torch

    n = max(1, size // 8)
    state = {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(1, n), "exp_avg_sq": torch.ones(1, n)}}
    torch.save({"state": state, "param_groups": [{"params": [0], "betas": (0.9, 0.999), "eps": 1e-8}]}, path)
