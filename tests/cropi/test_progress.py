"""What a log file is told of a long job: a line a minute with how much is done, the rate and what is left."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import pytest
from support.commands import cropi
from support.made_data import make_records, save_policy, write_lines

from cropi import progress


def test_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress.bar_of(500, "rollout", True, initial=100) as bar:
        now[0] += 59
        bar.update(10)
        assert capsys.readouterr().err == ""
        now[0] += 21
        bar.set_postfix_str("900 tok/s", refresh=False)
        bar.update(10)
        now[0] += 59
        bar.update(10)
        bar.set_postfix_str("950 tok/s")
        now[0] += 1
        bar.set_postfix_str("token 7 of at most 9")
    # 20 of the 400 that were left in 80 seconds; then 30 in 140
    assert capsys.readouterr().err.splitlines() == [
        "rollout: 120 of 500 prompts after 80 seconds, 0.25 a second, about 25.3 minutes left, 900 tok/s",
        "rollout: 130 of 500 prompts after 2.33 minutes, 0.214 a second, about 28.8 minutes left, token 7 of at most 9",
    ]
    with progress.bar_of(None, "reading", True, delay=2.0, leave=False) as bar:
        now[0] += 60
        bar.set_postfix_str("")
        now[0] += 60
        bar.update(360)
    assert capsys.readouterr().err.splitlines() == [
        "reading: 0 prompts after 60 seconds", "reading: 360 prompts after 2 minutes, 3 a second",
    ]  # fmt: skip


def test_a_log_that_cannot_be_written_ends_no_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)

    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for log in (Full(), None, closed):
        monkeypatch.setattr(sys, "stderr", log)
        with progress.bar_of(3, "store", True) as bar:
            bar.update(2)
            assert bar.n == 2
    assert capsys.readouterr().out == ""


@pytest.mark.long
@pytest.mark.parametrize("off", ["", "--no-progress", "--quiet"])
def test_commands_write_lines_to_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], off: str
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    save_policy(tmp_path / "model")
    more = [off] if off else []
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    model = ["--model", tmp_path / "model"]
    words = [
        "--prompts",
        prompts,
        "--reward",
        "exact",
        "--max-tokens",
        2,
        "-n",
        2,
        "--out",
        tmp_path / "o.jsonl",
    ]
    assert cropi("rollout", *model, *words, *more) == 0
    said = capsys.readouterr().err
    for line in ("rollout: 0 of 1 prompts after", "token 2 of at most 2", "rollout: 1 of 1 prompts"):
        assert (line in said) == (not off), said
    made = write_lines(tmp_path / "t.jsonl", make_records(12))
    words = ["--trajectories", made, "--dim", 512, "--no-verify", "--out", tmp_path / "store"]
    assert cropi("sketch", *model, *words, *more) == 0
    said = capsys.readouterr().err
    for line in ("store: 12 of 12 prompts after", "reading: 12 prompts after"):
        assert (line in said) == (not off), said
    # The prompts without a gradient, and those of the one batch: the rate is not that of its first prompt.
    assert len(re.findall("^store: ", said, re.M)) == (0 if off else 2), said
    assert "Loading" not in said and "\r" not in said
