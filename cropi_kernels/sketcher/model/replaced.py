"""A module's ``forward`` with a tap's in its place, and what stands beneath it for a sketcher that comes later.

A live sketcher stays on the model for a whole training, and validation prompts are sketched in between: the second
sketcher must see the module's own code, and not the first one's. Nor must a copy of the model that is made meanwhile
(a reference policy, an average of weights) run on the model's weights: so what takes the place is a bound method, which
a deep copy binds to the copy's own module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import nn


class Replaced:
    """A module's ``forward``, replaced by ``run(module, original, *args, **kwargs)`` until `remove`.

    ``run`` must be a function of a module or a bound method: a deep copy of the model would share what a closure holds.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self.run = module, run
        self.before: Any = vars(module).get("forward")
        self.original = module.forward
        self.active = True
        module.forward = self.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:  # beneath another wrapper, which keeps it
            return self.original(*args, **kwargs)
        return self.run(self.module, self.original, *args, **kwargs)

    def remove(self) -> None:
        """Take it out, from beneath later ones too."""
        self.active = False
        above, top = None, _replaced(vars(self.module).get("forward"))
        while top is not None and top is not self:
            above, top = top, _replaced(top.before)
        if above is not None and top is self:
            above.before, above.original = self.before, self.original
        elif top is self and self.before is None:
            vars(self.module).pop("forward")
        elif top is self:
            self.module.forward = self.before


def _replaced(forward: Any) -> Replaced | None:
    """The `Replaced` whose method ``forward`` is, if it is one."""
    owner = getattr(forward, "__self__", None)
    return owner if isinstance(owner, Replaced) else None


def beneath(original: Any) -> Iterator[Callable[..., Any]]:
    """What runs in a module's place beneath the `Replaced` whose original forward is ``original``, top first."""
    while (tap := _replaced(original)) is not None:
        if tap.active:
            yield tap.run
        original = tap.original


def own_forward(module: nn.Module) -> Any | None:
    """What was put in the place of the class's forward, beneath all taps; None: nothing was."""
    forward = vars(module).get("forward")
    while (tap := _replaced(forward)) is not None:
        forward = tap.before
    return forward


class Parallel(NamedTuple):
    """What transformers' tensor-parallel plan puts in the place of a forward: the class of its style, and that forward,
    which it calls."""

    style: str
    forward: Callable[..., Any]


def parallel_of(module: nn.Module) -> Parallel | None:
    """None: no such plan replaced the module's forward."""
    forward: Any = own_forward(module)
    code = getattr(forward, "__code__", None)
    if code is None or not str(getattr(forward, "__module__", "")).startswith("transformers.distributed."):
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in forward.__closure__ or ())))
    if "original_forward" not in cells:
        return None
    style = cells.get("self")
    kind = type(style).__name__ if style is not None else str(forward.__qualname__).split(".")[0]
    return Parallel(kind, cells["original_forward"])


def forward_beneath(module: nn.Module) -> Any:
    """The forward that runs beneath all taps and a tensor-parallel plan, bound to the module."""
    parallel = parallel_of(module)
    return parallel.forward if parallel else own_forward(module) or type(module).forward.__get__(module)
