"""What a projection is: the handful of numbers that define the random linear map S: R^P -> R^dim."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import ClassVar, Literal

from ... import _spec_base as base
from ..._spec_base import KEEP_ALL
from ...philox import key_of
from ...spec import SketchSpec

Kind = Literal["countsketch", "sjlt", "rademacher", "gaussian"]
KINDS: tuple[Kind, ...] = ("countsketch", "sjlt", "rademacher", "gaussian")

VERSION = 1  # of the integers behind a projection; rises whenever one bucket, sign or draw changes
MAX_DIM = 1 << 24
MAX_NNZ = 64
MAX_COORDINATE = 1 << 62


@dataclasses.dataclass(frozen=True)
class ProjectionSpec(base.Spec):
    """A random linear map ``S`` with ``E<S x, S y> = <x, y>``, defined by integers only (docs/project.md). All
    but ``dim`` are keyword arguments.

    Args:
        dim: numbers per projected row, 1 to 2^24. The standard error of a cosine is about ``1 / sqrt(dim)``.
            On a CPU all dims from 64 on cost about the same, on a GPU multiples of 16 (of ``16 * nnz``) are fast.
        kind: ``countsketch`` (one nonzero per coordinate: the speed of reading the input), ``sjlt`` (``nnz`` nonzeros,
            one in each of ``nnz`` blocks of buckets), or dense ``rademacher`` and ``gaussian``: ``dim`` products per
            coordinate, drawn while they are used.
        nnz: nonzeros per coordinate of ``sjlt``, a divisor of ``dim``, 1 to 64.
        keep: share of all coordinates that is kept before the projection (CROPI's dropout), the same for every row;
            rounded to 65536ths. Kept coordinates are scaled by ``1 / sqrt(keep)``.
        seed: any integer >= 0; different seeds are independent projections.
        stream: independent projections under one seed: the number of a checkpoint, say.
        size: number of coordinates P; input of another size raises ValueError. None: any size.
        version: of the definition; projections of different versions cannot be compared.

    Raises:
        ValueError: names the field, its value and what it may be.
    """

    dim: int
    _: dataclasses.KW_ONLY
    kind: Kind = "countsketch"
    nnz: int = 1
    keep: float = 1.0
    seed: int = 0
    stream: int = 0
    size: int | None = None
    version: int = VERSION
    _noun: ClassVar[str] = "projection"

    def __post_init__(self) -> None:
        self._hold(
            dim=base.check_int("dim", self.dim, 1, MAX_DIM),
            kind=base.check_kind(self.kind, KINDS),
            nnz=base.check_int("nnz", self.nnz, 1, MAX_NNZ),
        )
        if self.nnz != 1 and self.kind != "sjlt":
            raise ValueError(f"nnz={self.nnz} needs kind='sjlt', not kind={self.kind!r}")
        if self.dim % self.nnz:
            raise ValueError(
                f"nnz={self.nnz} must divide dim={self.dim}: every nonzero has dim / nnz buckets of its own"
            )
        self._hold(keep=base.check_keep(self.keep))
        self._hold(seed=base.check_int("seed", self.seed, 0), stream=base.check_int("stream", self.stream, 0))
        if self.size is not None:
            self._hold(size=base.check_int("size", self.size, 1, MAX_COORDINATE, " or None"))
        self._hold(version=base.check_version(self.version, VERSION, "project", "rows"))
        super().__post_init__()

    @property
    def width(self) -> int:
        """Buckets of one nonzero, and coordinates of a tile."""
        return self.dim // self.nnz

    @property
    def group(self) -> int:
        """Coordinates that move together: ``gcd(width, 16)``."""
        return math.gcd(self.width, 16)

    @property
    def keep_count(self) -> int:
        """65536ths of the coordinates that are kept."""
        return round(self.keep * KEEP_ALL)

    @property
    def key(self) -> tuple[int, int]:
        """The key of all draws (`cropi_kernels.philox`)."""
        return key_of(self.version, self.seed, f"project/{self.stream}")

    @property
    def sparse(self) -> bool:
        """Whether a coordinate meets ``nnz`` numbers of the result, and not all of them."""
        return self.kind in ("countsketch", "sjlt")

    @property
    def scale(self) -> float:
        """``1 / sqrt(keep)``, times ``1 / sqrt(nnz)`` or ``1 / sqrt(dim)`` for the dense kinds."""
        return (self.keep_count / KEEP_ALL * (self.nnz if self.sparse else self.dim)) ** -0.5


@functools.lru_cache(maxsize=16384)
def projection_of(spec: SketchSpec, name: str) -> ProjectionSpec:
    """The projection that a sketch of kind ``countsketch`` or ``dropout`` makes of the gradient of parameter ``name``.

    It has a stream of its own for every name: the first 8 bytes, little endian, of SHA-256(name). The gradient goes in
    row-major order, from coordinate 0 on.

    Raises:
        ValueError: ``spec`` is of another kind.
    """
    if spec.kind not in ("countsketch", "dropout"):
        raise ValueError(
            f"kind={spec.kind!r} is not a projection of formed gradients: give 'countsketch' or 'dropout'"
        )
    stream = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return ProjectionSpec(spec.dim, keep=spec.keep, seed=spec.seed, stream=stream)
