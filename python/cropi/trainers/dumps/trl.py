"""Reader of TRL's completions (``log_completions=True``): ``{output_dir}/completions/completions_{step}.parquet``.

Columns: ``step``, ``prompt``, ``completion``, one with the number that each reward function gave, extra ones, and
``advantage``. Text is decoded without special tokens; there are neither ids nor log-probs: to have those, record by
:mod:`cropi.trainers.trl`.

A prompt of a run with tools lists them, and the file does not say which: log their schemas as a column ``tools``.

The reward is the sum of the reward functions' numbers (TRL's default weights). It is compared with the advantages,
which grow with the rewards of a prompt. Where they do not (functions have weights, or a column of numbers is not a
reward), the column has to be named (``--columns reward=NAME``).

An evaluation writes the file of its step anew, with its own completions behind what is left of the training's. They
look like any others; which steps had one is in the run's state (:mod:`cropi.trainers.dumps.evaluated`). A prompt that
lost completions to them is left out: the advantages of those that are left do not sum to 0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from cropi.data.forms import hashed
from cropi.errors import CropiError
from cropi.trainers.dumps.evaluated import warn_evaluated
from cropi.trainers.dumps.fields import BadSample, Left, NotFinite, Unused, finite, names, whole
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, rows_of_dump
from cropi.trainers.dumps.text_rows import warn_text

KEYS = ("step", "prompt", "completion", "advantage")
# Columns of numbers that are no rewards, in ms-swift's files.
FIGURES = ("entropy", "num_turns")
Rows = Callable[[Path, Left], Iterator[tuple[str, dict[str, Any]]]]
# Rewards and advantages are float32 in TRL, and advantages may be divided by a standard deviation plus 1e-4.
SLACK = 1e-3


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file, ``completions_{step}.parquet``. Prompt ids: ``reading.id_key``, a column, or a hash of
    the prompt. ``reading.columns`` may be ``{"reward": name}`` (or names, joined by +), where the rewards are not the
    sum of the functions' numbers.

    Raises:
        CropiError: another layout, or the advantages contradict the rewards.
    """
    yield from rollouts_of(path, reading, left, rows_of_dump)


def rollouts_of(path: Path, reading: Reading, left: Left, rows: Rows) -> Iterator[Rollout]:
    """The same of a file whose rows ``rows(path, left)`` gives.

    Raises:
        CropiError, BadSample: as there.
    """
    warn_text(path, left)
    # Twice: the whole of the first pass says which columns are rewards.
    steps: set[int] = set()

    def seen() -> Iterator[dict[str, Any]]:
        for _, row in rows(path, Left(left.skip_bad)):
            if isinstance(step := row.get("step"), int):
                steps.add(step)
            yield row

    rewards, cut = _reward_columns(seen(), path, reading.columns.get("reward"), reading.id_key)
    warn_evaluated(path, steps, left)

    def read(pair: tuple[str, dict[str, Any]]) -> Rollout:
        where, row = pair
        if _group(row) in cut:
            raise Unused(
                where, "advantage", "the advantages of this prompt's completions do not sum to 0, so the file holds a "
                "part of them: an evaluation wrote its own over the others",
            )  # fmt: skip
        known = [finite(row[name], name, where) for name in rewards if _is_given(row.get(name))]
        if not known:
            raise NotFinite(where, rewards[0], "no reward function gave this completion a number")
        completion = row.get("completion")
        if not completion:
            raise Unused(where, "completion", "is empty")
        for key in ("step", "prompt"):
            if key not in row:
                raise BadSample(where, key, f"is missing (the row has {names(row)})")
        prompt = row["prompt"]
        return checked(Rollout(
            id=id_of(row, reading.id_key, prompt, where), reward=sum(known), step=whole(row["step"], "step", where),
            where=where, prompt=prompt, response=completion, temperature=reading.temperature,
            extra={"lossy": True, **({"tools": row["tools"]} if row.get("tools") else {})},
        ))  # fmt: skip

    yield from left.each(rows(path, left), read)


def _group(row: dict[str, Any]) -> str:
    """What the completions of one prompt at one step share."""
    return hashed(repr((row.get("step"), row.get("prompt"))))


