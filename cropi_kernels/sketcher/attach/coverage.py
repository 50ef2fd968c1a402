"""Which parameters of a model are sketched, and which are left out on purpose: the report, the error, and what tells
the sketches of one model from those of another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..batch.inputs import known_ids
from ..model.precision import unwrapped


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which of a model's parameters are in the sketch, and how many numbers they have. Printed, it is a table.

    Attributes:
        total: numbers in all parameters, a tied one counted once: those covered, excluded and frozen.
        covered: numbers that are sketched.
        by_kind: the same by the kind of parameter: ``linear``, ``bias``, ``norm``, ``embedding``, ``head``; ``exact``:
            small ones that the model uses in a way of its own, whose gradient is formed.
        names: canonical names of the covered parameters; shapes: the shape of each, by its name.
        excluded: numbers of every trainable parameter that the caller left out, by canonical name.
        uncovered: the same of those that ``exclude="uncovered"`` left out.
        fused: modules that ``fused=True`` replaces by kernels, by kind (``RMSNorm``, ``SwiGLU``).
        unfused: such modules that it leaves as they are, by name, and why.

    >>> GradientSketcher(torch.nn.Linear(4, 4), SketchSpec(1024), ["bias"]).coverage.excluded
    {'bias': 4}
    """

    total: int
    covered: int
    by_kind: dict[str, int]
    names: tuple[str, ...] = dataclasses.field(repr=False)
    excluded: dict[str, int]
    uncovered: dict[str, int] = dataclasses.field(default_factory=dict)
    fused: dict[str, int] = dataclasses.field(default_factory=dict)
    unfused: dict[str, str] = dataclasses.field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        lines = [
            f"sketched {self.covered:,} of {self.total:,} parameters ({self.covered / max(1, self.total):.1%})"
        ]
        lines += [f"  {kind:<10} {count:>14,}" for kind, count in sorted(self.by_kind.items())]
        for what, left_out in (("excluded", self.excluded), ("uncovered", self.uncovered)):
            if left_out:
                size = sum(left_out.values())
                share = f"{size / max(1, self.total):.2%}"
                lines.append(f"  {what:<10} {size:>14,}  ({share} of all): {', '.join(left_out)}")
        lines += [f"  fused      {count:>14,}  {kind} modules" for kind, count in self.fused.items()]
        lines += [f"  not fused  {name} ({why})" for name, why in self.unfused.items()]
        return "\n".join(lines)


class UncoveredParameterError(ValueError):
    """Trainable parameters that no tap can sketch and that the user has not excluded.

    >>> issubclass(UncoveredParameterError, ValueError)
    True
    """


def uncovered(problem: str, lines: Sequence[str], pattern: str, share: float) -> UncoveredParameterError:
    """The error for what ``lines`` name; ``pattern`` is an example of what to exclude, ``share`` what they hold of all
    parameters."""
    listed = "".join(f"  {line}\n" for line in lines)
    return UncoveredParameterError(
        f"{problem} ({share:.2%} of all parameters):\n{listed}freeze them, or leave them out by name: "
        f"exclude=[{pattern!r}, ...]; exclude='uncovered' leaves out all of them"
    )


def origin_of(model: nn.Module, coverage: Coverage) -> dict[str, Any]:
    """Of which model and parameters sketches are, in JSON's types.

    Returns:
        ``parameters``: the shape of each sketched parameter, by its canonical name; of one that is spread over ranks,
        that of the whole. Where the model has them: ``model``, the type that its configuration names, and
        ``vocabulary``, the rows of its embedding of tokens.

    >>> from cropi_kernels import GradientSketcher, SketchSpec
    >>> GradientSketcher(nn.Linear(3, 2), SketchSpec(1024)).origin
    {'parameters': {'weight': [2, 3], 'bias': [2]}}
    """
    made: dict[str, Any] = {"parameters": {name: list(shape) for name, shape in coverage.shapes.items()}}
    inner = unwrapped(model)
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    if isinstance(kind, str) and kind:
        made["model"] = kind
    rows = known_ids(inner)
    if rows is not None:
        made["vocabulary"] = rows
    return made
