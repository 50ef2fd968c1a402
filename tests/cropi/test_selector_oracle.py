"""What the selector says and draws, worked out anew from its definitions in plain NumPy, and from plain gradients."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from support.made_data import make_model
from support.oracle import flat_gradient, objective, response_logprobs

import cropi
from cropi import Selector
from cropi_kernels import LiveSketcher, SketchSpec

SPEC, DIM = SketchSpec(128), 128


class History:
    """All visits, kept one by one in float64."""

    def __init__(self, half_life: float, within: int | None) -> None:
        self.half_life, self.within = half_life, within
        self.visits: dict[int, list[tuple[int, np.ndarray, float]]] = {}
        # Of repeated visits: how far from the average before, and what that counts.
        self.off: list[tuple[float, float]] = []
        self.sets: list[np.ndarray] = []
        self.refreshed = 0

    def refresh(self, rows: np.ndarray, names: list[str], step: int) -> None:
        means = [
            np.mean([row for row, of in zip(rows, names) if of == name], axis=0)
            for name in sorted(set(names))
        ]
        self.sets, self.refreshed = [mean / np.linalg.norm(mean) for mean in means], step

    def cosine(self, row: np.ndarray) -> float:
        length = np.linalg.norm(row)
        return float(np.mean([row @ mean / length for mean in self.sets])) if length else 0.0

    def add(self, ids: list[int], rows: np.ndarray, step: int) -> None:
        if self.within is not None and step - self.refreshed > self.within:
            return
        for name in sorted(set(ids)):
            row = sum(row for row, of in zip(rows, ids) if of == name)
            if name in self.visits:
                weight, shown = self.known(name, step)
                self.off.append((self.cosine(row) - shown, weight))
            self.visits.setdefault(name, []).append((step, row, self.cosine(row)))

    def known(self, name: int, step: int) -> tuple[float, float]:
        """What the visits of a prompt count, and their average usefulness."""
        weights = [2.0 ** (-(step - when) / self.half_life) for when, _, _ in self.visits[name]]
        seen = [at if self.within is not None else self.cosine(row) for _, row, at in self.visits[name]]
        return sum(weights), float(np.average(seen, weights=weights))

    def posterior(self, n: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Means and deviations, by the formulas of `cropi.ranking.exploring`."""
        first, pairs = 0.2, {name: self.known(name, step) for name in self.visits}
        e2 = (sum(d * d / (1 + 1 / w) for d, w in self.off) + 10 * first**2) / (len(self.off) + 10)
        x, w = np.array([x for _, x in pairs.values()]), np.array([w for w, _ in pairs.values()])
        m = float((w / (w + 1) * x).sum() / (w / (w + 1)).sum())
        t2 = max(((x - x.mean()) ** 2).sum() / (len(x) - 1) - float((e2 / w).mean()), first**2 / 16)
        means, deviations = np.full(n, m), np.full(n, math.sqrt(t2))
        for name, (weight, shown) in pairs.items():
            precision = 1 / t2 + weight / e2
            means[name] = (m / t2 + weight * shown / e2) / precision
            deviations[name] = precision**-0.5
        return means, deviations


def lived(
    half_life: float, within: int | None, seed: int, steps: int = 40, n: int = 12
) -> tuple[Selector, History]:
    """A random history: prompts twice in a step, visits without a gradient, two validation sets, new means."""
    draws = np.random.default_rng(seed)
    selector = Selector(range(n), SPEC, dim=DIM, half_life=half_life, within=within)
    history, common = History(half_life, within), draws.normal(size=DIM)
    step = 0
    for turn in range(steps):
        if turn % 9 == 0:
            rows = (draws.normal(size=(5, DIM)) + common).astype(np.float32)
            selector.refresh(torch.from_numpy(rows), ["a", "b", "a", "b", "b"])
            history.refresh(rows.astype(np.float64), ["a", "b", "a", "b", "b"], step)
        step += int(draws.integers(1, 6))
        ids = draws.integers(0, n - 2, 4).tolist()
        rows = (draws.normal(size=(4, DIM)) + draws.normal() * common).astype(np.float32)
        rows[draws.random(4) < 0.1] = 0.0
        selector.update(ids, torch.from_numpy(rows), step)
        history.add(ids, rows.astype(np.float64), step)
    return selector, history


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("half_life", [7.0, 60.0])
@pytest.mark.parametrize("within", [None, 12])
def test_a_long_history_is_what_its_visits_say(half_life: float, within: int | None, seed: int) -> None:
    selector, history = lived(half_life, within, seed)
    assert selector.seen.tolist() == [i in history.visits for i in range(12)]
    when = selector.step + 5
    got, want = selector.scores(range(12)), [
        history.known(i, selector.step)[1] if i in history.visits else math.nan for i in range(12)
    ]  # fmt: skip
    # Each visit rounds every number of the sum to float16, and a product with a mean of length 1 averages these
    # errors: four deviations of as many visits as a prompt has. Cosines alone are kept in float64.
    visits = max(map(len, history.visits.values()))
    rounding = 4 * 2.0**-11 * math.sqrt(visits / DIM) if within is None else 1e-6
    np.testing.assert_allclose(got, want, atol=rounding)
    means, deviations = selector.known(when)
    expected = history.posterior(12, when)
    np.testing.assert_allclose(deviations, expected[1], rtol=2 * rounding)
    np.testing.assert_allclose(means, expected[0], atol=2 * rounding)


