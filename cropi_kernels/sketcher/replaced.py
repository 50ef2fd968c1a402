"""A module's ``forward`` with a tap's in its place, and what stands beneath it for a sketcher that comes later.

A live sketcher stays on the model for a whole training, and validation prompts are sketched in between: the second
sketcher must see the module's own code, and not the first one's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

_BENEATH: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # of each forward that is a tap's


class Replaced:
    """A module's ``forward``, replaced until `remove`."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.module, self.before = module, vars(module).get("forward")
        _BENEATH[forward] = self.before
        module.forward = forward

    def remove(self) -> None:
        if self.before is None:
            vars(self.module).pop("forward", None)
        else:
            self.module.forward = self.before


def own_forward(module: nn.Module) -> Any | None:
    """What was put in the place of the class's forward, beneath all taps; None: nothing was."""
    forward = vars(module).get("forward")
    while forward is not None and forward in _BENEATH:
        forward = _BENEATH[forward]
    return forward
