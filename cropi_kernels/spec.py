"""What a sketch is: the handful of numbers that define the random linear map S: R^P -> R^dim."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

Kind = Literal["slab", "countsketch", "dropout", "kron", "tensor"]
KINDS: tuple[Kind, ...] = ("slab", "countsketch", "dropout", "kron", "tensor")

VERSION = 1  # of the integers behind a sketch; rises whenever one hash, sign or address changes
SLAB_SIZE = 32768  # entries of one slab; smaller sketches are folded from it, larger ones use several


@dataclasses.dataclass(frozen=True)
class SketchSpec:
    """A sketch ``S`` with ``E<S g, S h> = <g, h>``, defined by integers only (docs/sketch.md).

    Args:
        dim: numbers per sketch, a power of two from 64 to 2^20. The standard error of a cosine is about
            ``1 / sqrt(dim)``. A ``slab`` sketch of 32768 can be reduced to a smaller dim afterwards (`reduce_sketch`).
        width: features that a linear layer's inputs are folded to before the sketch, a power of two from 16 on, or
            ``None`` for no fold. Divides the matrix work by ``in_features / width``.
        vocab_width: rows that a tied head / embedding is folded to, a power of two, or ``None`` for no fold.
        kind: ``slab`` (the fast one), or for comparison ``countsketch`` (one hash per coordinate), ``dropout`` (CROPI:
            keep a share of the coordinates, then CountSketch), ``kron`` (dense Rademacher projections of both sides)
            and ``tensor`` (TensorSketch by FFT).
        keep: share of the coordinates that ``dropout`` keeps, in (0, 1].
        seed: any integer >= 0; different seeds are independent sketches.
        version: of the definition; a stored sketch of another version cannot be compared with this one.

    Raises:
        ValueError: names the field, its value and what it may be.
    """

    dim: int = 32768
    width: int | None = 64
    kind: Kind = "slab"
    seed: int = 0
    vocab_width: int | None = 8192
    keep: float = 1.0
    version: int = VERSION

    def __post_init__(self) -> None:
        _check_power_of_two("dim", self.dim, 64, 1 << 20)
        if self.width is not None:
            _check_power_of_two("width", self.width, 16, 1 << 16, " or None for no fold")
        if self.vocab_width is not None:
            _check_power_of_two("vocab_width", self.vocab_width, 16, 1 << 20, " or None for no fold")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: choose one of {', '.join(KINDS)}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed={self.seed!r}: give an integer >= 0")
        if not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep!r}: give the share of coordinates to keep, in (0, 1]")
        if self.keep != 1.0 and self.kind != "dropout":
            raise ValueError(f"keep={self.keep!r} needs kind='dropout', not kind={self.kind!r}")
        if self.version != VERSION:
            raise ValueError(
                f"version={self.version!r}: this build defines version {VERSION}; sketch again, or install the "
                "release that wrote the stored sketches"
            )
        # Made here and not when it is asked for: a call may be traced, which json is not for.
        object.__setattr__(self, "_recipe", json.dumps(self.to_dict()))

    @property
    def recipe(self) -> str:
        """The spec as an operator's schema takes it: JSON."""
        return self._recipe  # type: ignore[attr-defined]

    @property
    def base_dim(self) -> int:
        """Numbers that the kernels accumulate into; reduced to ``dim`` at the end."""
        return max(self.dim, SLAB_SIZE) if self.kind == "slab" else self.dim

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SketchSpec:
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"unknown sketch field {unknown[0]!r}: known are {', '.join(sorted(known))}")
        return cls(**fields)

    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly for equal specs."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _check_power_of_two(field: str, value: Any, low: int, high: int, extra: str = "") -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or not low <= value <= high
        or value & (value - 1)
    ):
        raise ValueError(f"{field}={value!r}: give a power of two from {low} to {high}{extra}")
