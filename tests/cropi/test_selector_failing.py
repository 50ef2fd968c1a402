"""Prompts whose gradients are never finite: what they cost a run, and when they come back."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

from cropi import Selector
from cropi.errors import CropiError
from cropi_kernels import SketchSpec

SPEC, STEPS = SketchSpec(64), 300


def made(n: int = 40, **options: Any) -> Selector:
    selector = Selector(range(n), SPEC, **({"dim": 64, "half_life": 50.0} | options))
    selector.refresh(torch.ones(1, 64))
    return selector


def train(selector: Selector, bad: set[int], each: int, steps: range, seed: int = 0) -> list[list[int]]:
    """Rows of a stream: useful or harmful by the prompt's number, NaN of the bad ones."""
    chosen = []
    for step in steps:
        draws = torch.Generator().manual_seed(1000 * seed + step)
        ids = selector.next(each, step)
        rows = torch.randn(each, 64, generator=draws) + torch.tensor([0.3 - 0.02 * i for i in ids])[:, None]
        rows[[i in bad for i in ids], 5] = float("nan")
        selector.update(ids, rows, step)
        chosen.append(ids)
    return chosen


@pytest.mark.parametrize("each", [1, 6])
@pytest.mark.parametrize("explore", [0.0, 1.0])
@pytest.mark.parametrize("within", [None, 1000])
def test_a_prompt_that_always_fails_is_drawn_a_bounded_number_of_times(
    each: int, explore: float, within: int | None
) -> None:
    """Alone in its step, where nothing is left to tell it from an overflow, or among others."""
    selector, bad = made(explore=explore, within=within), {0, 7, 31}
    chosen = train(selector, bad, each, range(STEPS))
    for one in bad:
        assert sum(one in ids for ids in chosen) <= math.log2(STEPS) + 1
    assert set(selector.failed) <= bad and (explore == 0.0 or selector.failed)


def test_what_a_rest_is() -> None:
    selector, nan = made(), torch.full((1, 64), float("nan"))
    step, rests = 0, []
    for _ in range(5):
        selector.update([3], nan, step)
        rests.append(0)
        while selector._failing.resting(step):
            assert 3 not in selector.next(39, step) and selector.next(40, step)[-1] == 3
            rests[-1] += 1
            step += 1
        selector.update([4], torch.ones(1, 64), step)
        step += 1
    assert rests == [2, 4, 8, 16, 32]
    selector.update([3], nan, step)
    assert selector._failing.resting(step) == [3]
    selector.update([3], torch.ones(1, 64), step)
    assert selector._failing.state() == [] and selector.failed == {3: 6}


def test_steps_that_overflow_one_after_another_count_once() -> None:
    """As a run under loss scaling begins: no prompt is left out for long because it was there."""
    selector, nan = made(), torch.full((4, 64), float("inf"))
    for step in range(12):
        selector.update([0, 1, 2, 3], nan, step)
    assert selector.failed == dict.fromkeys(range(4), 12) and not selector.seen.any()
    assert set(selector.next(36, 12)) == set(range(4, 40)), "while there are others"
    assert selector._failing.resting(12) == [0, 1, 2, 3] and selector._failing.resting(13) == []


@pytest.mark.parametrize("within", [None, 1000])
def test_a_run_goes_on_with_its_rests(within: int | None) -> None:
    selector, bad = made(within=within), {0, 7}
    train(selector, bad, 3, range(100))
    assert len(selector._failing.state()) == 2
    file = io.BytesIO()
    torch.save(selector.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again, turned = (
        made(within=within),
        Selector(range(39, -1, -1), SPEC, dim=64, half_life=50.0, within=within),
    )
    again.load_state_dict(state)
    turned.load_state_dict(state)
    for when in range(100, 200, 7):
        rests = selector._failing.resting(when)
        assert sorted(turned.ids[i] for i in turned._failing.resting(when)) == sorted(rests)
    assert train(again, bad, 3, range(100, 200)) == train(selector, bad, 3, range(100, 200))
    for broken in ([[40, 1, 2]], [[0, -1, 2]], [[0, 1]], {}):
        with pytest.raises(CropiError, match="the state is damaged: failing"):
            made(within=within).load_state_dict(state | {"failing": broken})
