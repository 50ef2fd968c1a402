"""The environment's torch is pinned to the release that pip knows, so that pip keeps it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "scripts").is_dir(), reason="needs the project's own files")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the default build is the CPU's")
def test_a_place_without_a_cpu_build_is_no_error_and_others_say_what_failed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("install_torch", ROOT / "scripts" / "install_torch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done, tried = subprocess.run, []

    def run(command: list[str], **options: Any) -> Any:
        """PyPI, which has none and says so; an index that is not reached; then any build."""
        tried.append(command)
        script = f"import sys; sys.exit('ERROR {len(tried)}')" if len(tried) < 3 else ""
        return done([sys.executable, "-c", script], **options)

    monkeypatch.setattr(subprocess, "run", run)
    module.install(Path("pins.txt"), "2.13.0", None)
    assert len(tried) == 3 and "torch==2.13.0+cpu" in tried[0]
    first, error, second = capfd.readouterr().err.splitlines()
    told = (
        "torch: `pip install torch==2.13.0+cpu --quiet --constraint pins.txt` failed; another place is tried"
    )
    assert first == told and error == "ERROR 2" and second.endswith("failed; another place is tried")


@pytest.mark.long
@pytest.mark.parametrize("release", ["2.13.0", "2.13.0+cpu"])
def test_pip_keeps_the_torch_that_is_there(release: str, tmp_path: Path) -> None:
    site = tmp_path / "site"
    for name, text in {
        # What PyPI's own file calls itself has the CUDA release behind it, and pip's name for it has not.
        "torch/__init__.py": f"__version__ = '{release.split('+')[0]}+cu130'\n",
        f"torch-{release}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {release}\n",
        f"torch-{release}.dist-info/RECORD": "",
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    pins, out = tmp_path / "constraints.txt", tmp_path / "pins.txt"
    pins.write_text("torch==2.13.0\nnumpy==2.4.6\n")
    env = {**os.environ, "PYTHONPATH": str(site)}

    def run(*args: object) -> None:
        done = subprocess.run(
            [sys.executable, *map(str, args)], env=env, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run(ROOT / "scripts" / "install_torch.py", pins, out)
    assert out.read_text().split() == ["numpy==2.4.6", f"torch=={release}"]
    run("-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "-c", out, "torch>=2.6")