@pytest.mark.long
@pytest.mark.parametrize("explore", [0.5, 1.0])
def test_new_and_old_prompts_are_drawn_as_often_as_their_uncertainty_says(explore: float) -> None:
    """100 000 prompts of five kinds in one draw: of kind k, P(N(m_k, s_k^2) > c), c the level that n of them pass."""
    each, n = 20_000, 12_000
    # Good, fair and poor lately, good long ago; the fifth kind is new.
    aims = np.array([0.6, 0.3, -0.6, 0.6])
    steps = [300, 300, 300, 0, None]
    selector = Selector(range(5 * each), SPEC, dim=64, half_life=40.0, explore=explore, seed=3)
    draws, towards = np.random.default_rng(0), np.ones(DIM)
    selector.refresh(torch.ones(1, DIM))
    visits = sorted((when, kind) for kind, when in enumerate(steps) if when is not None)
    shown, weight = np.full(5 * each, np.nan), np.zeros(5 * each)
    for when, kind in visits:
        places = np.arange(kind * each, (kind + 1) * each)
        side = draws.normal(size=(each, DIM))
        side -= (side @ towards)[:, None] * towards / DIM
        side *= math.sqrt(DIM) / np.linalg.norm(side, axis=1, keepdims=True)
        rows = aims[kind] * towards + math.sqrt(1 - aims[kind] ** 2) * side
        selector.update(places, torch.from_numpy(rows).float(), when)
        shown[places], weight[places] = selector.scores(places), 2.0 ** (-(300 - when) / 40)
    seen = weight > 0
    x, w, e2 = shown[seen], weight[seen], 0.04
    m = float((w / (w + 1) * x).sum() / (w / (w + 1)).sum())
    t2 = max(float(x.var(ddof=1)) - float((e2 / w).mean()), 0.0025)
    precision = 1 / t2 + weight / e2
    means, spread = (
        (m / t2 + np.where(seen, weight * np.nan_to_num(shown), 0) / e2) / precision,
        explore * precision**-0.5,
    )
    low, high = -5.0, 5.0
    for _ in range(60):  # the level that n pass
        level = (low + high) / 2
        low, high = (level, high) if ndtr((means - level) / spread).sum() > n else (low, level)
    chances = ndtr((means - level) / spread).reshape(5, each)
    chosen = np.bincount(np.array(selector.next(n, 300)) // each, minlength=5)
    expected, deviation = chances.sum(axis=1), np.sqrt((chances * (1 - chances)).sum(axis=1))
    # The level moves with the draw, which takes variance away; five deviations, and one prompt.
    assert (np.abs(chosen - expected) <= 5 * deviation + 1).all(), (chosen, expected)
    assert expected[4] > 30 and expected[3] > 30, "new and old ones are in it"


# ---------------------------------------------------------------------------------------- from the gradients on
PROMPTS = {"a": [5, 8, 9], "b": [6, 8, 9], "c": [7, 5, 8, 9], "v": [10, 8, 9], "w": [11, 12, 8, 9]}
RESPONSES = [[20, 21], [33, 34, 30], [40]]  # of every prompt, so that gradients have directions in common
REWARDS = {
    "a": [1.0, 0.0, 0.0],
    "b": [1.0, 0.0, 1.0],
    "c": [0.0, 0.5, 1.0],
    "v": [0.0, 0.0, 1.0],
    "w": [1.0, 0.0, 0.5],
}


def gradient(model: Any, behaviour: Any, name: str) -> torch.Tensor:
    record = {"prompt_ids": PROMPTS[name], "response_ids": RESPONSES, "rewards": REWARDS[name]}
    stored = [response_logprobs(behaviour, PROMPTS[name], response).tolist() for response in RESPONSES]
    return flat_gradient(model, objective(model, record | {"logprobs": stored}))


def sketched(model: Any, behaviour: Any, names: str) -> cropi.SketchedBatch:
    rows = [(name, k) for k in range(3) for name in names]
    ids, mask, scored = (torch.zeros(len(rows), 8, dtype=torch.int64) for _ in range(3))
    old = torch.zeros(len(rows), 8)
    for i, (name, k) in enumerate(rows):
        prompt, response = PROMPTS[name], RESPONSES[k]
        ids[i, : len(prompt + response)] = torch.tensor(prompt + response)
        mask[i, : len(prompt + response)] = 1
        here = slice(len(prompt), len(prompt + response))
        scored[i, here] = 1
        old[i, here] = response_logprobs(behaviour, prompt, response).detach()
    return cropi.score_batch(
        model, ids, mask, response_mask=scored, prompt_ids=[name for name, _ in rows], old_logprobs=old,
        rewards=torch.tensor([REWARDS[name][k] for name, k in rows]),
    )  # fmt: skip


def policy(step: int) -> Any:
    """Of so small weights that prompts with the same last tokens have gradients in common."""
    model = make_model(seed=5)
    draws = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.3 if p.ndim > 1 else 1.0).add_(2e-3 * step * torch.randn(p.shape, generator=draws))
    return model


