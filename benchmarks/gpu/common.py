"""What every part of the GPU suite shares: shapes, ragged segments, timing, and results on disk."""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

# (name, out features, in features) of one layer's linear maps, layers, (vocabulary, hidden) of the head.
MODELS: dict[str, dict[str, Any]] = {
    "qwen2.5-1.5b": {
        "layers": 28,
        "head": (151936, 1536),
        "linears": [("q_proj", 1536, 1536), ("k_proj", 256, 1536), ("v_proj", 256, 1536), ("o_proj", 1536, 1536),
                    ("gate_proj", 8960, 1536), ("up_proj", 8960, 1536), ("down_proj", 1536, 8960)],
    },
    "qwen2.5-7b": {
        "layers": 28,
        "head": (152064, 3584),
        "linears": [("q_proj", 3584, 3584), ("k_proj", 512, 3584), ("v_proj", 512, 3584), ("o_proj", 3584, 3584),
                    ("gate_proj", 18944, 3584), ("up_proj", 18944, 3584), ("down_proj", 3584, 18944)],
    },
    "llama-3-8b": {
        "layers": 32,
        "head": (128256, 4096),
        "linears": [("q_proj", 4096, 4096), ("k_proj", 1024, 4096), ("v_proj", 1024, 4096), ("o_proj", 4096, 4096),
                    ("gate_proj", 14336, 4096), ("up_proj", 14336, 4096), ("down_proj", 4096, 14336)],
    },
}  # fmt: skip
COPIED, GEMM = 256 << 20, 8192  # numbers copied, side of the product: far beyond any cache
GEMM_FLOPS = 2.0 * GEMM**3
MOST_SETS = 24
RESTART = 75  # exit status of a part whose process cannot use the GPU any more: it is to be started again


def ragged(n_tokens: int, n_segments: int) -> torch.Tensor:
    """Offsets of segments whose lengths differ by up to a factor of about 4, on the CPU."""
    g = torch.Generator().manual_seed(0)
    share = torch.rand(n_segments, generator=g) * 3 + 1
    cuts = (share.cumsum(0) / share.sum() * n_tokens).long()
    cuts[-1] = n_tokens
    return torch.cat([torch.zeros(1, dtype=torch.int64), cuts])


def milliseconds(run: Callable[[], Any], *, repeats: int = 10, warm: int = 2) -> float:
    """Median time on the device of work that lasts far longer than its launches and reads far more than the L2 holds.

    `kernel_milliseconds` is for everything smaller.
    """
    for _ in range(warm):
        run()
    marks = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in marks)


def in_turns(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int = 7, warm: int = 1
) -> dict[str, list[float]]:
    """Milliseconds on the device of each run in each round: what is compared is measured in turns.

    A card that has been at work is slower by its power: on an H200, a large product fell from 780 to 630 TFLOP/s while
    log-probs were measured, and a ratio to a product that came first was too low by as much.
    """
    marks: dict[str, list[Any]] = {name: [] for name in runs}
    for round_ in range(warm + rounds):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            if round_ >= warm:
                marks[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) for a, b in pairs] for name, pairs in marks.items()}


def share(times: Sequence[float], of: Sequence[float], factor: float = 1.0) -> float:
    """The median over rounds of ``factor * of / times``."""
    return statistics.median(factor * b / a for a, b in zip(times, of))


