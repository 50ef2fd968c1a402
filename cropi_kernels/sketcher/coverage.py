"""Which parameters of a model are sketched, and which are left out on purpose: the report, and the error."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which of a model's numbers are in the sketch; printed, a table.

    Attributes:
        total: numbers in all parameters, a tied one counted once: those covered, excluded and frozen.
        covered: numbers that are sketched.
        by_kind: the same by the kind of parameter: ``linear``, ``bias``, ``norm``, ``embedding``, ``head``.
        names: canonical names of the covered parameters.
        excluded: numbers of every trainable parameter that the caller left out, by canonical name.
    """

    total: int
    covered: int
    by_kind: dict[str, int]
    names: tuple[str, ...]
    excluded: dict[str, int]

    def __str__(self) -> str:
        lines = [
            f"sketched {self.covered:,} of {self.total:,} parameters ({self.covered / max(1, self.total):.1%})"
        ]
        lines += [f"  {kind:<10} {count:>14,}" for kind, count in sorted(self.by_kind.items())]
        if self.excluded:
            lines.append(f"  {'excluded':<10} {sum(self.excluded.values()):>14,}  {', '.join(self.excluded)}")
        return "\n".join(lines)


class UncoveredParameterError(ValueError):
    """A trainable parameter that no tap can sketch and that the user has not excluded."""


def uncovered(problem: str, lines: Sequence[str], pattern: str) -> UncoveredParameterError:
    """The error for what ``lines`` name; ``pattern`` is an example of what to exclude."""
    listed = "".join(f"  {line}\n" for line in lines)
    return UncoveredParameterError(
        f"{problem}:\n{listed}freeze them, or leave them out by name: exclude=[{pattern!r}, ...]"
    )
