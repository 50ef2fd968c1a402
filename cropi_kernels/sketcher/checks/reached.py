"""Parameters with which a model computes, and which no gradient reaches: autograd gives them none either, silently."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from ..._level import level_of_caller
from ...names import listed
from .listener import Listener, Source

LISTED = 20
SAID = (
    "the model computes with them, and a part behind them has no derivative (a base whose activations are quantised, a "
    "detach, no_grad)"
)


def unreached(
    taps: Mapping[int, Sequence[Source]],
    names: Mapping[int, tuple[str, ...]],
    frozen: Listener,
    reached: set[str],
) -> str:
    """What is wrong where no parameter has a gradient; else "", with a warning where some have none.

    Args:
        taps, names: of the groups of parameters that are compared as one.
        frozen: what the taps gave over frozen weights.
        reached: parameters with a gradient other than 0.
    """
    known = [name for group in taps for name in names[group]]
    silent = [
        name
        for group, mine in taps.items()
        if not any(tap in frozen.sums for tap in mine) and any(tap in frozen.called for tap in mine)
        for name in names[group]
    ]
    if known and not reached.intersection(known) and (silent or frozen.sums):
        return (
            f"none of the {len(known)} sketched parameters has a gradient other than 0 on a few tokens, in plain "
            f"autograd either ({listed(sorted(known), LISTED)}): {SAID}. Load the model in another way, or leave out "
            "this test: verify=False"
        )
    if silent:
        warnings.warn(
            f"no gradient reaches {listed(silent, LISTED)} on a few tokens: {SAID}",
            stacklevel=level_of_caller(),
        )
    return ""
