"""Choices that leave near copies out (``dedup``), and those of prompts that differ (``diversity``)."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.stores import in_memory, table_of

from cropi.errors import CropiError
from cropi.ranking import distinct
from cropi.ranking.distinct import Distinct, diverse, unit_sketches
from cropi.ranking.influence import influence
from cropi.ranking.selection import select
from cropi.ranking.table import read_scores, write_scores


def test_near_copies_are_left_out_and_named() -> None:
    eye = torch.eye(4)
    rows = torch.stack([eye[0], 2 * eye[0] + 0.1 * eye[1], eye[1], -eye[0], eye[2], 3 * eye[1]])
    names = [f"{i:02d}" for i in range(6)]
    scores = table_of([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    chosen = select(scores, count=4, dedup=0.9, sketches=in_memory(rows, names))
    assert chosen.ids == ["00", "02", "03", "04"] and chosen.copies == {"01": "00"}
    assert select(scores, count=5, dedup=0.9, sketches=in_memory(rows, names)).copies == {
        "01": "00",
        "05": "02",
    }
    kept = select(scores, count=4, dedup=0.9999, sketches=in_memory(rows, names)).ids
    assert kept == ["00", "01", "02", "03"]


def test_exact_copies_are_found_at_the_highest_bounds() -> None:
    """Sketches are compared in float16, which changes the length of those whose norm a few entries hold."""
    torch.manual_seed(0)
    rows = torch.randn(40, 1024) ** 5
    names = [f"{i:02d}" for i in range(80)]
    scores = table_of([80.0 - i for i in range(80)])
    chosen = select(scores, count=80, dedup=0.9999, sketches=in_memory(torch.cat([rows, 2 * rows]), names))
    assert chosen.ids == names[:40]
    assert chosen.copies == dict(zip(names[40:], names[:40]))


@pytest.mark.long
def test_deduplication_is_greedy_over_blocks_and_groups() -> None:
    """Against the definition, one pair at a time, over more prompts than one block."""
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(300, 64), dim=1)
    rows = centres[torch.randint(300, (900,))] + 0.05 * torch.nn.functional.normalize(
        torch.randn(900, 64), dim=1
    )
    names = [f"{i:04d}" for i in range(900)]
    unit = torch.nn.functional.normalize(rows, dim=1).half().float()
    taken: list[int] = []
    for i in range(900):
        if all(float(unit[i] @ unit[j]) <= 0.9 for j in taken):
            taken.append(i)
    made = Distinct(in_memory(rows, names), 0.9)
    assert made.take(names, 900) == taken
    assert len(made.copies) == 900 - len(taken)
    pairs = [(int(name), int(near)) for name, near in made.copies.items()]
    assert all(near in taken and near < i and float(unit[i] @ unit[near]) > 0.899 for i, near in pairs)
    again = Distinct(in_memory(rows, names), 0.9)
    first = again.take(names[:400], 100)
    assert first == taken[:100]
    later = again.take(names[400:], 900)  # also far from what the first call took
    alone = [i for i in range(400, 900) if all(float(unit[i] @ unit[j]) <= 0.9 for j in first)]
    expected: list[int] = []
    for i in alone:
        if all(float(unit[i] @ unit[j]) <= 0.9 for j in expected):
            expected.append(i)
    assert [400 + i for i in later] == expected


@pytest.mark.parametrize("method", ["kmeans", "facility"])
def test_diverse_choices_cover_the_directions(method: str) -> None:
    """Twelve prompts of four directions, the best three of one: four are chosen, one of every direction."""
    torch.manual_seed(1)
    eye = torch.eye(16)
    which = [0, 0, 0, 1, 1, 0, 2, 2, 3, 1, 3, 2]
    rows = torch.stack([eye[i] for i in which]) + 0.01 * torch.randn(12, 16)
    scores = table_of(np.arange(12.0)[::-1])
    store = in_memory(rows, [f"{i:02d}" for i in range(12)])
    plain = select(scores, count=4)
    assert {which[int(name)] for name in plain.ids} == {0, 1}
    options: dict[str, Any] = {
        "count": 4, "diversity": method, "candidates": 3, "seed": 2, "sketches": store,
    }  # fmt: skip
    chosen = select(scores, **options)
    covered = {which[int(name)] for name in chosen.ids}
    assert covered == {0, 1, 2, 3} if method == "facility" else len(covered) >= 3
    assert chosen.ids == select(scores, **options).ids
    assert len(select(scores, count=4, diversity=method, candidates=1, sketches=store)) == 4


def test_facility_location_is_the_greedy_maximum() -> None:
    """Against the plain greedy algorithm, which works out every gain at every step."""
    torch.manual_seed(2)
    rows = torch.nn.functional.normalize(torch.randn(60, 8), dim=1).half()
    near = (rows.float() @ rows.float().T).clamp_min(0)
    chosen: list[int] = []
    for _ in range(12):
        best = near[chosen].max(dim=0).values if chosen else torch.zeros(60)
        gains = (near - best).clamp_min(0).sum(dim=1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
    assert diverse(rows, 12, "facility").tolist() == sorted(chosen)


def covered(near: np.ndarray, chosen: Any) -> float:
    return float(near[list(chosen)].max(axis=0).sum())


@pytest.mark.parametrize("seed", range(4))
def test_facility_location_covers_as_its_bound_says(seed: int) -> None:
    """Of sum_i max_j max(cos(i, j), 0), at least 1 - 1/e of what the best of all 220 choices of three has; and the
    choices of one and of all are the best."""
    rows = torch.nn.functional.normalize(
        torch.randn(12, 5, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    near = np.maximum(rows.double().numpy() @ rows.double().numpy().T, 0)
    for n in (1, 3, 12):
        best = max(covered(near, some) for some in itertools.combinations(range(12), n))
        found = covered(near, diverse(rows.half(), n, "facility").tolist())
        # Cosines are kept in float16.
        assert best * (1 - 1 / math.e if n == 3 else 1.0) - 12 * 2.0**-10 <= found <= best + 1e-12


def test_clusters_give_their_best_in_turns() -> None:
    """Sixteen prompts far apart in four directions (so many as the root of the candidates): of n, the best of every
    cluster come first, then the second best."""
    which = [0, 0, 0, 1, 0, 2, 0, 3, 1, 2, 3, 1, 1, 2, 3, 3]
    rows = torch.eye(8)[which] + 0.01 * torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    turns = sorted(range(16), key=lambda i: (which[:i].count(which[i]), i))
    for seed in range(5):
        for n in (4, 6, 9):
            assert diverse(rows, n, "kmeans", seed).tolist() == sorted(turns[:n]), (seed, n)


def test_clusters_of_wide_sketches_keep_what_they_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400,000 candidates with 32,768 numbers each, all of them would take 26 GB."""
    rows = torch.randn(60, 256, generator=torch.Generator().manual_seed(0))
    ids = [f"p{i:02d}" for i in range(60)]
    store, shapes = in_memory(rows, ids), []
    monkeypatch.setattr(distinct, "CLUSTERED_DIM", 64)
    whole = [diverse(unit_sketches(store, ids), n, "kmeans", 3).tolist() for n in (5, 20)]
    real = distinct.diverse
    monkeypatch.setattr(
        distinct, "diverse", lambda held, *rest: (shapes.append(held.shape), real(held, *rest))[1]
    )
    assert [distinct.diverse_prompts(store, ids, n, "kmeans", 3).tolist() for n in (5, 20)] == whole
    assert shapes == [(60, 64)] * 2


