"""Autograd's gradients as sketches: what the sums of a model's taps are compared with.

A tap may sketch several parameters, and a parameter may have several taps (a tied weight). So both are put into groups:
the taps of a group add up to the gradients of its parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn

from ...names import names_by_id
from ..attach.attachment import Attachment
from ..model.hooks import hooked, unless_none
from ..model.precision import smallest, unit_roundoff
from ..model.ranks import Copies
from ..model.sharded import hooked_whole, reshard, units
from ..model.spread import like_spread, settled
from .listener import Source, projected

# Adds the sketch of a gradient that exists (float32, the parameter's shape) to ``out`` [1, base_dim].
Add = Callable[[torch.Tensor, torch.Tensor], None]


class TapGroups:
    """The taps and parameters of a model in groups.

    Attributes:
        formed: every sketched parameter, and what adds the sketch of its gradient; by the parameter's id.
        taps: the taps of each group, by the group's number.
        group: the number of a parameter's group, by the parameter's id.
        members: the ids of the parameters of each group.
        names: the canonical names of the parameters of each group.
    """

    def __init__(self, plan: Attachment) -> None:
        reshard(plan.model)
        self.plan = plan
        names = names_by_id(plan.model)
        self.formed: dict[int, tuple[nn.Parameter, Add]] = {}
        self.taps: dict[int, list[Source]] = {}
        self.group: dict[int, int] = {}
        self.members: dict[int, list[int]] = {}
        sources: list[tuple[Source, list[tuple[nn.Parameter, Add]]]] = [
            (tap, tap.formed(module) if tap.adds else [(p, _add_nothing) for p, _ in tap.formed(module)])
            for module, tap in plan.taps.items()
        ]
        sources += [(one, [(one.parameter, one.add)]) for one in plan.exact.parameters]
        for tap, own in sources:
            for p, add in own:
                self.formed.setdefault(id(p), (p, add))
            group, *others = sorted({self.group.get(id(p), id(p)) for p, _ in own})
            taps, members = self.taps.setdefault(group, []), self.members.setdefault(group, [])
            for other in others:
                taps += self.taps.pop(other, [])
                members += self.members.pop(other, [])
            taps.append(tap)
            members += [id(p) for p, _ in own if id(p) not in self.group]
            self.group.update(dict.fromkeys(members, group))
        self.names = {g: tuple(names.get(i, "?") for i in members) for g, members in self.members.items()}
        self.known = {n for mine in self.names.values() for n in mine}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [p for p, _ in self.formed.values()]


def _add_nothing(gradient: torch.Tensor, out: torch.Tensor) -> None:
    """For a parameter whose gradient another rank adds."""


class FormedSums:
    """Sketches each gradient when autograd has formed it: only one exists at a time.

    Args:
        groups: the parameters and their groups.
        device: where sketches are made.
        leave: whether the gradients stay in the parameters, for an optimizer.

    Attributes:
        sums: the sketch of each group's gradients, summed down by `listener.projected`.
        floor: a bound of what each group's gradients lost below the smallest number of their dtype.
        unit: the coarsest unit roundoff of each group's gradients.
        copies: whether ranks that have the same parameter have the same gradient of it.
    """

    def __init__(self, groups: TapGroups, device: torch.device, leave: bool = False) -> None:
        self.groups, self.device, self.leave = groups, device, leave
        self.model, acc = groups.plan.model, groups.plan.acc
        self.dim, self.units = acc.spec.base_dim, units(self.model)
        self.copies = Copies(acc.ranks, groups.parameters)
        self.sums: dict[int, torch.Tensor] = {}
        self.floor: dict[int, float] = {}
        self.unit: dict[int, float] = {}

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Sketch the gradients of the backward passes that run inside."""
        takers = [(p, unless_none(self._taker(p, add))) for p, add in self.groups.formed.values()]
        if self.units:
            with hooked_whole(self.model, {id(p): taker for p, taker in takers}):
                yield
            return
        # Hooks run in the order in which they were registered: ours see what those of the model's owner have made.
        with hooked(p.register_hook(taker) for p, taker in takers):
            yield

    def _taker(self, p: nn.Parameter, add: Add) -> Callable[[torch.Tensor], torch.Tensor | None]:
        group = self.groups.group[id(p)]

        def take(gradient: torch.Tensor) -> torch.Tensor | None:
            out = torch.zeros(1, self.dim, dtype=torch.float32, device=self.device)
            here = settled(gradient.detach(), p)
            with torch.no_grad():
                add(here.to(torch.promote_types(here.dtype, torch.float32)), out)
            self.sums[group] = self.sums.get(group, 0.0) + projected(out)[0]
            self.copies.note(p, here)
            self.floor[group] = self.floor.get(group, 0.0) + smallest(here) * gradient.numel() ** 0.5
            self.unit[group] = max(self.unit.get(group, 0.0), unit_roundoff(here))
            if self.leave:
                return None
            nothing = here.new_zeros(()).expand_as(here)  # autograd keeps this: a gradient would stay
            return like_spread(nothing, gradient)

        return take
