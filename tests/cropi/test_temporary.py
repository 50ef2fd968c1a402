"""Temporary files and folders do not outlive the command that made them, whatever ends it but SIGKILL."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.made_data import make_records, write_lines

# A signal comes while the copies are written; the jobs are forks, since imports take longer than they do.
ENDED = """
import os, signal, sys
import cropi.curriculum.state
from cropi.cli import main
from cropi.data import sources
from cropi.trainers.dumps import auto, steps

def end(*_):
    print(*os.listdir(os.environ["TMPDIR"]), flush=True)
    os.kill(os.getpid(), NUMBER)
auto.write_groups = steps.write_groups = sources.copy_to_temporary = end
for path, NUMBER in zip(sys.argv[1:], (signal.SIGTERM, signal.SIGHUP, signal.SIGTERM)):
    signal.signal(NUMBER, signal.SIG_DFL)
    child = os.fork()
    if child == 0:
        sys.exit(main(["info", path]))
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.long
def test_signals_leave_no_temporary_files(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "b", "score": 1.0, "step": k} for k in (1, 2)]
    for name, records in (("verl", [[row] for row in rows]), ("steps", 2 * [make_records(3)])):
        (tmp_path / name).mkdir()
        for k in (0, 1):
            write_lines(tmp_path / name / f"{k + 1}.jsonl", records[k])
    (tmp_path / "t").mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path / "t")}
    done = subprocess.run(
        [sys.executable, "-c", ENDED, str(tmp_path / "verl"), str(tmp_path / "steps"), "-"],
        env=environment, input=json.dumps(rows[0]), capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout.split()
    assert [name.split("-")[1] for name in said[::2]] == ["dump", "steps", "stdin"], done.stderr
    assert [int(status) for status in said[1::2]] == [signal.SIGTERM, signal.SIGHUP, signal.SIGTERM]
    assert not list((tmp_path / "t").iterdir())
