"""Run the notebooks of a folder in the repository's root; an error in a cell ends this script with an error.

    python scripts/run_notebooks.py examples/notebooks [--write]

Executed copies go to build/notebooks; with ``--write`` the notebooks themselves get the outputs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    folder, write = Path(sys.argv[1]), "--write" in sys.argv
    out = ROOT / "build" / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(folder.glob("*.ipynb"))
    if not paths:
        sys.exit(f"{folder} holds no notebook")
    for path in paths:
        begun, notebook = time.monotonic(), nbformat.read(path, as_version=4)
        client = NotebookClient(
            notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": ROOT}}
        )
        client.execute()
        for cell in notebook.cells:  # times of execution are left out of a notebook
            cell.metadata.pop("execution", None)
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, out / path.name)
        if write:
            nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
