"""What tells whether a selection can be trusted: the check of a model on its own data, and the report page."""

from __future__ import annotations

import warnings
from typing import Any

_MOVED = ("PLOTS", "best_and_worst", "last_message", "plot_scores", "prompt_texts")


def __getattr__(name: str) -> Any:
    """The names of the first release's module ``cropi.report``, which are in ``cropi.ranking.report``."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cropi.ranking import report

    warnings.warn(
        f"cropi.report.{name} is now cropi.ranking.report.{name}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    return getattr(report, name)
