"""The environment names an instruction set: its kernels run, or the import says why not."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from cropi_kernels import _native

pytestmark = pytest.mark.long

CODE = "import torch, cropi_kernels; print(cropi_kernels.explain(torch.zeros(1, 1)))"


def run(named: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"CROPI_KERNELS_ISA": named}
    return subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)


def test_the_baseline_is_used_where_it_is_asked_for() -> None:
    done = run("baseline")
    assert done.returncode == 0 and "serves the call (baseline kernels)" in done.stdout, done.stderr


def test_other_names_and_wider_sets_than_there_are_end_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("sse9")
    assert done.returncode and "CROPI_KERNELS_ISA='sse9': give one of baseline, avx2, avx512" in done.stderr

    class Old:
        level = 0

        def detected_level(self) -> int:
            return 3

        def set_level(self, level: int) -> None:
            self.level = level

    old = Old()
    with pytest.raises(
        ImportError, match="'avx512': this processor, or the build of cropi_kernels, does not have"
    ):
        _native.apply_isa("avx512", old)
    _native.apply_isa("avx2", old)
    assert old.level == 3
    _native.apply_isa(None, old)
    assert old.level == 3
