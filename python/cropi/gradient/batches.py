"""Prompt groups to micro-batches: which responses share a row, which rows share a batch, and the index
arrays.

The sum of a prompt's sketches over micro-batches is the prompt's sketch, so any split gives the same result.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from cropi.gradient.estimators import Estimator
from cropi.gradient.layout import Layout
from cropi.gradient.masks import MOST_PAIRS, prefix_mask
from cropi.gradient.tokenize import TokenGroup
from cropi_kernels.sketcher.batch.host import sent


@dataclass(frozen=True)
class MicroBatch:
    """One call's worth of rows. ``S`` segments (prompts), ``B`` rows of ``L`` tokens, ``N`` scored tokens.

    Attributes:
        groups: the prompts of segments 0 .. S-1.
        finished: for each segment, whether this batch holds the last rows of its prompt.
        input_ids: int64 ``[B, L]``.
        present: int64 ``[B, L]``: 1 for tokens, 0 for padding.
        blocks: where responses share a row, int64 ``[B, L]``, of every token: 0 for the prompt, r for the row's r-th
            response, -1 for padding; else None.
        position_ids: int64 ``[B, L]``.
        segments: int64 ``[B]``, the segment of every row, non-decreasing.
        positions: int64 ``[N]``, where in the flattened ``[B * L]`` hidden states each scored token is
            predicted.
        targets: int64 ``[N]``, the token predicted there.
        token_segments: int64 ``[N]``.
        advantages, divisors: float32 ``[N]``, or ``[N, R]`` where some response stands for up to R equal ones:
            see :meth:`cropi.gradient.estimators.Estimator.weights`.
        behaviour: float32, stored behaviour log-probs, shaped like ``advantages``, or None.
        temperature: of the rollouts; one per batch.
        members: int64 ``[N]``, for how many equal responses each token stands; None: for one.
        responses: int64 ``[N]``, a number for each response, which all of its tokens share.
        scored_blocks: int64 ``[N]``, the block of each token's response, as in ``blocks``.
        noise: float32, shaped like ``advantages``: what is multiplied in their place; None: they themselves.
    """

    groups: list[TokenGroup]
    finished: list[bool]
    input_ids: torch.Tensor
    present: torch.Tensor
    blocks: torch.Tensor | None
    position_ids: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    token_segments: torch.Tensor
    advantages: torch.Tensor
    divisors: torch.Tensor
    behaviour: torch.Tensor | None
    temperature: float
    members: torch.Tensor | None = None
    responses: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    scored_blocks: torch.Tensor | None = None

    @property
    def attention_mask(self) -> torch.Tensor:
        """bool ``[B, 1, L, L]`` (shared) or int64 ``[B, L]`` (padded), made where the blocks are.

        On a GPU's host the masks of 32,768 tokens took 0.5 s, as long as the pass of a model of 1.5 billion parameters.
        """
        return self.present if self.blocks is None else prefix_mask(self.blocks)

    @property
    def tokens(self) -> int:
        """Tokens that go through the model, padding left out."""
        return int(self.present.sum())

    @property
    def reaches(self) -> list[int]:
        """The last position + 1 of every row."""
        return [int(n) + 1 for n in self.position_ids.amax(dim=1)]

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same batch with its tensors on ``device``; the host waits for no copy, and checks its own values."""
        tensors: dict[str, Any] = {
            k: sent(torch.device(device), v) for k, v in vars(self).items() if isinstance(v, torch.Tensor)
        }
        return replace(self, **tensors)

    @property
    def divisible(self) -> bool:
        """Whether it has several rows, or one in which several responses with scored tokens share the prompt."""
        return self.input_ids.shape[0] > 1 or len(self._shared) > 1

    def halves(self) -> tuple[MicroBatch, MicroBatch]:
        """The first and the second half of the rows, of a single row those of its responses; a prompt that is cut is
        finished in the second."""
        rows = self.input_ids.shape[0]
        if rows == 1:
            shared = self._shared
            middle = shared[len(shared) // 2]
            return self._blocks(0, middle), self._blocks(middle, shared[-1] + 1)
        return self._rows(0, rows // 2), self._rows(rows // 2, rows)

    @property
    def _shared(self) -> list[int]:
        """The blocks of all responses that share a prompt and have scored tokens."""
        if self.blocks is None or self.scored_blocks is None:
            return []
        return sorted(set(self.scored_blocks.tolist()))

    def _rows(self, begin: int, end: int) -> MicroBatch:
        """Rows ``begin .. end``; every scored token stays with its row."""
        length = self.input_ids.shape[1]
        chosen = (self.positions >= begin * length) & (self.positions < end * length)
        first, last = int(self.segments[begin]), int(self.segments[end - 1])
        finished = self.finished[first : last + 1]
        if end < len(self.segments) and int(self.segments[end]) == last:
            finished[-1] = False
        some = self._scored(chosen)
        return replace(
            some,
            groups=self.groups[first : last + 1],
            finished=finished,
            input_ids=self.input_ids[begin:end],
            present=self.present[begin:end],
            blocks=None if self.blocks is None else self.blocks[begin:end],
            position_ids=self.position_ids[begin:end],
            segments=self.segments[begin:end] - first,
            positions=some.positions - begin * length,
            token_segments=some.token_segments - first,
        )

    def _blocks(self, begin: int, end: int) -> MicroBatch:
        """Of the only row the prompt and the blocks ``begin .. end``, without padding."""
        assert self.blocks is not None and self.scored_blocks is not None
        kept = (self.blocks == 0) | ((self.blocks >= begin) & (self.blocks < end))
        ids, present, blocks, places = (
            of_tokens[kept][None]
            for of_tokens in (self.input_ids, self.present, self.blocks, self.position_ids)
        )
        some = self._scored((self.scored_blocks >= begin) & (self.scored_blocks < end))
        return replace(
            some,
            finished=[last and end > int(self.scored_blocks.max()) for last in self.finished],
            input_ids=ids,
            present=present,
            # One response needs no mask of its own.
            blocks=blocks if len(set(blocks.flatten().tolist())) > 2 else None,
            position_ids=places,
            positions=(kept.flatten().cumsum(0) - 1)[some.positions],
        )

    def _scored(self, chosen: torch.Tensor) -> MicroBatch:
        """The same rows with some of their scored tokens: bool ``[N]``."""
        return replace(
            self,
            positions=self.positions[chosen],
            targets=self.targets[chosen],
            token_segments=self.token_segments[chosen],
            advantages=self.advantages[chosen],
            divisors=self.divisors[chosen],
            behaviour=None if self.behaviour is None else self.behaviour[chosen],
            members=None if self.members is None else self.members[chosen],
            responses=None if self.responses is None else self.responses[chosen],
            noise=None if self.noise is None else self.noise[chosen],
            scored_blocks=None if self.scored_blocks is None else self.scored_blocks[chosen],
        )


@dataclass(frozen=True)
class Row:
    """Some responses of one prompt, in one row of the batch: the first ones of those that are equal."""

    group: TokenGroup
    chosen: tuple[int, ...]
    shared: bool
    last: bool

    @property
    def length(self) -> int:
        """Input tokens. A response's last token is predicted but predicts nothing, so it is not an input."""
        return len(self.group.prompt) + sum(len(self.group.responses[k]) - 1 for k in self.chosen)

    @property
    def reach(self) -> int:
        """Its last position + 1."""
        return len(self.group.prompt) + max(len(self.group.responses[k]) - 1 for k in self.chosen)


def plan_rows(group: TokenGroup, layout: Layout, budget: int) -> list[Row]:
    """Split a group into rows.

    Sharing the prompt saves ``(m - 1) * len(prompt)`` tokens a row, but attention with a mask costs the
    square of the row's length; the number m of responses per row that costs least is taken, among those whose
    rows fit the budget and whose masks have at most :data:`cropi.gradient.masks.MOST_PAIRS` pairs of tokens.
    A single response always fits: it cannot be split.
    """
    prompt, sizes = len(group.prompt), [len(group.responses[k]) - 1 for k, *_ in group.equal]
    chunks = _chunks(len(sizes), 1)
    if layout.shares(prompt + min(sizes) + 1, prompt + max(sizes) + 1, group.id):
        ends = [0, *accumulate(sizes)]
        cost: dict[int, float] = {}
        for m in range(1, len(sizes) + 1):
            rows = [prompt + ends[last] - ends[first] for first, last in _chunks(len(sizes), m)]
            # Without a mask of its own (one response a row) causal attention skips half of the products.
            attend = layout.attention_cost * (0.5 if m == 1 else 1.0)
            if m == 1 or max(rows) <= min(budget, math.isqrt(MOST_PAIRS)):
                cost[m] = sum(length * (1 + attend * length) for length in rows)
        chunks = _chunks(len(sizes), min(cost, key=lambda m: cost[m]))
    best = [range(first, last) for first, last in chunks]
    if not layout.lengths.together(prompt + min(sizes), prompt + max(sizes)):
        best.sort(key=lambda row: -sizes[row[0]])  # those that may be in one batch follow each other
    # One response a row needs no mask of its own.
    return [
        Row(group, tuple(group.equal[i][0] for i in chosen), len(best[0]) > 1, chosen is best[-1])
        for chosen in best
    ]


def make_batches(
    groups: Iterable[TokenGroup],
    estimator: Estimator,
    layout: Layout,
    *,
    budget: int = 1024,
    window: int = 256,
    stored_behaviour: bool = False,
) -> Iterator[MicroBatch]:
    """Group prompts into micro-batches of at most ``budget`` tokens, padding included.

    Args:
        groups: tokenised prompts; read ``window`` at a time, and sorted by length within the window.
        estimator: gives the advantages and divisors, from each whole group.
        layout: see :func:`cropi.gradient.layout.choose_layout`.
        budget: rows x longest row. A single row may exceed it when it holds one response. Where responses share rows,
            rows x longest row x longest row is at most :data:`cropi.gradient.masks.MOST_PAIRS`.
        stored_behaviour: carry the groups' stored log-probs.
    """
    if budget < 1 or window < 1:
        raise ValueError(f"budget and window must be at least 1, got {budget} and {window}")
    held: list[TokenGroup] = []
    for group in groups:
        held.append(group)
        if len(held) == window:
            yield from built(cut_batches(held, layout, budget), estimator, stored_behaviour)
            held = []
    yield from built(cut_batches(held, layout, budget), estimator, stored_behaviour)


def built(
    batches: Iterable[Sequence[Row]], estimator: Estimator, stored: bool, done: Container[str] = ()
) -> Iterator[MicroBatch]:
    """The micro-batches of some rows (:func:`cut_batches`); those whose prompts are all ``done`` are left out.

    How float sums round depends on the shape of a batch. So batches are cut from all prompts of a job, and a prompt
    that is done and shares a batch with another is in it all the same: a job that was interrupted gives the same bits.
    """
    for rows in batches:
        if not all(row.group.id in done for row in rows):
            yield _build(rows, estimator, stored)


def _chunks(count: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, count)) for start in range(0, count, size))


