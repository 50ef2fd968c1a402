"""What an installed wheel must be able to do with torch and numpy alone; run from outside the source tree.

python smoke_wheel.py        (`make wheel` and the release do it, in a fresh environment)
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import torch

import cropi
import cropi_kernels
from cropi_kernels import _C, _native
from cropi_kernels.ops.sketch_linear import sketch_linear
from cropi_kernels.plan import plan_matrix
from cropi_kernels.spec import SketchSpec


def check_place() -> None:
    """The package under test is the installed one, and nothing but torch and numpy came with it."""
    installed = Path(sys.prefix).resolve()
    for module in (cropi_kernels, _C):
        assert installed in Path(module.__file__).resolve().parents, (
            f"{module.__file__} is not in {installed}"
        )
    assert importlib.metadata.version("cropi-kernels") == cropi_kernels.__version__
    for absent in ("transformers", "pyarrow", "pytest"):
        assert importlib.util.find_spec(absent) is None, f"{absent} is here: this is no clean environment"


def check_files() -> None:
    """Code, types and the report's page; no documents of the source tree."""
    files = importlib.metadata.files("cropi-kernels") or []
    kinds = {path.suffix for path in files if path.parts[0] in ("cropi", "cropi_kernels")}
    assert kinds - {".pyc"} == {".py", ".so", ".typed", ".html", ".css", ".js"}, kinds


def check_names() -> None:
    """Every public name is there without the extras; what needs one says which to install."""
    for package in (cropi, cropi_kernels):
        for name in package.__all__:
            getattr(package, name)
    try:
        importlib.import_module("cropi.sklearn")
    except ModuleNotFoundError as error:
        assert "cropi-kernels[sklearn]" in str(error), error
    else:
        raise AssertionError("scikit-learn is here: this is no clean environment")


def check_description() -> None:
    """What PyPI will show: the README, without a link relative to the repository."""
    metadata = importlib.metadata.metadata("cropi-kernels")
    shown = metadata.get_payload()
    assert metadata["Description-Content-Type"] == "text/markdown" and "# cropi-kernels" in shown
    links = re.findall(r"\]\(([^)\s]*)\)", shown)
    relative = [link for link in links if not link.startswith("https://")]
    assert links and not relative, f"these links lead nowhere on PyPI: {relative}"


def check_kernel() -> None:
    """One sketch by the C++ kernel against the float64 reference, for each instruction set of this machine."""
    torch.manual_seed(0)
    plan = plan_matrix(SketchSpec(), "layers.0.mlp.up_proj.weight", 192, 320)
    d, a = torch.randn(50, 192), torch.randn(50, 320)
    offsets = torch.tensor([0, 20, 20, 50])
    exact = torch.zeros(3, 32768, dtype=torch.float64)
    sketch_linear(d.double(), a.double(), offsets, plan, exact, backend="reference")
    best = _C.detected_level()
    for level in sorted({1, 3, 4} & set(range(best + 1))):
        _C.set_level(level)
        fast = torch.zeros(3, 32768)
        sketch_linear(d, a, offsets, plan, fast, backend="cpu")
        error = float((fast - exact).norm() / exact.norm())
        print(f"sketch_linear, instruction set {level}: relative error {error:.1e}")
        assert error < 1e-6, f"level {level} is off by {error}"
        assert not fast[1].any(), "a segment without tokens must stay zero"
    _C.set_level(best)
    assert _native.native() is _C


def check_command() -> None:
    """`cropi --help` works without the extras; a command that needs them says which to install."""
    command = str(Path(sys.executable).with_name("cropi"))
    shown = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "sketch" in shown.stdout, shown.stdout + shown.stderr
    # A good file: the files are read first, and only then is the missing extra met.
    Path("one.jsonl").write_text(
        '{"id": "a", "prompt": "1+1=", "responses": ["2", "3"], "rewards": [1, 0]}\n', encoding="utf-8"
    )
    refused = subprocess.run(
        [command, "sketch", "--model", "nowhere", "--trajectories", "one.jsonl", "--out", "out"],
        capture_output=True,
        text=True,
    )
    text = refused.stdout + refused.stderr
    assert refused.returncode != 0 and "Traceback" not in text, text
    assert "cropi-kernels[run]" in text, f"the message must name the extra to install: {text}"


if __name__ == "__main__":
    check_place()
    check_files()
    check_names()
    check_description()
    check_kernel()
    check_command()
    print("smoke test passed")
