"""What prompts that are alike share: the posterior held to one large Gaussian, the features, and the selector's use."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from cropi import Selector
from cropi.errors import CropiError
from cropi.ranking.alike import LEAST, RARE, SHARES, VISITS, known_alike, prompt_features
from cropi.ranking.exploring import Noise
from cropi_kernels import SketchSpec

SPEC = SketchSpec(256)


@pytest.mark.parametrize("shared", [0.0, 1.0])
def test_what_is_known_is_the_posterior_of_one_large_gaussian(shared: float) -> None:
    """Every u_i and every v_i are jointly normal: condition on the averages that were seen, with dense matrices."""
    rng, n, k = np.random.default_rng(4), 40, 6
    x = rng.standard_normal((n, k)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    weight = np.where(rng.random(n) < 0.6, rng.uniform(0.1, 3.0, n), 0.0)
    values = shared * (x @ rng.standard_normal(k)) + 0.3 * rng.standard_normal(n) + 0.1
    noise = Noise(total=2.0, count=40.0)
    means, deviations = known_alike(values, weight, noise, x)

    seen = weight > 0
    v, w = values[seen], weight[seen]
    m = float((v * w / (w + 1)).sum() / (w / (w + 1)).sum())
    total = v.var(ddof=1)
    error = (noise.total + VISITS * total) / (noise.count + VISITS) / w
    found: list[tuple[float, Any, Any]] = []
    for share in SHARES:
        a = share * total
        own = max(total - error.mean() - a, LEAST * total)
        of_prompts = a * x.astype(np.float64) @ x.T.astype(np.float64) + own * np.eye(n)
        of_seen = of_prompts[np.ix_(seen, seen)] + np.diag(error)
        gain = of_prompts[:, seen] @ np.linalg.inv(of_seen)
        likelihood = -0.5 * ((v - m) @ np.linalg.solve(of_seen, v - m) + np.linalg.slogdet(of_seen)[1])
        found.append((likelihood, m + gain @ (v - m), np.diag(of_prompts - gain @ of_prompts[seen])))
    chances = np.exp([one[0] - max(other[0] for other in found) for one in found])
    chances[chances < RARE] = 0
    chances /= chances.sum()
    want = sum(chance * one[1] for chance, one in zip(chances, found))
    square = sum(chance * (one[2] + one[1] ** 2) for chance, one in zip(chances, found))
    np.testing.assert_allclose(means, want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(deviations**2, square - want**2, rtol=1e-8, atol=1e-12)
    assert (chances > 0).sum() > 1 and (chances[0] > 0.2) == (shared == 0)


def test_before_any_visit_all_prompts_are_alike() -> None:
    means, deviations = known_alike(np.zeros(5), np.zeros(5), Noise(), np.eye(5, 3, dtype=np.float32))
    assert not means.any() and (deviations == 0.2).all()


@pytest.mark.parametrize("features", [None, np.eye(4, 3)])
def test_visits_of_a_thousand_half_lives_ago_are_forgotten(features: Any) -> None:
    """1 / w of theirs is beyond float64 before w is 0: one such prompt made what is known of all NaN."""
    selector = Selector(range(4), SPEC, dim=64, half_life=1.0, features=features)
    sketches = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    selector.refresh(sketches[:1])
    selector.update([0, 1], sketches[:2], 1)
    selector.update([2], sketches[2:3], 1060)
    alone = Selector(range(4), SPEC, dim=64, half_life=1.0, features=features)
    alone.refresh(sketches[:1])
    alone.update([2], sketches[2:3], 1060)
    for mine, other in zip(selector.known(), alone.known(), strict=True):
        assert np.isfinite(mine).all() and (mine == other).all()


def test_which_prompts_are_opposed_is_worked_out_once_for_what_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trainer asks for every micro-batch, and the model of a large pool takes as long as a micro-batch."""
    asked: list[Any] = []
    monkeypatch.setattr(
        "cropi.ranking.selector.known_alike", lambda *given: asked.append(0) or known_alike(*given)
    )
    selector, towards = Selector(range(4), SPEC, dim=64, features=np.eye(4, 3)), torch.ones(1, 256)
    selector.refresh(towards)
    assert not selector.opposed([0, 1]).any()
    for step in range(1, 40):
        selector.update([0, 1], torch.cat([towards, -towards]), step)
    state, before = copy.deepcopy(selector.state_dict()), len(asked)
    assert selector.opposed([0, 1, 2]).tolist() == [False, True, False] and selector.opposed([1]).all()
    assert len(asked) == before + 1
    selector.refresh(-towards)
    assert selector.opposed([0, 1, 2]).tolist() == [True, False, False]
    selector.load_state_dict(state)
    assert selector.opposed([0, 1]).tolist() == [False, True]
    assert len(asked) == before + 3


