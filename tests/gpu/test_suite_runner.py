"""The GPU suite's own running: what survives a part that is stopped, a lost device, a second call, a full clock."""

from __future__ import annotations

import importlib
import json
import sys
import tarfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

SUITE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SUITE))
    for path in SUITE.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    return importlib.import_module(name)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = load("suite", monkeypatch)
    # The table has tests of its own, and its process would import torch after every part.
    run = module.subprocess.run
    quick = lambda command, **kwargs: run([sys.executable, "-c", ""], **kwargs)  # noqa: E731
    monkeypatch.setattr(module.subprocess, "run", quick)
    return module


@pytest.fixture
def suite(runner: Any, tmp_path: Path) -> Any:
    return runner.Suite(tmp_path / "out", tmp_path / "keep")


def part(runner: Any, name: str, code: str, seconds: float = 20.0, **rest: Any) -> Any:
    prelude = "import os, sys, time\nout = os.environ['GPU_SUITE_OUT']\n"
    return runner.Part(name, seconds, (sys.executable, "-S", "-c", prelude + code), **rest)


def kept(folder: Path) -> dict[str, str]:
    with tarfile.open(folder / "keep" / "gpu_suite.tgz") as tar:
        return {m.name: tar.extractfile(m).read().decode() for m in tar.getmembers()}  # type: ignore[union-attr]


def test_what_a_call_plans_fits_its_budget(runner: Any, suite: Any) -> None:
    calls = []
    for _ in range(3):
        calls.append(suite.chosen(runner.BUDGET_S))
        for part in calls[-1]:
            if part in runner.MEASURED:
                suite.set_state(part.name, "done in 3 s")
    first = [p.name for p in calls[0]]
    assert first[:6] == ["build", "new", "warm", "variants", "counters", "first"], (
        "what no GPU has run comes first"
    )
    assert {"passes", "correctness", "sketch", "model"} <= set(first)
    assert {p for call in calls for p in call} >= set(runner.MEASURED), "three calls are everything"
    for call in calls:
        assert call[0].name == "build" and len(set(call)) == len(call)
        assert sum(p.seconds for p in call) <= runner.BUDGET_S
    names = next(names for call in calls if "project" in (names := [p.name for p in call]))
    assert names.index("cuda") < names.index("project"), "what a part needs comes before it"


def test_what_failed_comes_after_what_has_no_result(suite: Any, runner: Any) -> None:
    for name in ("new", "variants", "counters", "passes", "correctness"):
        suite.set_state(name, "done in 1 s")
    suite.set_state("first", "failed in 30 s")
    suite.set_state("sketch", "stopped at its limit in 90 s")
    names = [p.name for p in suite.chosen(runner.BUDGET_S)]
    assert names[:3] == ["build", "warm", "sketch"] and "first" not in names[:-1]
    for p in runner.MEASURED:
        suite.set_state(p.name, "done in 1 s")
    suite.set_state("first", "failed in 30 s")
    assert [p.name for p in suite.chosen(runner.BUDGET_S)] == ["build", "warm", "first"]


def test_results_are_kept_after_every_part(runner: Any, suite: Any, tmp_path: Path) -> None:
    writes = "open(f'{out}/{name}.jsonl', 'w').write('{\"name\": \"a\"}\\n')\n"
    look = f"import shutil; shutil.copy({str(tmp_path / 'keep' / 'gpu_suite.tgz')!r}, {str(tmp_path / 'seen.tgz')!r})"
    one = part(runner, "one", "name = 'one'\n" + writes)
    two = part(runner, "two", "name = 'two'\n" + writes + look)
    assert suite.run([one, two])
    with tarfile.open(tmp_path / "seen.tgz") as tar:  # as it was while the second part ran
        assert "one.jsonl" in tar.getnames() and "two.jsonl" not in tar.getnames()
    assert {"one.jsonl", "two.jsonl", "one.log", "status.txt"} <= set(kept(tmp_path))


