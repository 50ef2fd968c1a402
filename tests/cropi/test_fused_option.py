"""``fused``: jobs whose norms and gated products are computed by kernels in which the sketch rides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines

import cropi
from cropi.cli import main
from cropi_kernels.ops.swiglu import cpu

RECORDS = make_records(8)


def sketched(**options: Any) -> torch.Tensor:
    store = cropi.sketch(make_model(), RECORDS, make_tokenizer(), progress=False, **options)
    return torch.cat([vectors for _, vectors in store.shards()])


@pytest.mark.long
def test_a_fused_job_differs_by_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, run = [], cpu.swiglu
    monkeypatch.setattr(cpu, "swiglu", lambda *args: (calls.append(1), run(*args))[1])
    plain = sketched()
    assert not calls
    fused = sketched(fused=True)
    # A float32 pass of two layers: a few hundred roundings of 2^-24.
    assert calls and ((fused - plain).norm(dim=1) <= 1e-5 * plain.norm(dim=1)).all() and plain.any()


def test_a_model_without_such_modules_is_refused() -> None:
    with pytest.raises(ValueError, match="fused=True: GPT2LMHeadModel has no RMSNorm and no SwiGLU"):
        cropi.sketch(make_model("gpt2"), RECORDS, make_tokenizer(), progress=False, fused=True)


@pytest.mark.long
def test_by_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", RECORDS)
    words = [
        "sketch",
        "--model",
        tmp_path / "model",
        "--trajectories",
        data,
        "--out",
        tmp_path / "out",
        "--fused",
    ]
    assert main([*map(str, words), "--no-progress"]) == 0
    said = capsys.readouterr()
    assert "SwiGLU modules" in said.out + said.err
