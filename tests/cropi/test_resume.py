"""A job that was ended and goes on: the same bits as one that ran through, whatever ended it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import content, equal

from cropi.model.policy import Policy
from cropi.sketching.interrupt import Interrupt
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec


@pytest.mark.long
@pytest.mark.parametrize("budget", [20, 60, 200], ids=["rows of a prompt apart", "few rows", "many rows"])
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_resumed_store_has_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, layout: str
) -> None:
    """Stopped after every third row, again and again, until it is done."""
    policy = Policy(make_model(), make_tokenizer())
    path = write_lines(tmp_path / "t.jsonl", make_records(24))

    def job(out: str) -> SketchJob:
        return SketchJob(
            [path], tmp_path / out, SketchSpec(dim=1024), shard_rows=1, tokens_per_batch=budget, layout=layout
        )

    sketch(policy, job("whole"), progress=False)
    add, left = SketchStore.add, 0

    def stopping(store: SketchStore, *row: Any) -> list[str]:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        return add(store, *row)

    monkeypatch.setattr(SketchStore, "add", stopping)
    stops = 0
    while True:
        left = 3
        try:
            sketch(policy, job("cut"), progress=False)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 5, "it was hardly stopped at all"
    whole, cut = content(tmp_path / "whole"), content(tmp_path / "cut")
    assert whole.keys() == cut.keys() and len(whole) == 24
    assert equal(whole, cut)


# The process that runs the tests may ignore signals (nohup, a shell's background job), which its children inherit. The
# jobs are forks, since to import what they need takes longer than they do.
STOPPED = """
import gc, os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path[:0] = {path!r}
import torch
from support.made_data import make_model, make_tokenizer
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi_kernels import GradientSketcher, SketchSpec

compute = GradientSketcher.policy_gradient
def slow(*args, **kwargs):
    print("pass", flush=True)
    time.sleep(0.2)
    return compute(*args, **kwargs)
GradientSketcher.policy_gradient = slow
torch.set_num_threads(1)
policy = Policy(make_model(), make_tokenizer())
gc.freeze()  # a child that collects garbage would go through all modules
for out in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        print(os.getpid(), flush=True)
        job = SketchJob([sys.argv[1]], out, SketchSpec(dim=1024), tokens_per_batch=60)
        print("interrupted", sketch(policy, job, progress=False).interrupted, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print("ended", flush=True)
"""


@pytest.mark.long
def test_signals_of_schedulers_keep_what_is_done(tmp_path: Path) -> None:
    """SLURM and Kubernetes send SIGTERM first, a lost terminal sends SIGHUP: nothing that was computed is dropped."""
    path = write_lines(tmp_path / "t.jsonl", make_records(40))
    paths, names = [str(Path(__file__).parents[1]), *sys.path], ("SIGINT", "SIGTERM", "SIGHUP")
    words = [str(path), *(str(tmp_path / name) for name in names)]
    command = [sys.executable, "-c", STOPPED.format(path=paths), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for name in names:
        child = int(process.stdout.readline())
        for _ in range(3):
            assert process.stdout.readline() == "pass\n"
        os.kill(child, getattr(signal, name))
        said = [line for line in itertools.takewhile("ended\n".__ne__, process.stdout) if line != "pass\n"]
        assert said == ["interrupted True\n"], name
        store = SketchStore.open(tmp_path / name)
        assert 3 <= sum(row.status == "ok" for row in store.rows()) and len(store) < 40
    assert process.wait(timeout=60) == 0


def test_a_second_signal_acts_as_usual_and_an_ignored_one_stays_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "isatty", lambda fd: fd == 2)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    interrupting = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
            assert not interrupt.asked, "nohup"
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert interrupt.asked
            told = "\nstopping after this batch; Ctrl-C again stops at once\n"
            assert capfd.readouterr().err == told, "a terminal is told why nothing happens yet"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(signal.SIGINT, interrupting)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
