"""What prompts begin with in common, and in which pieces a batch of them is processed, so that it is computed once.

Prompts are of one *family* where each shares half of its tokens or more with the family's beginning: one system message
and its solved examples, one document with many questions. A batch is processed in up to three levels: what all prompts
begin with, then the beginning of every family, then the rest of every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SHORTEST = 8  # tokens that are worth a forward of their own
SHARE = 0.5  # of a prompt's tokens are its family's

Tokens = Sequence[int]


@dataclass(frozen=True)
class Level:
    """Rows of a batch that go on: row i with ``pieces[i]``, from row ``parents[i]`` of the level before."""

    parents: list[int]
    pieces: list[list[int]]


def common_length(prompts: Sequence[Tokens]) -> int:
    """How many tokens all prompts begin with; each keeps one of its own at least."""
    return min(_same(min(prompts, key=list), max(prompts, key=list)), min(map(len, prompts)) - 1)


def families(prompts: Sequence[Tokens]) -> list[list[int]]:
    """The numbers of the prompts, family by family; most prompts of most sets are alone in theirs."""
    groups: list[list[int]] = []
    begin = 0  # tokens that the last family begins with
    for i in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        if groups:
            same = min(begin, _same(prompts[groups[-1][-1]], prompts[i]))
            if same >= max(SHORTEST, SHARE * len(prompts[i]), SHARE * len(prompts[groups[-1][0]])):
                groups[-1].append(i)
                begin = same
                continue
        groups.append([i])
        begin = len(prompts[i])
    return groups


def levels(prompts: Sequence[Tokens]) -> list[Level]:
    """In which levels a batch is processed; one alone where nothing is shared that is worth it."""
    made: list[Level] = []
    shared = common_length(prompts) if len(prompts) > 1 else 0
    if shared >= SHORTEST:
        made.append(Level([0], [list(prompts[0][:shared])]))
    else:
        shared = 0
    rest = [list(prompt[shared:]) for prompt in prompts]
    groups = families(prompts)
    if 1 < len(groups) < len(prompts):
        begins = [common_length([rest[i] for i in group]) if len(group) > 1 else 0 for group in groups]
        width = max(
            len(rest[i]) - begin for group, begin in zip(groups, begins) if len(group) > 1 for i in group
        )
        # A prompt alone is cut where the others are, so that its end is no longer than theirs.
        begins = [
            begin if len(group) > 1 else max(0, len(rest[group[0]]) - width)
            for group, begin in zip(groups, begins)
        ]
        if len(groups) * max(begins) + len(rest) * width < len(rest) * max(map(len, rest)):
            parents = {i: number for number, group in enumerate(groups) for i in group}
            made.append(Level([0] * len(groups), [rest[g[0]][:begin] for g, begin in zip(groups, begins)]))
            tails = [piece[begins[parents[i]] :] for i, piece in enumerate(rest)]
            return [*made, Level([parents[i] for i in range(len(rest))], tails)]
    return [*made, Level([0] * len(rest), rest)]


def _same(a: Tokens, b: Tokens) -> int:
    """How many tokens two prompts begin with."""
    same = 0
    for one, other in zip(a, b):
        if one != other:
            break
        same += 1
    return same
