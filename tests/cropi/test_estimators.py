"""Token weights against autograd of the objectives that the estimators are named after."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.oracle import OBJECTIVES, advantages

from cropi.data.rewards import no_gradient_reason, pass_rate
from cropi.gradient.estimators import (
    ESTIMATORS,
    Estimator,
    group_advantages,
    make_estimator,
    sequence_behaviour,
)

REWARDS = [1.0, 0.0, 0.0, 1.0, 0.5]
LENGTHS = [3, 1, 7, 4, 2]


def log_probs(seed: int, spread: float) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Current and behaviour log-probs whose ratios fall inside and outside the clipping range."""
    generator = torch.Generator().manual_seed(seed)
    old = [-3 * torch.rand(n, generator=generator, dtype=torch.float64) for n in LENGTHS]
    new = [q + spread * torch.randn(q.shape, generator=generator, dtype=torch.float64) for q in old]
    return new, old


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_the_gradient_of_the_objective(name: str, seed: int) -> None:
    new, old = log_probs(seed, {"gspo": 6e-4, "cispo": 1.5}.get(name, 0.3))
    for p in new:
        p.requires_grad_()
    kind, objective = OBJECTIVES[name]
    objective(new, old, advantages(REWARDS, kind)).backward()
    expected = torch.cat([p.grad for p in new if p.grad is not None])
    constant = 50.0 if name in ("dr_grpo", "bnpo") else None
    expected /= constant or 1.0

    estimator = make_estimator(name, constant=constant)
    lengths = torch.tensor(LENGTHS)
    behaviour = torch.cat(old)
    if estimator.level == "sequence":
        responses = torch.arange(len(LENGTHS)).repeat_interleave(lengths)
        behaviour = sequence_behaviour(torch.cat(new).detach(), behaviour, responses)
    got = estimator.of_sequences().weights(
        torch.cat(new).detach(),
        behaviour,
        torch.from_numpy(estimator.advantages(REWARDS)).repeat_interleave(lengths),
        torch.from_numpy(estimator.divisors(LENGTHS)).repeat_interleave(lengths),
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)
    if estimator.cap is not None:
        assert 0 < int((torch.cat(new) - torch.cat(old) > 1.61).sum()) < got.numel(), (
            "some ratios must be bounded"
        )
    if estimator.clip_low is not None:
        assert 0 < int((got == 0).sum()) < got.numel(), "the case must have clipped and unclipped tokens"


def test_clipping_stops_only_moves_that_the_advantage_wants() -> None:
    ratio = torch.tensor([0.5, 0.79, 0.81, 1.19, 1.21, 3.0, 0.5, 1.21])
    advantage = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    clip = make_estimator("ppo").clipped(ratio, advantage)
    assert clip.tolist() == [False, False, False, False, True, False, True, False]
    assert not make_estimator("cropi").clipped(ratio, advantage).any()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_behaviour_the_ratio_is_one(name: str) -> None:
    estimator = ESTIMATORS[name]
    logprobs, advantage, divisor = -torch.rand(5), torch.randn(5), torch.full((5,), 4.0)
    got = estimator.weights(logprobs, None, advantage, divisor)
    equal = estimator.of_sequences().weights(logprobs, logprobs.clone(), advantage, divisor)
    torch.testing.assert_close(got, equal)
    torch.testing.assert_close(got, advantage / 4)


