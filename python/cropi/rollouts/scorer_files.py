"""Which files a reward function is made of: that of its name, and the modules beside it that this one imports.

Found by reading, without running anything. Not among them: installed packages, unless the function is in one, of which
its own modules are; files of data; modules that are imported by names made up while running.
"""

from __future__ import annotations

import os
import sys
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

INSTALLED = {"site-packages", "dist-packages"}


def files_of(place: str) -> list[Path]:
    """The files, that of the name first; none where it leads to no Python source.

    Args:
        place: how the module is named: a path that ends in ``.py``, or the dotted name of one that is imported.
    """
    by_path = place.endswith(".py")
    file = place if by_path else getattr(sys.modules.get(place), "__file__", None)
    if not file or not file.endswith(".py"):
        return []
    own = Path(os.path.realpath(file))
    # From which its own modules are imported.
    root = own.parents[0 if by_path else place.count(".") + (own.name == "__init__.py")]
    finder = _Beside(
        str(root), None if by_path or not INSTALLED & set(root.parts) else place.partition(".")[0]
    )
    try:
        if by_path:
            finder.run_script(str(own))
        else:
            finder.import_hook(place)
    # A file that is no Python, or a package of another kind: what is found so far counts.
    except (ImportError, SyntaxError, ValueError, OSError):
        pass
    held = {str(getattr(one, "__file__", "")) for one in finder.modules.values()}
    return [own, *sorted({Path(file) for file in held if file.endswith(".py")} - {own})]


class _Beside(ModuleFinder):
    """Finds what is below a folder; ``top``: modules of this package alone."""

    def __init__(self, folder: str, top: str | None) -> None:
        super().__init__([folder])
        self.top = top

    def find_module(self, name: str, path: Any, parent: Any = None) -> Any:
        if path is None and self.top not in (None, name):
            raise ImportError(name)
        return super().find_module(name, path, parent)