def _plan(groups: list[TokenGroup], layout: Layout, budget: int) -> list[list[Row]]:
    """Rows of every group. The longest shared row, and that which reaches furthest, are tried in both layouts first."""
    plans = [plan_rows(group, layout, budget) for group in groups]
    shared = [row for rows in plans for row in rows if row.shared]
    for measure in (lambda row: row.length, lambda row: row.length - len(row.group.prompt)):
        row = max(shared, key=measure, default=None)
        if row is not None and not layout.take(
            row.group.prompt, [row.group.responses[k][:-1] for k in row.chosen], row.group.id
        ):
            return [plan_rows(group, layout, budget) for group in groups]
    return plans


def cut_batches(groups: list[TokenGroup], layout: Layout, budget: int) -> list[list[Row]]:
    """The rows of each micro-batch of some groups, sorted by length; the rows of a prompt follow each other."""
    plans = _plan(groups, layout, budget)
    # Longest first: if memory is short, it shows at once and not after an hour.
    plans.sort(key=lambda rows: (rows[0].group.temperature, rows[0].shared, -max(row.length for row in rows)))
    batches: list[list[Row]] = []
    batch: list[Row] = []
    longest = nearest = furthest = 0  # the length, and the least and the largest reach, of the batch's rows
    for row in (row for rows in plans for row in rows):
        length, reach = row.length, row.reach
        if batch and (
            (len(batch) + 1) * max(longest, length) > budget
            or (row.shared and (len(batch) + 1) * max(longest, length) ** 2 > MOST_PAIRS)
            or (row.group.temperature, row.shared) != (batch[0].group.temperature, batch[0].shared)
            or not layout.lengths.together(min(nearest, reach), max(furthest, reach))
        ):
            batches.append(batch)
            batch = []
        if not batch:
            longest, nearest, furthest = length, reach, reach
        longest, nearest, furthest = max(longest, length), min(nearest, reach), max(furthest, reach)
        batch.append(row)
    return [*batches, batch] if batch else batches


