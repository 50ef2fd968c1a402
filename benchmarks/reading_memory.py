"""What memory the readers take beside the size of the file: the peak over reading it, in a process of its own.

    python -m benchmarks.reading_memory [--mib 64] [--only slime trl] [--folder /big/disk]

The peak is that of the resident set (``VmHWM``) less what was resident before, when everything had been imported and a
small file of the same kind read. :mod:`benchmarks.lib.made_files` makes the files.
"""

from __future__ import annotations

import argparse
import bz2
import gc
import gzip
import lzma
import os
import tempfile
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib import memory, script
from benchmarks.lib.made_files import (
    array,
    columns,
    lines,
    moments,
    names,
    nemo,
    openai,
    outputs,
    prime,
    prompts,
    proto,
    queue,
    records,
    rows_of_one,
    saved,
    scores,
    selected,
    slime,
    slime_samples,
    store,
    table,
    vllm,
    zstd,
)

MIB = 2**20


def through(path: Path) -> None:
    """The first pass of every job, a later one, and every tenth record by its place."""
    from cropi.data.readers import read
    from cropi.data.scan import scan

    groups = read(path)
    scan(groups)
    ids = [group.id for group in groups]
    deque(read(path).take(ids[::10]), maxlen=0)


def converted(path: Path, options: Sequence[str] = ()) -> None:
    from cropi.cli import main

    out = path.with_name("converted.jsonl")
    code = main(["convert", str(path), *options, "--out", str(out), "--quiet"])
    out.unlink(missing_ok=True)
    assert code == 0, code


def rolled_out(path: Path) -> None:
    from cropi.gradient.tokenize import Tokenize
    from cropi.rollouts.prompts import read_prompts

    read_prompts(path, Tokenize(None, 2**20, eos=False))


def selection(path: Path) -> None:
    from cropi.ranking.selection_files import read_selection

    read_selection(path)


def score_table(path: Path) -> None:
    from cropi.ranking.table import read_scores

    read_scores(path)


def dataset(path: Path) -> None:
    from cropi.data.export import export

    export(path.with_name("ids.json"), ["0", "1"], format="indices", dataset=path, id_key="extra_info.index")


def opened(path: Path) -> None:
    from cropi.store.store import SketchStore

    held = SketchStore.open(path)
    held.verify()
    deque(held.shards(), maxlen=0)


def adam(path: Path) -> None:
    import torch

    from cropi.model.moments import read_moments

    state = torch.load(path, mmap=True, weights_only=True)["state"]
    with torch.device("meta"):
        model = torch.nn.Linear(len(state[0]["exp_avg"][0]), 1, bias=False)
    read_moments(path, model)


@dataclass(frozen=True)
class Kind:
    """A file's name, what makes its rows, what writes them, and what reads the file."""

    name: str
    rows: Callable[[], Any]
    write: Callable[[Path, Any, int], None]
    read: Callable[[Path], None]


def packed(opener: Any) -> Callable[[Path, Any, int], None]:
    return lambda path, rows, size: lines(path, rows, size, opener)


