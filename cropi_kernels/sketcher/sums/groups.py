"""Groups of parameters, whose sketches are kept apart in one pass.

A coordinate of the sketch depends on the parameter's name and shape alone, so that the groups' sketches add up to that
of all parameters. Every gradient is added once, to its group's sums: a pass takes as long as it does without groups.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping, Sequence

from ...names import listed
from ...spec import SketchSpec
from ..model.ranks import Ranks

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


def planned(
    patterns: Mapping[str, Sequence[str]] | None, names: Sequence[str], ranks: Ranks | None
) -> Groups | None:
    """`groups_of` where there are groups; ``ranks``: among which the model is split, if it is.

    Raises:
        ValueError: as `groups_of`; or the model is spread over ranks, which add up one sketch.
    """
    if patterns is None:
        return None
    if ranks is not None:
        raise ValueError(
            "groups: the model is spread over ranks, which add up one sketch: leave the groups out"
        )
    return groups_of(patterns, names)


def width(spec: SketchSpec, groups: Groups | None) -> int:
    """The sums of a segment, of all groups."""
    return spec.base_dim * (1 if groups is None else len(groups.names))
