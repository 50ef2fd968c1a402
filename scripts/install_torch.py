"""Put torch into this environment: the CPU build wherever pip can find one, never touching a torch that is there.

    python scripts/install_torch.py CONSTRAINTS OUT [--borrow PYTHON] [--index URL]

Reads the wanted version from the constraints file, and writes OUT: the same file with torch pinned to what is
really installed, so that no later install can swap it for another build. `--borrow` uses the torch of another
interpreter (a GPU machine's own, say) instead of installing one; then only torch stays pinned in OUT, because the
rest of that interpreter's packages were chosen to go with it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

# PyTorch's own index of CPU builds: on Linux the default file is the CUDA build, several GB with what it needs.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# The version as pip knows it: PyPI's 2.13.0 calls itself 2.13.0+cu130, and pip takes a pin to that for another release.
WHERE = (
    "import importlib.metadata, pathlib, torch; "
    "print(importlib.metadata.version('torch'), pathlib.Path(torch.__file__).parent.parent)"
)


def torch_of(python: str) -> tuple[str, str] | None:
    """(version of the release, folder that holds the package) of the torch that `python` imports, or None."""
    done = subprocess.run([python, "-c", WHERE], capture_output=True, text=True, cwd="/")
    if done.returncode:
        return None
    version, folder = done.stdout.strip().split(" ", 1)
    return version, folder


def pip(*args: str, errors: bool = True) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *args]
    # PyPI has no CPU build under its name: pip's red errors, which no -q hides, were what a new user saw first.
    return subprocess.run(command, stderr=None if errors else subprocess.DEVNULL).returncode == 0


def install(constraints: Path, version: str, index: str | None) -> None:
    """The index that was asked for; else a CPU build from pip's own indexes, PyTorch's CPU index, or any build."""
    pins = ["--constraint", str(constraints)]
    if index:  # it may carry other versions of torch's own dependencies than the pinned ones
        attempts = [[f"torch=={version}", "--index-url", index]]
    elif sys.platform == "linux":
        attempts = [
            [f"torch=={version}+cpu", "--quiet", *pins],
            [f"torch=={version}+cpu", "--extra-index-url", CPU_INDEX, *pins],
            [f"torch=={version}", *pins],
        ]
    else:
        attempts = [[f"torch=={version}", *pins]]
    for attempt in attempts:
        last = attempt is attempts[-1]
        if pip(*attempt, errors=last or attempt is not attempts[0]):
            return
        more = "" if last else "; another place is tried"
        print(f"torch: `pip install {' '.join(attempt)}` failed{more}", file=sys.stderr)
    sys.exit(
        f"torch {version} could not be installed for Python {sysconfig.get_python_version()}. Name a torch you have: "
        "`make ... PYTHON=/path/to/a/python/with/torch`, or an index that carries one: `make ... TORCH_INDEX=URL`."
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("constraints", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--borrow", help="another interpreter whose torch is used if it has one")
    parser.add_argument("--index", help="the only index to take torch from")
    args = parser.parse_args()

    pins = args.constraints.read_text(encoding="utf-8").splitlines()
    wanted = next(match[1] for line in pins if (match := re.match(r"torch==(\S+)", line)))
    own = torch_of(sys.executable)
    lent = torch_of(args.borrow) if args.borrow and own is None else None
    if lent:
        # A path file puts the other interpreter's packages behind this environment's own.
        site = Path(sysconfig.get_path("purelib"))
        (site / "borrowed_torch.pth").write_text(lent[1] + "\n")
    elif own is None:
        install(args.constraints, wanted, args.index)
    have = torch_of(sys.executable)
    if have is None:
        sys.exit("torch was installed but does not import; run `python -c 'import torch'` there to see why.")
    version = have[0]
    keep = [] if (own or lent) and version.split("+")[0] != wanted else pins
    args.out.write_text(
        "\n".join([line for line in keep if not line.startswith("torch==")] + [f"torch=={version}", ""])
    )
    print(f"torch {version} from {have[1]}")


if __name__ == "__main__":
    main()
