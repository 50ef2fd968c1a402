"""Run the notebooks of a folder in the repository's root; an error in a cell ends this script with an error.

    python scripts/run_notebooks.py examples/notebooks [--write]

Executed copies go to build/notebooks; with ``--write`` the notebooks themselves get the outputs.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks of a folder in the repository's root.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write", action="store_true", help="give the notebooks themselves the outputs, too")
    args = parser.parse_args()

    import nbformat
    from nbclient import NotebookClient

    out = ROOT / "build" / "notebooks"
    out.mkdir(parents=True, exist_ok=True)
    paths = sorted(args.folder.glob("*.ipynb"))
    if not paths:
        sys.exit(f"{args.folder} holds no notebook")
    for path in paths:
        begun, notebook = time.monotonic(), nbformat.read(path, as_version=4)

        # A cell takes minutes where it trains: what runs is said before it runs.
        def say(cell: Any, cell_index: int, name: str = path.name, cells: int = len(notebook.cells)) -> None:
            print(f"{name}: cell {cell_index + 1} of {cells}", flush=True)

        client = NotebookClient(
            notebook,
            timeout=1800,
            kernel_name="python3",
            resources={"metadata": {"path": ROOT}},
            on_cell_execute=say,
        )
        client.execute()
        for cell in notebook.cells:  # times of execution are left out of a notebook
            cell.metadata.pop("execution", None)
        notebook.metadata.pop("language_info", None)
        nbformat.write(notebook, out / path.name)
        if args.write:
            nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells in {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