def test_advantages_by_hand() -> None:
    # mean 0.5, deviations +-0.5, unbiased variance 4 * 0.25 / 3
    sd = (1 / 3) ** 0.5
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1]), np.array([0.5, -0.5, -0.5, 0.5]) / (sd + 1e-4))
    np.testing.assert_allclose(group_advantages([1, 0, 0, 1], std=False), [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(group_advantages([1, 0], eps=0.0), [0.5**0.5, -(0.5**0.5)])
    with pytest.raises(ValueError, match="at least two are needed"):
        group_advantages([1.0])


def test_rewards_that_would_overflow_are_refused() -> None:
    for std in (True, False):
        for bad in (1e300, -1e31, float("inf"), float("nan")):
            with pytest.raises(ValueError, match="rewards: .*at most 1e[+]30; scale them down"):
                group_advantages([bad, 0.0, 1.0], std=std)
        largest = group_advantages([1e30, -1e30, 0.0], std=std)
        assert np.isfinite(largest.astype(np.float32)).all() and largest[0] == -largest[1] > 0.5


def test_prompts_without_a_gradient_are_known_from_their_rewards() -> None:
    assert no_gradient_reason([0.0, 0.0]) == "equal rewards" and no_gradient_reason([1.0]) == "one response"
    assert no_gradient_reason([0.1, 0.1 + 1e-6]) is None
    assert no_gradient_reason([0.1 + 0.2, 0.3]) == no_gradient_reason([-(0.1 + 0.2), -0.3]) == "equal rewards"
    in_float32 = [float(np.float32(a) + np.float32(b)) for a, b in ((0.1, 0.6), (0.2, 0.5))]
    assert in_float32[0] != in_float32[1] and no_gradient_reason(in_float32) == "equal rewards"
    assert no_gradient_reason([5e-324, 0.0]) is None and no_gradient_reason([-1.0, 1.0]) is None
    assert pass_rate([1.0, 0.0, 0.5, 0.1]) == 0.5


def test_contradicting_options_are_refused() -> None:
    for call, message in (
        (lambda: make_estimator("trpo"), "estimator must be one of cropi, grpo, ppo"),
        (lambda: make_estimator("grpo", cap=2.0), "cap=2.0: the ratio is bounded or clipped, not both"),
        (lambda: make_estimator("cropi", cap=2.0), "cap=2.0: the estimator 'cropi' does not use it"),
        (lambda: make_estimator("cispo", cap=0.0), "cap must be a finite number above 0"),
        (lambda: make_estimator("cispo", clip_low=0.1, clip_high=0.1), "bounded or clipped, not both"),
        (lambda: make_estimator("cropi", delta=2.0), "delta=2.0: it bounds a clipped ratio"),
        (lambda: make_estimator("rloo", std=True), "loo: an advantage that leaves one out is not divided"),
        (lambda: make_estimator("rloo", level="sequence"), "has no ratio; leave them out"),
        (lambda: Estimator("mine", ratio=False, cap=2.0), "has no ratio; leave them out"),
        (lambda: make_estimator("grpo", level="group"), "level must be one of token, sequence"),
        (lambda: make_estimator("reinforce", clip_low=0.1, clip_high=0.1), "has no ratio to clip"),
        (lambda: make_estimator("cropi", clip_low=0.1), "needs both or none"),
        (lambda: make_estimator("cropi", constant=3.0), "does not use it; leave it out"),
        (lambda: make_estimator("reinforce", eps=0.1), "does not use it; leave it out"),
        (lambda: make_estimator("ppo", eps=float("inf")), "eps must be a finite number"),
        (lambda: make_estimator("ppo", eps=-1.0), "eps must be a finite number >= 0"),
        (lambda: Estimator("x", length="words"), "length must be one of"),
        (lambda: make_estimator("dr_grpo", constant=0.0), "constant must be a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_ratios_of_responses_are_refused_token_by_token() -> None:
    estimator, some = make_estimator("gspo"), torch.zeros(3)
    with pytest.raises(ValueError, match="'gspo' has a ratio of responses: give it sequence_behaviour"):
        estimator.weights(some, some, some, some + 1)
    assert estimator.weights(some, None, some + 2, some + 1).tolist() == [2.0] * 3


def test_the_ratio_of_a_response_for_equal_responses_of_other_policies() -> None:
    new = torch.tensor([-1.0, -2.0, -3.0, -1.0], dtype=torch.float64)
    old = torch.tensor([[-1.5, -1.0], [-2.5, -2.0], [-1.0, -4.0], [-1.0, -1.0]], dtype=torch.float64)
    found = new[:, None] - sequence_behaviour(new, old, torch.tensor([0, 0, 1, 1]))
    torch.testing.assert_close(
        found, torch.tensor([[0.5, 0.0], [0.5, 0.0], [-1.0, 0.5], [-1.0, 0.5]]).double()
    )


def test_manifests_of_estimators_that_were_there_before_are_as_they_were() -> None:
    assert ESTIMATORS["ppo"].to_dict() == {
        "name": "ppo", "ratio": True, "clip_low": 0.2, "clip_high": 0.2, "std": True, "eps": 1e-4, "length": "response",
        "constant": 1.0,
    }  # fmt: skip
    assert ESTIMATORS["gspo"].to_dict()["level"] == "sequence" and ESTIMATORS["cispo"].to_dict()["cap"] == 5.0
    assert Estimator(**ESTIMATORS["rloo"].to_dict()) == ESTIMATORS["rloo"]
