"""Groups of parameters whose sketches are kept apart, so that scores say which layers they come from.

Nothing here imports torch: the options name groups, and ``cropi --help`` is quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cropi.errors import CropiError
from cropi.option_fields import Options, option

BEFORE, AFTER = "embeddings", "head"  # the groups of what comes before the layers, and after them
_LAYER = re.compile(r"(.*?\.)?(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Grouping(Options):
    """Which parameters' sketches are kept apart."""

    layer_groups: int | None = option(
        None,
        "keep the sketches of so many groups of consecutive layers apart, and those of what comes before and after the "
        "layers, so that scores are told for each group too; a row of the store is as many times as long "
        "(docs/method.md)",
        kind="count",
        metavar="N",
        shown="one sketch of all",
    )
    groups: Sequence[str] | Mapping[str, Sequence[str]] = option(
        (),
        "the same for named groups of parameters, e.g. 'attention=*attn*' 'mlp=*mlp*' 'others=rest': patterns of "
        "parameter names, or rest for what no other group has",
        metavar="NAME=PATTERN,...",
        shown="one sketch of all",
        many=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_groups is not None and self.groups:
            raise CropiError(f"layer_groups is {self.layer_groups} and groups are named: give one of both")
        read_groups(self.groups)

    @property
    def grouped(self) -> bool:
        """Whether sketches are kept apart."""
        return self.layer_groups is not None or bool(self.groups)

    @property
    def most_groups(self) -> int:
        """How many groups there are at most; 1 where sketches are not kept apart."""
        return len(self.groups) or (1 if self.layer_groups is None else self.layer_groups + 2)

    def patterns(self, names: Sequence[str]) -> dict[str, list[str]] | None:
        """Patterns of parameter names by group, in the order of the sketches; None without groups.

        Args:
            names: of the parameters that are sketched, in the model's order.

        Raises:
            CropiError: ``layer_groups`` does not fit the model.
        """
        if self.layer_groups is not None:
            return layer_groups(names, self.layer_groups)
        return read_groups(self.groups) or None


def read_groups(given: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Groups as options give them: a mapping of names to patterns, or ``NAME=PATTERN,PATTERN`` each.

    >>> read_groups(["attention=*q_proj*,*k_proj*", "others=rest"])
    {'attention': ['*q_proj*', '*k_proj*'], 'others': ['rest']}

    Raises:
        CropiError: what is neither, or a name twice.
    """
    if isinstance(given, Mapping):
        for name, own in given.items():
            if not isinstance(name, str) or isinstance(own, str) or not isinstance(own, Sequence) or not own:
                raise CropiError(
                    f"groups: {name!r} has {own!r:.100}: give a list of patterns, e.g. ['*mlp*']"
                )
        return {name: list(own) for name, own in given.items()}
    read: dict[str, list[str]] = {}
    for text in given:
        name, _, patterns = text.partition("=")
        own = patterns.split(",")
        if not name or not all(own):
            raise CropiError(
                f"groups: {text!r} is not NAME=PATTERN,PATTERN, e.g. 'attention=*attn*' or 'others=rest'"
            )
        if name in read:
            raise CropiError(
                f"groups name {name!r} twice: give all of its patterns at once, with commas between them"
            )
        read[name] = own
    return read


def layer_groups(names: Sequence[str], count: int) -> dict[str, list[str]]:
    """Groups of consecutive layers, about equally many in each; what comes before the layers in the model's order
    (:data:`BEFORE`) and after them (:data:`AFTER`) is a group of its own, where it is sketched.

    >>> names = ["embed.weight", *(f"layers.{i}.up.weight" for i in range(3)), "norm.weight"]
    >>> for name, patterns in layer_groups(names, 2).items():
    ...     print(name, patterns)
    embeddings ['embed.weight']
    layer 0 ['layers.0.*']
    layers 1-2 ['layers.1.*', 'layers.2.*']
    head ['norm.weight']

    Args:
        names: of the parameters that are sketched, in the model's order.
        count: of groups of layers.

    Raises:
        CropiError: no name holds the number of a layer, or there are fewer layers than groups.
    """
    matches = [_LAYER.match(name) for name in names]
    numbers: dict[str, set[int]] = {}
    for match in matches:
        if match is not None:
            numbers.setdefault(match[1] or "", set()).add(int(match[2]))
    if not numbers:
        raise CropiError(
            f"layer_groups={count}: no parameter's name holds the number of a layer (e.g. {names[0]}); name the groups "
            "by patterns: groups"
        )
    stem = max(numbers, key=lambda one: len(numbers[one]))
    layers = sorted(numbers[stem])
    if count > len(layers):
        raise CropiError(
            f"layer_groups={count}: {len(layers)} layers are sketched ({stem}...); give at most as many"
        )
    places = [i for i, match in enumerate(matches) if match is not None and (match[1] or "") == stem]
    inside = set(places)
    made = {BEFORE: list(names[: places[0]])}
    for i in range(count):
        own = layers[i * len(layers) // count : (i + 1) * len(layers) // count]
        name = f"layer {own[0]}" if len(own) == 1 else f"layers {own[0]}-{own[-1]}"
        made[name] = [f"{stem}{layer}.*" for layer in own]
    made[AFTER] = [name for i, name in enumerate(names) if i > places[0] and i not in inside]
    return {name: own for name, own in made.items() if own}
