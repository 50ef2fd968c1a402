"""`cropi bench`: medians, shares of the machine's rates, and an earlier table beside the new one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cropi.bench import table
from cropi.cli import main


def test_medians_are_those_of_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the calls move: the second takes 3 s, and one round of it a minute."""
    now, minutes = [0.0], [60.0]

    def first() -> None:
        now[0] += 1.0

    def second() -> None:
        now[0] += minutes.pop() if minutes and now[0] > 12 else 3.0

    monkeypatch.setattr(table.time, "perf_counter", lambda: now[0])
    assert table.medians([first, second], torch.device("cpu"), 5) == [1.0, 3.0]
    assert not minutes


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], [0]

    def short() -> None:
        calls[0] += 1
        now[0] += 1e-3

    monkeypatch.setattr(table.time, "perf_counter", lambda: now[0])
    (seconds,) = table.medians([short], torch.device("cpu"), 3)
    assert seconds == pytest.approx(1e-3) and calls[0] == 2 + 3 * round(table.LEAST / 1e-3)


def test_a_table_holds_shares_and_ratios() -> None:
    rows = [
        table.Row("project", "8 x 10", 0.004, 0.001, None),
        table.Row("norm_grad", "2 x 2", 0.002, 0.001, 0.003),
    ]
    made = table.Table("cpu", "float32", 2e9, 3e9, rows)
    assert [row.share for row in rows] == [0.25, 0.5]
    assert "copy 2.0 GB/s, matrix product 3 GFLOP/s" in made.lines()[0]
    assert made.lines()[3].split() == ["norm_grad", "2", "x", "2", "2.000", "1.000", "0.50", "3.000"]
    before = made.to_dict()
    before["rows"][0]["seconds"] = 0.002
    assert made.lines(before)[2].split()[-2:] == ["2.000", "2.00"]


def test_a_row_is_printed_before_the_next_op_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16 the whole table takes minutes on a CPU without instructions for it; nothing was said till its end."""
    seen: list[int] = []

    def call() -> None:
        seen.append(len(capsys.readouterr().out.splitlines()))

    monkeypatch.setattr(table, "_rates", lambda device, dtype, rounds: (1e9, 1e9))
    monkeypatch.setattr(table, "_ops", lambda device, dtype: [table.Op(name, "1", call) for name in "abc"])
    monkeypatch.setattr(table, "once", lambda call, device, repeats: call() or 1.0)
    assert main(["bench", "--rounds", "1"]) == 0
    # Three calls an op: the processor, the rates and the head come first, then a line an op.
    assert seen == [3, 0, 0, 1, 0, 0, 1, 0, 0] and capsys.readouterr().out.startswith("c ")


@pytest.mark.long
def test_the_command_measures_every_op_and_compares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(table, "LEAST", 0.0)
    monkeypatch.setattr(table, "SHAPES", {"cpu": (16, 8, 32, 40)})
    monkeypatch.setattr(table, "_rates", lambda device, dtype, rounds: (1e9, 1e9))
    out = tmp_path / "figures.json"
    assert main(["bench", "--rounds", "1", "--out", str(out)]) == 0
    rows = {row["op"]: row for row in json.loads(out.read_text())["table"]["rows"]}
    assert len(rows) == 8 and all(row["seconds"] > 0 for row in rows.values())
    assert rows["sketch_linear, every coordinate"]["floor"] == 2 * 16 * 32 * 8 / 1e9
    assert rows["norm_grad"]["floor"] == 2 * 16 * 8 * 4 / 1e9
    printed = capsys.readouterr().out.splitlines()
    assert main(["info", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"figures       {out}: {printed[0]}", *printed[1:-1]]
    assert main(["bench", "--rounds", "1", "--compare", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[-2:] == ["before", "ratio"]
    assert main(["bench", "--dtype", "bfloat16", "--compare", str(out)]) == 2
    assert "is of cpu in float32, and this run of cpu in bfloat16" in capsys.readouterr().err
    out.write_text("{}")
    assert main(["bench", "--compare", str(out)]) == 2
    assert "is not what `cropi bench --out` wrote" in capsys.readouterr().err
