"""Influence-based choice of training prompts for reinforcement learning, on sketches of per-prompt policy
gradients.

The thin layer over ``cropi_kernels``: trajectories, estimators, the sketch store, influence, selection, the
report and the command line. Modules are imported where they are used, so that ``import cropi`` costs nothing.
"""

from __future__ import annotations

from cropi import _moved

_moved.install()