def test_too_many_candidates_are_refused_before_a_sketch_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store = in_memory(torch.eye(8), list("abcdefgh"))
    monkeypatch.setattr(distinct, "MOST_CANDIDATES", 7)
    monkeypatch.setattr(store, "shards", lambda: pytest.fail("sketches are read"))
    with pytest.raises(CropiError, match="8 are more than 7; lower candidates, or use diversity kmeans"):
        distinct.diverse_prompts(store, list("abcdefgh"), 3, "facility")


def test_the_store_of_the_scores_is_found_or_asked_for(tmp_path: Path) -> None:
    rows = torch.eye(4)
    train, valid = in_memory(rows, list("abcd")), in_memory(rows[:1], ["v"])
    scores = influence(train, [valid])
    assert select(scores, count=2, dedup=0.5).ids == ["a", "b"]
    write_scores(tmp_path / "s.parquet", scores, select(scores, count=2, per="pool"))
    read = read_scores(tmp_path / "s.parquet")
    assert read.meta["selection"] == {"fraction": 0.1, "method": "rrf", "count": 2}
    with pytest.raises(CropiError, match="their store .* is not there; give it"):
        select(read, count=2, dedup=0.5)
    assert select(read, count=2, dedup=0.5, sketches=train).ids == ["a", "b"]
    with pytest.raises(CropiError, match="holds no sketch of 1 of the ranked prompts, for example 'e'"):
        unit_sketches(train, ["a", "e"])
    with pytest.raises(CropiError, match="sketches are for dedup and diversity; give one of them too"):
        select(read, count=2, sketches=train)
    with pytest.raises(CropiError, match="sketches is a Tensor"):
        select(read, count=2, dedup=0.5, sketches=rows)  # type: ignore[arg-type]
