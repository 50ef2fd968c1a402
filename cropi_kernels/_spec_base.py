"""What the specs of sketches and of projections share: the checks of their fields, their ways in and out of text."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import operator
from typing import Any, ClassVar, TypeVar

S = TypeVar("S", bound="Spec")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Numbers and strings that define a random linear map, and nothing else does."""

    _noun: ClassVar[str]  # in messages

    def _hold(self, **fields: Any) -> None:
        """Sets fields of the frozen spec to their checked values."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        # As json.dumps writes it, which torch.compile cannot trace; made here, so that calls need not make it.
        pairs = (f'"{name}": {_as_json(value)}' for name, value in self.to_dict().items())
        object.__setattr__(self, "_recipe", f"{{{', '.join(pairs)}}}")

    @property
    def recipe(self) -> str:
        """The spec as an operator's schema takes it: JSON."""
        return self._recipe  # type: ignore[attr-defined]

    @classmethod
    @functools.lru_cache(maxsize=128)
    def from_recipe(cls: type[S], recipe: str) -> S:
        """The spec that has this `recipe`."""
        return cls.from_dict(json.loads(recipe))

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON and TOML take them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls: type[S], fields: dict[str, Any]) -> S:
        """The spec with these fields; those that are not named have their defaults.

        Raises:
            ValueError: names the field that is unknown, or has a value that it may not have.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"unknown {cls._noun} field {unknown[0]!r}: known are {', '.join(sorted(known))}"
            )
        return cls(**fields)

    def fingerprint(self) -> str:
        """16 hex digits that are equal exactly for equal specs."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _as_json(value: str | float | None) -> str:
    """A checked field: its strings are names, its numbers finite."""
    return "null" if value is None else f'"{value}"' if isinstance(value, str) else repr(value)


# -------------------------------------------------------------------------------------------------- checks
def as_int(value: Any, low: int, high: int | None = None) -> int | None:
    """``value`` as a Python integer from ``low`` to ``high``; None where it is not one.

    Integers of NumPy and torch, also as arrays without dimensions, are integers; True and False, of any library, are
    not.
    """
    if type(value) is int:  # nearly every call; a traced one can ask for no more
        return value if low <= value and (high is None or value <= high) else None
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) or _dimensions(value):
        return None
    try:
        whole = operator.index(value)
    except TypeError:
        return None
    return whole if low <= whole and (high is None or whole <= high) else None


def _dimensions(value: Any) -> int:
    return int(getattr(value, "ndim", 0))


def check_int(field: str, value: Any, low: int, high: int | None = None, extra: str = "") -> int:
    """``value`` as a Python integer, or a ValueError that names the field."""
    whole = as_int(value, low, high)
    if whole is None:
        limits = f"from {low} to {high}" if high is not None else f">= {low}"
        raise ValueError(f"{field}={value!r}: give an integer {limits}{extra}")
    return whole


def check_power_of_two(field: str, value: Any, low: int, high: int, extra: str = "") -> int:
    """As `check_int`, for powers of two."""
    whole = as_int(value, low, high)
    if whole is None or whole & (whole - 1):
        raise ValueError(f"{field}={value!r}: give a power of two from {low} to {high}{extra}")
    return whole


def check_kind(kind: Any, kinds: tuple[str, ...]) -> Any:
    """The name itself, whichever string type said it (an enumeration's, NumPy's)."""
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(kinds)}")
    return kinds[kinds.index(kind)]


KEEP_ALL = 1 << 16  # a share of coordinates is drawn in 65536ths


def check_keep(keep: Any) -> float:
    """``keep`` as a Python float: 1 and 1.0 are one spec, and must be one text."""
    dtype = str(getattr(keep, "dtype", type(keep).__name__))  # numbers of NumPy and torch are numbers
    number = any(kind in dtype for kind in ("float", "int")) and not _dimensions(keep)
    if not number or not 0.0 < keep <= 1.0:
        raise ValueError(f"keep={keep!r}: give the share of coordinates to keep, in (0, 1]")
    if round(float(keep) * KEEP_ALL) == 0:
        raise ValueError(f"keep={keep!r} rounds to 0 / 65536: give at least {1 / KEEP_ALL:.2e}")
    return float(keep)


def check_version(version: Any, built: int, again: str, stored: str, what: str = "") -> int:
    if version != built:
        raise ValueError(
            f"version={version!r}: this build defines version {built}{what}; {again} again, or install the release "
            f"that wrote the stored {stored}"
        )
    return built
