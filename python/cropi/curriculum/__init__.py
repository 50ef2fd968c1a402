"""The staged curriculum: select with the current policy, train on the selection, and again (arXiv 2510.26491).

``docs/curriculum.md`` shows it from the user's side. :class:`Plan` says what to do, :func:`run` does it and goes on
where an earlier run stopped.
"""

from __future__ import annotations

from cropi.curriculum.loop import run
from cropi.curriculum.plan import Plan

__all__ = ["Plan", "run"]
