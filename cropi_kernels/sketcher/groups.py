"""Groups of parameters, whose sketches are kept apart in one pass.

A coordinate of the sketch depends on the parameter's name and shape alone, so that the groups' sketches add up to that
of all parameters. Every gradient is added once, to its group's sums: a pass takes as long as it does without groups.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..names import listed
from ..plan import VectorPlan
from ..spec import SketchSpec
from .engine import CpuEngine, Norm, Operators, Site, engine_for
from .gpu_engine import GpuEngine
from .segments import Segments
from .slab import MatrixSketch

if TYPE_CHECKING:
    from .attach import Attachment

REST = "rest"  # as the one pattern of a group: what no other group has
LISTED = 5  # parameters that an error names


@dataclasses.dataclass(frozen=True)
class Groups:
    """``names`` of the groups, in order, and the place of each parameter's group by the parameter's name."""

    names: tuple[str, ...]
    place: Mapping[str, int]


def groups_of(patterns: Mapping[str, Sequence[str]], names: Sequence[str]) -> Groups:
    """Which group each parameter belongs to.

    >>> groups_of({"attention": ["*.self_attn.*"], "others": ["rest"]}, ["0.self_attn.q.weight", "0.mlp.up.weight"])
    Groups(names=('attention', 'others'), place={'0.self_attn.q.weight': 0, '0.mlp.up.weight': 1})

    Args:
        patterns: for each group fnmatch patterns of canonical parameter names, or ``["rest"]``.
        names: of the parameters that are sketched.

    Raises:
        ValueError: no group; a value that is not a list of patterns; a pattern that matches nothing; parameters in no
            group, or in two. Names them.
    """
    if not isinstance(patterns, Mapping) or not patterns:
        raise ValueError(
            f"groups={patterns!r:.100}: give {{name: [patterns of parameter names]}}, at least one"
        )
    place: dict[str, int] = {}
    rest = None
    for number, (group, own) in enumerate(patterns.items()):
        if (
            isinstance(own, str)
            or not isinstance(own, Sequence)
            or not own
            or not all(isinstance(p, str) for p in own)
        ):
            raise ValueError(
                f"groups: {group!r} has {own!r:.100}: give a list of patterns, e.g. ['*.mlp.*'] or ['rest']"
            )
        if REST in own:
            if len(own) > 1 or rest is not None:
                raise ValueError(
                    f"groups: 'rest' stands alone, in one group: {group!r} has {list(own)!r:.100}"
                )
            rest = number
            continue
        for pattern in own:
            matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(
                    f"groups: {pattern!r} of {group!r} matches no parameter that is sketched (e.g. {names[0]})"
                )
            if twice := [name for name in matched if place.get(name, number) != number]:
                other = list(patterns)[place[twice[0]]]
                raise ValueError(
                    f"groups: {other!r} and {group!r} both have {listed(twice, LISTED)}: change a pattern"
                )
            place.update(dict.fromkeys(matched, number))
    if left := [name for name in names if name not in place]:
        if rest is None:
            raise ValueError(
                f"groups: none has {listed(left, LISTED)}: add patterns, or a group with the pattern 'rest', or "
                "exclude them"
            )
        place.update(dict.fromkeys(left, rest))
    elif rest is not None:
        raise ValueError(f"groups: no parameter is left for {list(patterns)[rest]!r}, the rest: leave it out")
    return Groups(tuple(patterns), place)


def planned(patterns: Mapping[str, Sequence[str]] | None, plan: Attachment) -> Groups | None:
    """The groups of what a model's taps sketch; None without groups.

    Raises:
        ValueError: as `groups_of`; or the model is spread over ranks, which add up one sketch.
    """
    if patterns is None:
        return None
    if plan.ranks is not None:
        raise ValueError(
            "groups: the model is spread over ranks, which add up one sketch: leave the groups out"
        )
    return groups_of(patterns, plan.coverage.names)


def width(spec: SketchSpec, groups: Groups | None) -> int:
    """The sums of a segment, of all groups."""
    return spec.base_dim * (1 if groups is None else len(groups.names))


class Grouped(Operators):
    """An engine for each group: a gradient goes to the engine of its parameter's.

    Args:
        outs: the groups' sums, float32 [segments, base_dim] each.
        expected: what an earlier batch `needed`.
    """

    def __init__(
        self, segments: Segments, outs: Sequence[torch.Tensor], groups: Groups, expected: int = 0
    ) -> None:
        super().__init__(segments, outs[0][:, :0])  # nothing can be added to it
        needed = dict.fromkeys((CpuEngine, GpuEngine), expected)
        self.engines = [engine_for(segments, out, needed) for out in outs]
        self._place = groups.place

    def _of(self, name: str) -> Operators:
        return self.engines[self._place[name]]

    @property
    def needed(self) -> int:
        return max(engine.needed for engine in self.engines)

    @needed.setter
    def needed(self, value: int) -> None:
        """The engines count it."""

    def settled(self) -> list[torch.Tensor]:
        return [engine.settle() for engine in self.engines]

    def sums(self, name: str) -> torch.Tensor:
        return self._of(name).settle()

    def fold(self, x: torch.Tensor, matrix: MatrixSketch, site: Site) -> torch.Tensor:
        return self.engines[0].fold(x, matrix, site)  # one block of memory for all groups

    def add_linear(self, dy: torch.Tensor, kept: torch.Tensor, matrix: MatrixSketch, site: Site) -> None:
        self._of(matrix.name).add_linear(dy, kept, matrix, site)

    def add_rows(self, dy: torch.Tensor, ids: torch.Tensor, matrix: MatrixSketch, site: Site) -> None:
        self._of(matrix.name).add_rows(dy, ids, matrix, site)

    def add_bias(self, dy: torch.Tensor, plan: VectorPlan, site: Site) -> None:
        self._of(plan.name).add_bias(dy, plan, site)

    def add_norm(self, dy: torch.Tensor, x: torch.Tensor, norm: Norm, site: Site) -> None:
        owners = {self._of(plan.name) for plan in (norm.weight, norm.bias) if plan is not None}
        if len(owners) == 1:
            owners.pop().add_norm(dy, x, norm, site)
            return
        assert norm.weight is not None and norm.bias is not None
        self._of(norm.weight.name).add_norm(dy, x, dataclasses.replace(norm, bias=None), site)
        self._of(norm.bias.name).add_bias(dy, norm.bias, site)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.engines[0].rms_norm(x, weight, eps)

    def add_rms_norm(
        self,
        dy: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        norm: Norm,
        site: Site,
    ) -> torch.Tensor:
        assert norm.weight is not None
        return self._of(norm.weight.name).add_rms_norm(dy, x, weight, scale, norm, site)

    def swiglu(
        self, gate: torch.Tensor, up: torch.Tensor, matrix: MatrixSketch | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.engines[0].swiglu(gate, up, matrix)

    def swiglu_backward(
        self, dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.engines[0].swiglu_backward(dh, gate, up)

    def add_vector(self, gradients: torch.Tensor, plan: VectorPlan) -> None:
        self._of(plan.name).add_vector(gradients, plan)

    def add_grouped(
        self, dy: torch.Tensor, kept: torch.Tensor, ranges: torch.Tensor, matrix: MatrixSketch
    ) -> None:
        self._of(matrix.name).add_grouped(dy, kept, ranges, matrix)

    def add_grouped_bias(self, dy: torch.Tensor, ranges: torch.Tensor, plan: VectorPlan) -> None:
        self._of(plan.name).add_grouped_bias(dy, ranges, plan)
