"""The GPU suite, rehearsed: a machine with a GPU is too dear to find a misspelt name on."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rehearsal import set_stage

SUITE = Path(__file__).resolve().parents[3] / "benchmarks" / "gpu"
TINY = {"qwen2.5-1.5b": {"layers": 1, "head": (130, 32), "linears": [("q_proj", 32, 32), ("k_proj", 16, 96)]}}

TINY_MODEL = {
    "vocab_size": 130, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with set_stage(monkeypatch):
        yield


@pytest.fixture
def stage_without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with set_stage(monkeypatch, kernels=False):
        yield


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Imports a part of the suite, its results going to a folder of their own."""
    monkeypatch.setenv("GPU_SUITE_OUT", str(tmp_path))
    monkeypatch.syspath_prepend(str(SUITE))

    def load(name: str) -> ModuleType:
        for known in ("common", "launches", "correctness", "sketch", "logprob", "model", "report"):
            monkeypatch.delitem(sys.modules, known, raising=False)
        module, common = importlib.import_module(name), importlib.import_module("common")
        monkeypatch.setattr(common, "MODELS", TINY)
        monkeypatch.setattr(common, "_flush", torch.zeros(1))
        monkeypatch.setattr(common, "copy_bandwidth", lambda: 1e12)
        timed = common.milliseconds
        monkeypatch.setattr(common, "milliseconds", lambda run, **kwargs: timed(run, repeats=1, warm=0))
        return module

    return load


def rows(folder: Path, part: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in map(json.loads, (folder / f"{part}.jsonl").read_text().splitlines())}


def finish(module: ModuleType) -> None:
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0, "the part would have failed"


def test_correctness_as_the_sanitizer_runs_it(
    suite: Any, stage: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = suite("correctness")
    monkeypatch.setattr(sys, "argv", ["correctness.py", "--small", "memcheck"])
    monkeypatch.setattr(module, "DTYPES", {"fp32": torch.float32})
    narrow = dict.fromkeys(("folded", "several groups", "odd"), module.CASES["narrow"])
    monkeypatch.setattr(module, "CASES", narrow)
    monkeypatch.setattr(module, "TOKENS", 100)
    monkeypatch.setattr(module, "SCORED", 12)
    finish(module)
    got = rows(tmp_path, "sanitizer_memcheck")
    assert len(got) >= 8 and all(row["ok"] for row in got.values())


def test_launches(suite: Any, stage: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("launches")
    for name, size in {"TOKENS": 12, "FEATURES": 48, "ROWS": 40, "VOCAB": 70, "FLAT": 999}.items():
        monkeypatch.setattr(module, name, size)
    # A replay does not compute here; what was captured has been overwritten to show exactly that.
    monkeypatch.setattr(torch.Tensor, "fill_", lambda self, value: self)
    for op in module.calls("cuda:0"):
        row = module.check(op)
        assert row["ok"] and row["second_device"], (op, row)


def test_sketch(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = suite("sketch")
    monkeypatch.setattr(module, "TOKENS", 32)
    monkeypatch.setattr(module, "SEGMENTS", (2,))
    monkeypatch.setattr(module, "LENGTHS", (16,))
    finish(module)
    got = rows(tmp_path, "sketch")
    assert {"copy bandwidth", "qwen2.5-1.5b w=64 S=2", "qwen2.5-1.5b w=None S=2", "segments of 16"} <= set(
        got
    )
    assert {"of_mm_rate", "mm_ms"} <= set(got["qwen2.5-1.5b w=None S=2"]) and got["qwen2.5-1.5b w=64 S=2"][
        "times_read"
    ] > 0


def test_logprob(suite: Any, stage: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = suite("logprob")
    monkeypatch.setattr(module, "TOKENS", 8)
    monkeypatch.setattr(module, "CHUNK", 4)
    finish(module)
    got = rows(tmp_path, "logprob")
    assert set(got) == {"qwen2.5-1.5b", "qwen2.5-1.5b with the head's sketch"}
    assert all(0 < row["forward_of_mm"] and row["both_extra_gb"] > 0 for row in got.values())


def test_model(
    suite: Any, stage_without_kernels: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    module = suite("model")
    for name, value in {
        "LENGTH": 8,
        "ROWS": 2,
        "WIDTHS": (64,),
        "BLOCK": 8,
        "BLOCKS": 2,
        "DIM": 64,
        "SHAPE": TINY_MODEL,
    }.items():
        monkeypatch.setattr(module, name, value)
    finish(module)
    got = rows(tmp_path, "model")
    assert got["sketched, width 64"]["finite"] and got["sketched, width 64"]["repeatable"]
    assert got["loop: backward and flat float32 gradient"]["ms_per_prompt"] > 0
    assert got["loop: dense projection of a tenth"]["of"] > 2


def test_report_of_whatever_was_measured(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the verdicts' keys are those that the parts write; and nothing at all is reported as nothing."""
    module = suite("report")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "empty.md")])
    module.main()
    assert "not measured" in (tmp_path / "empty.md").read_text()
    lines: dict[str, list[dict[str, Any]]] = {
        "sketch": [
            {"name": "a", "width": None, "of_mm_rate": 0.8},
            {"name": "b", "width": 128, "times_read": 1.2},
            {"name": "c", "width": 256, "times_read": 1.9},
        ],
        "logprob": [
            {"name": "h", "sketch": True, "forward_of_mm": 0.9, "both_of_mm": 0.88, "both_extra_gb": 1.1}
        ],
        "model": [
            {"name": "frozen weights", "ms": 10.0, "extra_gb": 5.0},
            {"name": "weight gradients", "ms": 14.0, "extra_gb": 9.0},
            {"name": "sketched, width 64", "ms": 10.8, "extra_gb": 5.05},
            {"name": "loop: backward and flat float32 gradient", "ms_per_prompt": 20.0},
            {"name": "loop: dense projection of a tenth", "ms_per_prompt": 600.0},
        ],
        "project": [
            {"name": "countsketch 4096 bf16 cuda", "backend": "cuda", "of_copy": 0.85},
            {"name": "countsketch 4096 beside peers cuda", "ms": 1.0},
            {"name": "peer fast_jl rademacher", "ms": 30.0},
            {"name": "peer sjlt c=1", "ms": 3.0},
            {"name": "peer torch index_add_", "ms": 12.0},
        ],
        "correctness": [{"name": "x", "ok": True, "error": 1e-7}, {"name": "y", "error": "ValueError: no|t"}],
    }
    for part, rows_ in lines.items():
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    (tmp_path / "status.txt").write_text("build: done in 20 s\nsketch: done in 90 s\n")
    (tmp_path / "sanitizer_memcheck.log").write_text("========= ERROR SUMMARY: 0 errors\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "full.md")])
    module.main()
    text = (tmp_path / "full.md").read_text()
    assert (
        "not measured" not in text
        and "ERROR SUMMARY: 0 errors" in text
        and "2 rows, 1 of them failed" in text
    )
    assert "| 918.5 |" in text, "620 ms a prompt against 10.8 / 16"
