"""What every part of the GPU suite shares: shapes, ragged segments, timing, and results on disk."""

from __future__ import annotations

import json
import os
import statistics
import sys
import traceback
from collections.abc import Callable
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


def ragged(n_tokens: int, n_segments: int, seed: int = 0) -> torch.Tensor:
    """Offsets of segments whose lengths differ by up to a factor of about 4, on the CPU."""
    g = torch.Generator().manual_seed(seed)
    share = torch.rand(n_segments, generator=g) * 3 + 1
    cuts = (share.cumsum(0) / share.sum() * n_tokens).long()
    cuts[-1] = n_tokens
    return torch.cat([torch.zeros(1, dtype=torch.int64), cuts])


_flush: torch.Tensor | None = None


def milliseconds(run: Callable[[], Any], *, repeats: int = 10, warm: int = 2) -> float:
    """Median time on the device, the L2 cache overwritten before each run."""
    global _flush
    if _flush is None:
        _flush = torch.empty(64 << 20, dtype=torch.float32, device="cuda")
    for _ in range(warm):
        run()
    marks = []
    for _ in range(repeats):
        _flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in marks)


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
    x = torch.empty(256 << 20, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / (milliseconds(lambda: y.copy_(x)) / 1000)


class Results:
    """Rows of one part, written after every row: what was measured survives whatever comes next."""

    def __init__(self, part: str) -> None:
        self.path = Path(os.environ["GPU_SUITE_OUT"]) / f"{part}.jsonl"
        self.failed = 0

    def add(self, **row: Any) -> None:
        self.failed += row.get("ok") is False
        print(json.dumps(row), flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        sys.exit(1 if self.failed else 0)

    def attempt(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """One row from ``run``; an exception becomes a row of its own, and the rest still runs."""
        try:
            self.add(name=name, **run())
        except Exception as error:
            self.failed += 1
            traceback.print_exc()
            self.add(name=name, error=f"{type(error).__name__}: {error}"[:400])
            torch.cuda.empty_cache()