def test_unseen_prompts_are_drawn_by_what_is_like_them() -> None:
    """Two kinds of prompts, one useful: after some of each were seen, the others of its kind come first."""
    kinds = np.arange(40) % 2
    selector = Selector(range(40), SPEC, dim=64, explore=0.0, features=np.eye(2)[kinds])
    towards = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))
    selector.refresh(towards)
    shown = list(range(12))
    away = torch.randn(12, 256, generator=torch.Generator().manual_seed(1))
    along = torch.tensor(kinds[:12] == 1)[:, None] * towards * 2
    selector.update(shown, along + away, 1)
    assert {kinds[name] for name in selector.next(20)} == {1}
    alone = Selector(range(40), SPEC, dim=64, explore=0.0)
    alone.refresh(towards)
    alone.update(shown, along + away, 1)
    assert {kinds[name] for name in alone.next(20)} == {0, 1}


# ------------------------------------------------------------------------------------------------- features
def test_features_are_counts_hashed_and_weighed() -> None:
    """Held to the same sums in whole numbers of Python."""
    prompts, dim, bits = [[7, 7, 3], [7, 9], [4000, 7, 3, 11, 2]], 32, (1 << 64) - 1

    def place(number: int) -> int:
        number &= bits
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            number = ((number ^ (number >> shift)) * factor) & bits
        return (number ^ (number >> 31)) % dim

    counts = np.zeros((3, dim))
    for row, ids in zip(counts, prompts):
        for before, token in zip([1 << 40, *ids], ids):
            row[place(token)] += 1
            row[place(before * 0x9E3779B97F4A7C15 + token)] += 1
        row[place((1 << 41) + len(ids).bit_length())] += 1
    want = np.sqrt(counts) * np.log(4 / (1 + (counts > 0).sum(axis=0)))
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(prompt_features(prompts, dim), want, rtol=1e-6, atol=1e-7)


def test_prompts_that_have_nothing_of_their_own_have_no_features() -> None:
    assert not prompt_features([[1, 2], [1, 2]]).any() and prompt_features([], 8).shape == (0, 8)


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_a_state_with_features_is_taken_by_the_pool_in_any_order(size: float) -> None:
    rng = np.random.default_rng(0)
    features = size * rng.normal(size=(101, 5))
    made = Selector(range(101), SPEC, dim=64, features=features)
    made.refresh(torch.ones(1, 256))
    made.update(range(60), torch.from_numpy(rng.normal(size=(60, 256)) + 0.1 * features[:60, :1] / size), 1)
    wanted = made.known()
    assert np.isfinite(wanted).all() and len(np.unique(wanted[0])) > 50, "features tell prompts apart"
    for _ in range(9):
        order = rng.permutation(101)
        other = Selector(order, SPEC, dim=64, features=features[order])
        other.load_state_dict(made.state_dict())
    np.testing.assert_allclose(np.take(wanted, order, axis=1), other.known(), rtol=1e-5)


def test_bad_features_are_refused() -> None:
    with pytest.raises(CropiError, match="dim is 0"):
        prompt_features([[1]], dim=0)
    assert prompt_features([[1]], dim=np.int64(4)).shape == (1, 4)
    for bad in ("ab", [[1], [2]], [0.5]):
        with pytest.raises(CropiError, match="prompt 1 is .*token ids"):
            prompt_features([[1], bad])  # type: ignore[list-item]
    for features in (np.ones((3, 2)), np.ones(2), np.full((2, 2), np.nan), np.zeros((2, 2))):
        with pytest.raises(CropiError, match="features must be 2 rows of finite numbers"):
            Selector(["a", "b"], SPEC, dim=64, features=features)


# ---------------------------------------------------------------------------------------------------- state
def test_a_state_knows_its_features() -> None:
    def made(names: str, features: Any) -> Selector:
        return Selector(list(names), SPEC, dim=64, features=features)

    rows = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    first = made("abc", rows)
    first.refresh(torch.ones(1, 256))
    first.update(["a"], torch.ones(1, 256), 3)
    other = made("cab", rows[[2, 0, 1]])
    other.load_state_dict(first.state_dict())
    for mine, theirs in zip(first.known(), other.known()):
        np.testing.assert_allclose(mine, theirs[[1, 2, 0]], rtol=1e-12)
    with pytest.raises(CropiError, match="saved with features = '.*has '.*'"):
        made("abc", rows[::-1]).load_state_dict(first.state_dict())
    with pytest.raises(CropiError, match="saved with features = '.*has None"):
        made("abc", None).load_state_dict(first.state_dict())
    with pytest.raises(CropiError, match="saved with features = None.*has '"):
        first.load_state_dict(made("abc", None).state_dict())
    assert first.nbytes == made("abc", None).nbytes + 3 * 2 * 4