@pytest.mark.long
def test_a_run_is_that_of_plain_autograd() -> None:
    """A policy that moves, visits of several ages, a ratio to the policy that sampled: no line of the package."""
    behaviour, exact_behaviour = policy(0), policy(0).double()
    selector = Selector(list("abc"), dim=32768, half_life=10.0)
    visits: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for step, names in ((3, "abc"), (8, "ab"), (20, "bc")):
        model, exact = policy(step), policy(step).double()
        batch = sketched(model, behaviour, names)
        selector.update(batch.ids, batch, step)
        for name in names:
            visits.setdefault(name, []).append((step, gradient(exact, exact_behaviour, name)))
    selector.refresh(sketched(model, behaviour, "vw"))
    mean = gradient(exact, exact_behaviour, "v") + gradient(exact, exact_behaviour, "w")
    found = selector.scores(list(visits))
    for name, own, shown in zip(visits, visits.values(), found):
        cosines = [float(torch.nn.functional.cosine_similarity(g, mean, dim=0)) for _, g in own]
        want = np.average(cosines, weights=[2.0 ** (-(20 - step) / 10) for step, _ in own])
        # A sketch of k numbers moves a cosine by 1 / sqrt(k), or less: four times that.
        assert shown == pytest.approx(want, abs=4 / math.sqrt(32768)), name
    assert found.max() > 0.2 and found.max() - found.min() > 0.2, found


def test_a_micro_batch_is_no_visit_of_the_prompts_of_another() -> None:
    """Blocks with the step's own numbers of prompts, and an update for each: as one update with all of their rows."""
    model, spec, ids = torch.nn.Linear(4, 4), SketchSpec(64), ["a", "b", "c", "d"]
    features = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    apart, together = (Selector([*ids, "e"], spec, dim=64) for _ in range(2))
    total = torch.zeros(5, 64)
    with LiveSketcher(model, spec) as live:
        for part in ([0], [3, 1, 2]):  # "e" has no row in either
            with live.batch(torch.tensor(part), shape=(len(part),), num_segments=5) as got:
                # "c" has a row, and no gradient
                (
                    model(features[part]).square().sum(1) * torch.tensor([float(i != 2) for i in part])
                ).sum().backward()
            assert got.visited.tolist() == [i in part for i in range(5)]
            apart.update(apart.ids, got, 1)
            total += got.sketches
    together.update(ids, total[:4], 1)
    summed, chosen = Selector(apart.ids, spec, dim=64), Selector(apart.ids, spec, dim=64)
    got.sketches += total - got.sketches  # as of a loop that adds the blocks up in one of them
    summed.update(apart.ids, got, 1)
    got.sketches = got.sketches[:2]
    chosen.update(ids[:2], got, 1)
    assert summed.seen.tolist() == apart.seen.tolist() and chosen.seen.tolist() == [True] * 2 + [False] * 3
    for selector in (apart, together):
        selector.refresh(total[:2])
    assert apart.seen.tolist() == [True] * 4 + [False]
    assert apart.scores(apart.ids) == pytest.approx(together.scores(apart.ids), nan_ok=True, abs=1e-6)
    assert np.array(apart.known()) == pytest.approx(np.array(together.known()))