def _build(rows: Sequence[Row], estimator: Estimator, stored: bool) -> MicroBatch:
    width = max(row.length for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    places, blocks = np.zeros_like(ids), np.full_like(ids, -1)
    groups: list[TokenGroup] = []
    segments: list[int] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for b, row in enumerate(rows):
        if not groups or groups[-1] is not row.group:
            groups.append(row.group)
            weights = _weights(row.group, estimator)
        segments.append(len(groups) - 1)
        parts.extend(_fill(row, weights, stored, ids[b], places[b], blocks[b], b * width, segments[-1]))
    ended = {id(row.group) for row in rows if row.last}
    columns = list(zip(*parts, strict=True))
    positions, targets, token_segments, members, numbers = (np.concatenate(column) for column in columns[:5])
    most = int(members.max())
    # Columns of a narrower table end with its last one, repeated.
    tables = [
        np.concatenate([table[:, np.minimum(np.arange(most), table.shape[1] - 1)] for table in column])
        for column in columns[5:]
    ]
    if most == 1:  # no response stands for others: there is nothing to sum
        tables = [table[:, 0] for table in tables]
    else:
        held = np.arange(most) < members[:, None]
        tables[0], tables[3] = tables[0] * held, tables[3] * held
    advantages, divisors, behaviour, noise = tables
    return MicroBatch(
        groups=groups,
        finished=[id(group) in ended for group in groups],
        input_ids=torch.from_numpy(ids),
        present=torch.from_numpy((blocks >= 0).astype(np.int64)),
        blocks=torch.from_numpy(blocks) if rows[0].shared else None,
        position_ids=torch.from_numpy(places),
        segments=torch.tensor(segments, device="cpu"),
        positions=torch.from_numpy(positions),
        targets=torch.from_numpy(targets),
        token_segments=torch.from_numpy(token_segments),
        advantages=torch.from_numpy(advantages).float(),
        divisors=torch.from_numpy(divisors).float(),
        behaviour=torch.from_numpy(behaviour).float() if stored else None,
        temperature=rows[0].group.temperature,
        members=torch.from_numpy(members) if most > 1 else None,
        responses=torch.from_numpy(np.repeat(np.arange(len(parts)), [len(part[1]) for part in parts])),
        noise=None if groups[0].noise is None else torch.from_numpy(noise).float(),
        scored_blocks=torch.from_numpy(numbers),
    )


def _weights(group: TokenGroup, estimator: Estimator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Advantages, divisors and noise of a group's responses."""
    advantages = estimator.advantages(group.group.rewards)
    noise = advantages if group.noise is None else np.array(group.noise)
    return advantages, estimator.divisors(group.lengths), noise


def _fill(
    row: Row,
    weights: tuple[np.ndarray, np.ndarray, np.ndarray],
    stored: bool,
    ids: np.ndarray,
    places: np.ndarray,
    blocks: np.ndarray,
    offset: int,
    segment: int,
) -> Iterator[tuple[np.ndarray, ...]]:
    """Write one row's inputs in place; yield, per response, the arrays of its scored tokens."""
    group, size = row.group, len(row.group.prompt)
    advantages, divisors, noise = weights
    ids[:size], places[:size], blocks[:size] = group.prompt, np.arange(size), 0
    start = size
    for number, k in enumerate(row.chosen, 1):
        response = np.asarray(group.responses[k], dtype=np.int64)
        inputs = slice(start, start + len(response) - 1)
        ids[inputs], places[inputs], blocks[inputs] = (
            response[:-1],
            size + np.arange(len(response) - 1),
            number,
        )
        # The first token is predicted by the prompt's last one, the others by the token before them.
        where = np.concatenate([[size - 1], np.arange(inputs.start, inputs.stop)])
        equal = group.equal_to[k]
        behaviour = np.zeros((len(response), len(equal)))
        if stored and group.logprobs:
            behaviour[:] = np.asarray([group.logprobs[member] for member in equal], dtype=np.float64).T
        if group.masks is not None:
            scored = np.asarray(group.masks[k], dtype=bool)
            where, response, behaviour = where[scored], response[scored], behaviour[scored]
        factor = 1.0 if group.kept is None else group.kept[k]
        if group.places is not None:
            some = group.places[k]
            factor *= len(response) / len(some)
            where, response, behaviour = where[some], response[some], behaviour[some]
        shape = len(response), len(equal)
        yield (
            where.astype(np.int64) + offset,
            response,
            np.full(len(response), segment, dtype=np.int64),
            np.full(len(response), len(equal), dtype=np.int64),
            np.full(len(response), number, dtype=np.int64),
            np.broadcast_to(advantages[list(equal)] * factor, shape),
            np.broadcast_to(divisors[list(equal)], shape),
            behaviour,
            np.broadcast_to(noise[list(equal)], shape),
        )
        start = inputs.stop