def test_time_that_parts_leave_is_used(runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another call would build again. What failed is not tried twice in a call."""
    note = "open(f'{out}/order.txt', 'a').write('%s ')\n"
    build = part(runner, "build", note % "build", 20.0, needs=())
    one = part(runner, "one", note % "one" + "sys.exit(1)", 20.0, needs=("build",))
    two = part(runner, "two", note % "two", 30.0, needs=("build",))
    monkeypatch.setattr(runner, "MEASURED", (one, two))
    monkeypatch.setattr(runner, "PARTS", {p.name: p for p in (build, one, two)})
    suite = runner.Suite(tmp_path / "out", tmp_path / "keep", budget=45.0)
    parts = suite.chosen(45.0)
    assert parts == [build, one] and not suite.run(parts, go_on=True)
    assert (tmp_path / "out" / "order.txt").read_text(encoding="utf-8").split() == ["build", "one", "two"]


def test_the_table_is_made_once_when_all_has_run(
    runner: Any, suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[str]] = []

    def report(command: list[str], **kwargs: Any) -> SimpleNamespace:
        made.append(sorted(suite.states()))
        Path(command[-1]).write_text("a table", encoding="utf-8")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(runner.subprocess, "run", report)
    assert suite.run([part(runner, "one", "pass"), part(runner, "two", "pass")])
    assert made == [["one", "two"]] and kept(tmp_path)["gpu.md"] == "a table"
    assert (tmp_path / "keep" / "gpu.md").read_text() == "a table" and len(
        list((tmp_path / "keep").iterdir())
    ) == 2


def test_a_part_that_fails_or_hangs_costs_itself_alone(runner: Any, suite: Any, tmp_path: Path) -> None:
    row = "open(f'{out}/slow.jsonl', 'a').write('{\"name\": \"a\"}\\n')\n"
    child = "import subprocess; subprocess.Popen([sys.executable, '-S', '-c', "
    late = f"import time; time.sleep(3); open({str(tmp_path / 'late')!r}, 'w')"
    parts = [
        part(runner, "broken", "sys.exit(3)"),
        part(runner, "slow", row + child + repr(late) + "])\ntime.sleep(60)", seconds=1.0),
        part(runner, "good", "pass"),
    ]
    start = time.monotonic()
    assert not suite.run(parts) and time.monotonic() - start < 20
    states = suite.states()
    assert states["broken"].startswith("failed") and states["slow"].startswith("stopped at its limit")
    assert states["good"].startswith("done") and "slow.jsonl" in kept(tmp_path)
    time.sleep(2.2)
    assert not (tmp_path / "late").exists(), "what a stopped part started goes on"


def test_a_lost_device_costs_one_attempt(runner: Any, suite: Any, tmp_path: Path) -> None:
    """The process ends with the status that asks for a new one, which goes on behind the attempt."""
    code = (
        "path = f'{out}/lost.jsonl'\n"
        "n = len(open(path).readlines()) if os.path.exists(path) else 0\n"
        "while n < 5:\n"
        "    bad = n == 2\n"
        '    open(path, "a").write(\'{"name": "%d"%s}\\n\' % (n, \', "error": "CUDA error"\' if bad else ""))\n'
        "    n += 1\n"
        "    if bad: sys.exit(75)\n"
    )
    assert not suite.run([part(runner, "lost", code)])
    assert len(kept(tmp_path)["lost.jsonl"].splitlines()) == 5 and "1 restarts" in suite.states()["lost"]


def test_a_device_that_stays_lost_ends_the_part(runner: Any, suite: Any) -> None:
    assert not suite.run([part(runner, "lost", "sys.exit(75)")])
    assert suite.states()["lost"].startswith("failed")


def test_attempts_are_shared_by_processes(runner: Any, suite: Any, tmp_path: Path) -> None:
    code = "i = os.environ['GPU_SUITE_SHARD']\nopen(f'{out}/many.{i[0]}.jsonl', 'w').write('{\"name\": \"%s\"}\\n' % i)"
    assert suite.run([part(runner, "many", code, processes=3)])
    got = kept(tmp_path)
    assert [json.loads(got[f"many.{i}.jsonl"])["name"] for i in range(3)] == ["0/3", "1/3", "2/3"]


def test_a_second_call_keeps_what_the_first_measured(runner: Any, suite: Any, tmp_path: Path) -> None:
    rows = [{"name": "a", "ms": 1.0}, {"name": "b", "error": "RuntimeError: x"}, {"name": "c", "ok": False}]
    (tmp_path / "out" / "sketch.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    suite.set_state("sketch", "stopped at its limit in 90 s")
    suite.archive()
    elsewhere = runner.Suite(tmp_path / "other" / "out", tmp_path / "other" / "keep")
    elsewhere.take_over(tmp_path / "keep" / "gpu_suite.tgz")
    again = part(runner, "sketch", "print(open(f'{out}/sketch.jsonl').read())")
    elsewhere.run([again])
    assert kept(tmp_path / "other")["sketch.jsonl"] == '{"name": "a", "ms": 1.0}\n', (
        "what failed is measured again"
    )
    elsewhere.take_over(tmp_path / "keep" / "gpu_suite.tgz")  # a third call that names the archive once more
    assert elsewhere.states()["sketch"].startswith("done"), "what was measured since is kept"


def test_no_part_begins_when_the_time_is_up(runner: Any, tmp_path: Path) -> None:
    suite = runner.Suite(tmp_path / "out", tmp_path / "keep", budget=5.0)
    assert not suite.run([part(runner, "one", "pass")])
    assert "time was up" in suite.states()["one"] and "status.txt" in kept(tmp_path)


def test_logs_are_cut(runner: Any, suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "LOG_BYTES", 100)
    suite.run([part(runner, "loud", "print('x' * 5000 + 'end')")])
    assert len(kept(tmp_path)["loud.log"]) == 100 and kept(tmp_path)["loud.log"].endswith("end\n")


def test_unknown_parts_are_refused(
    runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("GPU_SUITE_OUT", str(tmp_path / "out"))
    monkeypatch.setenv("GPU_SUITE_KEEP", str(tmp_path / "keep"))
    monkeypatch.setenv("GPU_SUITE_PARTS", "sketch skech")
    assert (
        runner.main() == 2 and "names skech: the parts are build, warm, cuda, new" in capsys.readouterr().err
    )


# ------------------------------------------------------------------------------------------------ rows of a part
@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("GPU_SUITE_OUT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return load("common", monkeypatch)


def rows(tmp_path: Path, name: str) -> dict[str, Any]:
    return {r["name"]: r for r in map(json.loads, (tmp_path / name).read_text().splitlines())}


def test_known_rows_are_not_measured_again(common: Any, tmp_path: Path) -> None:
    common.Results("p").attempt("a", lambda: {"ms": 1.0})
    results = common.Results("p")
    results.attempt("a", lambda: pytest.fail("measured twice"))
    results.attempt("b", lambda: {"ok": False})
    assert rows(tmp_path, "p.jsonl")["a"]["ms"] == 1.0
    with pytest.raises(SystemExit) as left:
        results.finish()
    assert left.value.code == 1
    with pytest.raises(SystemExit) as left:  # and it stays a failure when the part was started again
        common.Results("p").finish()
    assert left.value.code == 1


def test_shards_make_every_attempt_once(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for i in range(3):
        monkeypatch.setenv("GPU_SUITE_SHARD", f"{i}/3")
        results = common.Results("p")
        for name in "abcdefgh":
            results.attempt(name, lambda n=name: made.append(n) or {})
    assert sorted(made) == list("abcdefgh") and made[:3] == ["a", "d", "g"]
    assert set(rows(tmp_path, "p.1.jsonl")) == {"b", "e", "h"}


@pytest.mark.parametrize(
    "message,lost",
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: misaligned address", True),
        ("Triton Error [CUDA]: unspecified launch failure", True),
        ("CUDA error: out of memory", False),
        ("Triton Error [CUDA]: out of memory", False),
        ("d has 3 columns", False),
    ],
)
def test_only_a_lost_device_ends_the_process(
    message: str, lost: bool, common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(common.os, "_exit", ended.append)

    def breaks() -> dict[str, Any]:
        raise RuntimeError(message)

    results = common.Results("p")
    results.attempt("a", breaks)
    assert ended == ([common.RESTART] if lost else []) and message in rows(tmp_path, "p.jsonl")["a"]["error"]
    common.Results("p").attempt("a", lambda: pytest.fail("the attempt that broke it is made again"))


def test_attempts_end_with_the_part(common: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_SUITE_PART_ENDS", str(time.time() + 3))
    common.Results("p").attempt("a", lambda: pytest.fail("it cannot end in time"))
    assert "time was up" in rows(tmp_path, "p.jsonl")["a"]["error"]


def test_both_files_mean_the_same_status(common: Any, runner: Any) -> None:
    assert common.RESTART == runner.RESTART
    for row in ({"ok": False}, {"error": "x"}, {"error": 0.1, "ok": True}, {"ok": True}, {}):
        assert common.bad(row) == runner.failed(row)
