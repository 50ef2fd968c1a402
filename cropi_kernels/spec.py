"""What a sketch is: the handful of numbers that define the random linear map S: R^P -> R^dim."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal, get_args

from . import _spec_base as base

Kind = Literal["slab", "countsketch", "dropout", "kron", "tensor"]
KINDS: tuple[Kind, ...] = get_args(Kind)

VERSION = 1  # of the integers behind a sketch; rises whenever one hash, sign or address changes
# Kinds whose integers have changed since version 1. From version 2 on, these two are the CountSketch of
# `cropi_kernels.project`: a change of its version raises theirs.
VERSIONS: dict[str, int] = {"countsketch": 2, "dropout": 2}
FOLDS = {"width": 1 << 16, "vocab_width": 1 << 20}  # fields of kind slab alone, and the largest values
SLAB_SIZE = 32768  # entries of one slab; smaller sketches are folded from it, larger ones use several


@dataclasses.dataclass(frozen=True)
class SketchSpec(base.Spec):
    """A sketch ``S`` with ``E<S g, S h> = <g, h>``, defined by integers only (docs/sketch.md). All but ``dim`` are
    keyword arguments.

    >>> SketchSpec(4096, width=128).dim
    4096

    Args:
        dim: numbers per sketch, a power of two from 64 to 2^20. The standard error of a cosine is about
            ``1 / sqrt(dim)``. A ``slab`` sketch of 32768 can be reduced to a smaller dim afterwards (`reduce_sketch`).
        kind: ``slab`` (the fast one), or for comparison ``countsketch`` (`project` of the formed gradient), ``dropout``
            (CROPI: keep a share of the coordinates, then CountSketch), ``kron`` (dense Rademacher projections of both
            sides) and ``tensor`` (TensorSketch by FFT).
        width: features that a linear layer's inputs are folded to before the sketch, a power of two from 16 on, or
            ``None`` for no fold. Divides the matrix work by ``in_features / width``. A gradient of few matrices and few
            tokens (an MLP, an image model) has a larger error with a fold, up to ``1 / sqrt(width)``. Of ``slab``
            alone: the other kinds fold nothing, and take the default and ``None`` alone (:meth:`from_dict` takes what
            stored specs have).
        vocab_width: rows that a tied head / embedding is folded to, a power of two, or ``None`` for no fold; likewise.
        keep: share of the coordinates that ``dropout`` keeps, in (0, 1]; rounded to 65536ths.
        seed: any integer >= 0; different seeds are independent sketches.
        version: of the kind's definition (None: this build's); a stored sketch of another version cannot be compared
            with this one.

    Raises:
        ValueError: names the field, its value and what it may be.
    """

    dim: int = 32768
    _: dataclasses.KW_ONLY
    kind: Kind = "slab"
    width: int | None = 64
    vocab_width: int | None = 8192
    keep: float = 1.0
    seed: int = 0
    version: int = None  # type: ignore[assignment]  # never None in a spec that was made
    _noun: ClassVar[str] = "sketch"

    def __post_init__(self) -> None:
        self._hold(dim=base.check_power_of_two("dim", self.dim, 64, 1 << 20))
        for name in FOLDS:
            self._hold(**{name: _check_fold(name, getattr(self, name))})
        self._hold(kind=base.check_kind(self.kind, KINDS), seed=base.check_int("seed", self.seed, 0))
        self._hold(keep=base.check_keep(self.keep))
        if self.keep != 1.0 and self.kind != "dropout":
            raise ValueError(f"keep={self.keep!r} needs kind='dropout', not kind={self.kind!r}")
        for about in dataclasses.fields(self):
            value = getattr(self, about.name)
            if about.name in FOLDS and self.kind != "slab" and value not in (about.default, None):
                raise ValueError(
                    f"{about.name}={value!r} needs kind='slab'; kind={self.kind!r} folds nothing: leave it out"
                )
        built = VERSIONS.get(self.kind, VERSION)
        given = built if self.version is None else self.version
        self._hold(version=base.check_version(given, built, "sketch", "sketches", f" of kind={self.kind!r}"))
        super().__post_init__()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SketchSpec:
        """The spec with these fields, as it was stored: with any fold, whether its kind looks at it or not.

        Raises:
            ValueError: names the field that is unknown, or has a value that it may not have.
        """
        unused = [name for name in FOLDS if name in fields and fields.get("kind", "slab") != "slab"]
        spec = super().from_dict({name: value for name, value in fields.items() if name not in unused})
        spec._hold(**{name: _check_fold(name, fields[name]) for name in unused})
        base.Spec.__post_init__(spec)  # its recipe has them
        return spec

    @property
    def base_dim(self) -> int:
        """Numbers that the kernels accumulate into; reduced to ``dim`` at the end."""
        return max(self.dim, SLAB_SIZE) if self.kind == "slab" else self.dim


def _check_fold(name: str, value: Any) -> int | None:
    if value is None:
        return None
    return base.check_power_of_two(name, value, 16, FOLDS[name], " or None for no fold")