def _reward_columns(
    rows: Iterator[dict[str, Any]], path: Path, named: str | None, id_key: str | None
) -> tuple[list[str], set[str]]:
    """The columns whose sum is the reward, and the groups that lack completions.

    Raises:
        CropiError: another layout, no column of numbers, or the advantages contradict their sum.
    """
    first = next(rows, None)
    if first is None or any(key not in first for key in KEYS[:3]):
        held = names(first) if first else "no row"
        raise CropiError(
            f"{path} is not a completions file of TRL, which has {', '.join(KEYS)}, but holds {held}"
        )
    keys: dict[str, _Seen] = {}
    # By column; under None, which is no column's name, what names the prompt.
    numbers: list[dict[str | None, Any]] = []
    for row in chain([first], rows):
        for key, value in row.items():
            seen = keys.setdefault(key, _Seen())
            seen.floats |= isinstance(value, float)
            seen.others |= not isinstance(value, (float, int, type(None)))
        numbers.append(
            {None: _group(row)}
            | {key: _float(value) for key, value in row.items() if isinstance(value, (float, int))}
        )
    columns = _of_numbers(keys, path, id_key) if named is None else _of_names(keys, path, named)
    if named is None and "advantage" in keys and not _agree(numbers, columns):
        raise CropiError(
            f"{path}: the advantages do not follow the sum of the columns {names(columns)}, so these are not the "
            "rewards, or have weights; name the column with the reward with --columns reward=NAME"
        )
    return columns, _cut(numbers)


def _of_names(keys: Mapping[str, _Seen], path: Path, named: str) -> list[str]:
    """The columns that the user named, by ``+`` where there are several."""
    columns = [named] if named in keys else named.split("+")
    for name in columns:
        if name not in keys:
            raise CropiError(
                f"{path}: there is no column {name!r}, which --columns reward= names; it has {names(keys)}"
            )
    return columns


def _of_numbers(keys: Mapping[str, _Seen], path: Path, id_key: str | None) -> list[str]:
    """The columns of numbers that TRL itself does not write."""
    columns = [
        key
        for key, seen in keys.items()
        if key not in (*KEYS, *FIGURES, id_key) and seen.floats and not seen.others
    ]
    if not columns:
        raise CropiError(
            f"{path} has no column of rewards (numbers); it has {names(keys)}; name it with --columns reward=NAME"
        )
    return columns


def _cut(rows: list[dict[str | None, Any]]) -> set[str]:
    """The groups that lack completions: the first one of a step, if its advantages do not sum to 0 and all others do.

    TRL's table takes a number of rows and drops the first ones for each that is too much. Advantages that sum to 0 in
    no group are of another kind.
    """
    steps: dict[Any, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        steps[row.get("step")][row[None]].append(row.get("advantage", math.nan))
    cut = set()
    for groups in steps.values():
        # One that is no number says nothing.
        whole = [not abs(sum(values)) > SLACK * sum(map(abs, values)) for values in groups.values()]
        if whole[1:] and not whole[0] and all(whole[1:]):
            cut.add(next(iter(groups)))
    return cut


@dataclass
class _Seen:
    """Whether a column holds floats, and whether it holds anything but numbers."""

    floats: bool = False
    others: bool = False


def _is_given(value: Any) -> bool:
    """Whether a reward function gave a number: TRL and ms-swift add up those that did, and write NaN for the others."""
    return value is not None and value == value


def _float(value: float) -> float:
    """A number as a float; infinite where no float holds it."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _agree(rows: list[dict[str | None, Any]], rewards: list[str]) -> bool:
    """Whether within each prompt the advantages are the centred rewards times one number above 0.

    Args:
        rows: their numbers by column, and what names the prompt under None.
        rewards: the columns.
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        numbers = [row[name] for name in rewards if _is_given(row.get(name))]
        advantage = row.get("advantage")
        if numbers and advantage is not None and np.isfinite([*numbers, advantage]).all():
            groups[row[None]].append((sum(numbers), advantage))
    for pairs in groups.values():
        reward, advantage = np.array(pairs).T
        reward, advantage = reward - reward.mean(), advantage - advantage.mean()
        size = np.abs(reward).max(initial=0.0)
        if size <= SLACK:
            continue
        scale = float(reward @ advantage) / float(reward @ reward)
        if scale < 0 or np.abs(advantage - scale * reward).max() > SLACK * max(scale * size, SLACK):
            return False
    return True