VERL_TEXT = columns(input="prompt", output="response", score="reward", step="step")
SKYRL = columns(input_prompt="prompt", output_response="response", score="reward")
nothing: Callable[[], Any] = lambda: None  # noqa: E731
KINDS = {
    "records, JSON lines": Kind("r.jsonl", records, lines, through),
    "records of text, JSON lines": Kind("t.jsonl", lambda: records(text=True), lines, through),
    "records, gzip": Kind("r.jsonl.gz", records, packed(lambda p, m: gzip.open(p, m, 1)), through),
    "records, zstd": Kind("r.jsonl.zst", records, packed(zstd), through),
    "records, bz2": Kind("r.jsonl.bz2", records, packed(lambda p, m: bz2.open(p, m, 1)), through),
    "records, xz": Kind("r.jsonl.xz", records, packed(lambda p, m: lzma.open(p, m, preset=0)), through),
    "records, JSON array": Kind("r.json", records, array, through),
    "records, parquet": Kind("r.parquet", records, table, through),
    "records of text, parquet": Kind("t.parquet", lambda: records(text=True), table, through),
    "records, arrow": Kind("r.arrow", records, table, through),
    "records, arrow stream": Kind("r.stream", records, table, through),
    "records, save_to_disk": Kind("r", records, saved, through),
    "a row a response, JSON lines": Kind("rows.jsonl", rows_of_one, lines, through),
    "a row a response, parquet": Kind("rows.parquet", rows_of_one, table, through),
    "slime": Kind("7.pt", slime_samples, slime, converted),
    "verl, transfer queue": Kind("tq_batch.pt", nothing, queue, partial(converted, options=("--source", "verl"))),
    "verl, DataProto": Kind("gen_batch.dp", nothing, proto, converted),
    "verl, text": Kind("7.jsonl", VERL_TEXT, lines, converted),
    "NeMo-RL": Kind("train_data_step7.jsonl", nemo, lines, converted),
    "TRL": Kind("c.parquet", columns(step="step", prompt="prompt", completion="response", accuracy="reward",
                                     advantage="advantage"), table, converted),
    "vLLM, JSON lines": Kind("v.jsonl", vllm, lines, converted),
    "vLLM, pickle": Kind("v.pkl", vllm, outputs, converted),
    "chat completions": Kind("b.jsonl", openai, lines, converted),
    "prime-rl": Kind("p.jsonl", prime, lines, converted),
    "OpenRLHF": Kind("o.jsonl", columns(input="prompt", output="response", reward="reward"), lines, converted),
    "SkyRL": Kind("s.jsonl", SKYRL, lines, converted),
    "AReaL": Kind("a.jsonl", columns(prompt="prompt", completion="response", reward="reward", task_id="name",
                                     head_version="step"), lines, converted),
    "prompts, JSON lines": Kind("q.jsonl", prompts, lines, rolled_out),
    "prompts, parquet": Kind("q.parquet", prompts, table, rolled_out),
    "a trainer's dataset, JSON lines": Kind("d.jsonl", prompts, lines, dataset),
    "a trainer's dataset, JSON array": Kind("d.json", prompts, array, dataset),
    "a trainer's dataset, parquet": Kind("d.parquet", prompts, table, dataset),
    "a selection": Kind("selected.jsonl", selected, lines, selection),
    "ids, one a line": Kind("ids.txt", nothing, names, selection),
    "scores": Kind("scores.parquet", nothing, scores, score_table),
    "a store": Kind("store", nothing, store, opened),
    "an optimizer's state": Kind("optimizer.pt", nothing, moments, adam),
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------- measuring
def size_of(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size


def peak(work: Callable[[], Any], first: Callable[[], Any] = lambda: None) -> int:
    """The bytes by which a forked process grows while it works, after it has done ``first``.

    A fork has none of the pages of libraries yet: what ``first`` touches of them is not counted.
    """
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            first()
            gc.collect()
            before = memory.resident()
            os.write(told, str(memory.peak(work) - before).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(told)
    with os.fdopen(ready) as file:
        text = file.read()
    _, code = os.waitpid(child, 0)
    if code:
        raise RuntimeError(f"the reader ended with {code}")
    return int(text)


def measure(kind: Kind, folder: Path, size: int) -> tuple[int, int]:
    """The bytes of a file of this kind and of the peak."""
    small, large = folder / "small", folder / "large"
    for part, bytes_ in ((small, 100_000), (large, size)):
        part.mkdir()

        def make(part: Path = part, bytes_: int = bytes_) -> None:
            kind.write(part / kind.name, kind.rows(), bytes_)

        peak(make)  # what it leaves behind ends with its process
    few = lambda: kind.read(small / kind.name)  # noqa: E731
    few()  # imports what all forks need
    return size_of(large / kind.name), peak(lambda: kind.read(large / kind.name), few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=float, default=64)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--folder", type=script.folder)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print("| file | MiB | peak, MiB | times the file |\n| --- | --- | --- | --- |", flush=True)
    for name, kind in KINDS.items():
        if args.only and not any(word in name for word in args.only):
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as made:
            try:
                size, most = measure(kind, Path(made), int(args.mib * MIB))
            except Exception as error:
                print(f"| {name} | failed: {type(error).__name__}: {error} |", flush=True)
                continue
        print(f"| {name} | {size / MIB:.0f} | {most / MIB:.0f} | {most / size:.2f} |", flush=True)


if __name__ == "__main__":
    main()