def n_sets(size: float) -> int:
    """Operand sets of ``size`` bytes to rotate over, so that none is in the L2 when its turn comes again."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(3 * l2 / max(1.0, size))))


def kernel_milliseconds(
    runs: Sequence[Callable[[], Any]], *, calls: int = 24, replays: int = 5
) -> dict[str, float]:
    """``ms`` of one call on the device, and ``eager_ms``, the same with every launch made by the host.

    ``runs`` are the same call on different operands (`n_sets` says how many). The device's time is that of a CUDA
    graph of at least ``calls`` calls: no launch waits for the host, and no cache is overwritten between the calls.
    """
    graph, eager, n = graph_of(runs, calls)
    replayed = milliseconds(graph.replay, repeats=replays, warm=1)
    return {"ms": replayed / n, "eager_ms": eager / n}


def graph_of(runs: Sequence[Callable[[], Any]], calls: int) -> tuple[torch.cuda.CUDAGraph, float, int]:
    """A graph of at least ``calls`` calls, the milliseconds of as many without it, and their number."""
    rounds = math.ceil(calls / len(runs))
    for run in runs:  # compiles, uploads tables
        run()
    torch.cuda.synchronize()

    def all_of_them() -> None:
        for _ in range(rounds):
            for run in runs:
                run()

    eager = milliseconds(all_of_them, repeats=2, warm=0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return graph, eager, rounds * len(runs)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Highest use of device memory during ``run``, beyond what was in use before."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def copy_bandwidth() -> float:
    """Bytes per second that a plain copy reads plus writes."""
    x = torch.empty(COPIED, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / (milliseconds(lambda: y.copy_(x)) / 1000)


def large_product() -> Callable[[], Any]:
    """One large bfloat16 product, on random numbers (zeros run faster): `GEMM_FLOPS` operations."""
    a, b = (torch.randn(GEMM, GEMM, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty(GEMM, GEMM, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.mm(a, b, out=out)


def gemm_rate() -> float:
    """Operations per second of `large_product` on a card that has not been at work."""
    return GEMM_FLOPS / (milliseconds(large_product()) / 1000)


class Results:
    """Rows of one part, written after every row: what was measured survives whatever comes next.

    A row that is there already is not measured again: a second call goes on where the first one ended, and a part that
    was started again goes on behind the attempt that broke it. The environment says what the caller wants:

    - ``GPU_SUITE_OUT``: the folder of the rows;
    - ``GPU_SUITE_SHARD=i/n``: this process makes every n-th attempt, from the i-th on, into rows of its own;
    - ``GPU_SUITE_PART_ENDS``: the clock (seconds since 1970) at which the part will be ended.
    """

    def __init__(self, part: str) -> None:
        shard = os.environ.get("GPU_SUITE_SHARD", "")
        self.shard, self.shards = map(int, shard.split("/")) if shard else (0, 1)
        self.path = Path(os.environ["GPU_SUITE_OUT"]) / f"{part}{f'.{self.shard}' if shard else ''}.jsonl"
        self.ends = float(os.environ.get("GPU_SUITE_PART_ENDS", "inf"))
        earlier = (
            [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        )
        self.known = {row["name"] for row in earlier}
        self.failed = sum(map(bad, earlier))
        self.attempts = 0

    def add(self, **row: Any) -> None:
        self.failed += bad(row)
        print(json.dumps(row), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        sys.exit(1 if self.failed else 0)

    def attempt(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """One row from ``run``; an exception becomes a row of its own, and the rest still runs.

        After a CUDA error every further call of the process fails: the process ends with the status RESTART.
        """
        mine = self.attempts % self.shards == self.shard
        self.attempts += 1
        if name in self.known or not mine:
            return
        if time.time() > self.ends - 5:
            return self.add(name=name, error="not run: the part's time was up")
        try:
            start = time.monotonic()
            row = run()
            self.add(name=name, **row, took_s=round(time.monotonic() - start, 2))
        except Exception as error:
            traceback.print_exc()
            self.add(name=name, error=f"{type(error).__name__}: {error}"[:400])
            if spoils_the_process(error):
                sys.stdout.flush()
                os._exit(RESTART)  # without clean-up: it would call CUDA again
            torch.cuda.empty_cache()


def bad(row: dict[str, Any]) -> bool:
    """Whether a row says that its attempt failed or was not made."""
    return row.get("ok") is False or isinstance(row.get("error"), str)


def spoils_the_process(error: Exception) -> bool:
    """Whether the CUDA context is lost: kernels that went wrong are, memory that ran out is not."""
    text = f"{type(error).__name__}: {error}"
    lost = (
        "CUDA error",
        "AcceleratorError",
        "illegal memory access",
        "unspecified launch failure",
        "misaligned address",
    )
    return any(word in text for word in lost) and "out of memory" not in text
