"""Adapters that bring selection into a trainer: ``cropi.trainers.trl``.

No trainer is imported before it is used, so ``import cropi.trainers`` costs nothing.
"""

from __future__ import annotations
