"""Subsets of responses: right on average, in size and in every number of the sketch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer
from support.stores import sketches_of

import cropi
from cropi.data.readers import read
from cropi.errors import CropiError
from cropi.gradient.batches import make_batches
from cropi.gradient.estimators import make_estimator
from cropi.gradient.layout import Layout
from cropi.gradient.subset import Subset, drawn, inclusion
from cropi.gradient.tokenize import TokenGroup, Tokenize
from cropi.model.policy import Policy


def test_probabilities_add_up() -> None:
    sizes = np.array([3.0, 0.0, 1.0, 1.0, 10.0, 0.5])
    for n in (1, 2, 3, 4):
        found = inclusion(sizes, n)
        assert found.sum() == pytest.approx(n) and (found <= 1).all() and found[1] == 0
        free = (found < 1) & (found > 0)
        assert np.allclose(found[free] / sizes[free], (found[free] / sizes[free])[0])
    assert inclusion(sizes, 5).tolist() == inclusion(sizes, 9).tolist() == [1, 0, 1, 1, 1, 1]


def test_each_is_drawn_with_its_probability() -> None:
    probabilities, draws = inclusion(np.array([3.0, 0.0, 1.0, 1.0, 10.0, 0.5]), 3), np.random.default_rng(0)
    counts, rounds = np.zeros(6), 4000
    for _ in range(rounds):
        places = drawn(probabilities, draws)
        assert len(places) == 3
        counts[places] += 1
    # Four standard deviations of a share of so many rounds.
    assert (
        np.abs(counts / rounds - probabilities) <= 4 * np.sqrt(probabilities * (1 - probabilities) / rounds)
    ).all()


@pytest.mark.long
def test_weights_are_right_on_average() -> None:
    """Exactly: over all draws, kept responses' factors average to 1, whatever the estimator divides by."""
    policy = Policy(make_model(), make_tokenizer())
    record = make_records(1, seed=3)[0]
    record |= {"responses": ["1", "12", "123", "1234"], "rewards": [1.0, 0.0, 0.25, 0.5]}
    record.pop("response_ids", None)
    record.pop("logprobs", None)
    tokens = Tokenize(policy.tokenizer, policy.vocabulary, policy.context)
    group = tokens(next(iter(read([record]))))
    for name in ("cropi", "dapo", "dr_grpo"):
        estimator = make_estimator(name)
        factors = np.zeros(4)
        rounds = 400
        for i in range(rounds):
            kept = Subset(2, seed=str(i)).of(group, estimator).kept
            assert kept is not None and len(kept) == 2
            for k, factor in kept.items():
                factors[k] += factor / rounds
        # The variance of a factor is 1 / p - 1, and p is at least 0.1 here.
        assert (np.abs(factors - 1) <= 4 * np.sqrt(9 / rounds)).all(), (name, factors)
    assert Subset(4).of(group, estimator).kept is None


def test_every_token_counts_alike() -> None:
    """Each scored token is among those that are drawn in a share of ceil(share T) / T of the draws, masked ones never;
    weights are multiplied by the inverse."""
    record = {
        "id": "a",
        "prompt_ids": [5, 6],
        "rewards": [1.0, 0.0],
        "response_ids": [[*range(7, 12)], [9, 1]],
    }
    group = next(iter(read([record | {"loss_mask": [[1, 1, 0, 1, 1], [1, 1]]}])))
    assert group.response_ids is not None and group.loss_mask is not None
    made = TokenGroup(group, [5, 6], group.response_ids, None, 1.0, group.loss_mask)
    estimator, rounds, counts = make_estimator("cropi"), 600, np.zeros(4)
    full = next(iter(make_batches([made], estimator, Layout(shared=False))))
    for i in range(rounds):
        part = Subset(tokens=0.3, seed=str(i)).of(made, estimator)
        assert part.places is not None and [len(part.places[k]) for k in (0, 1)] == [2, 1]
        counts[part.places[0]] += 1 / rounds
        batch = next(iter(make_batches([part], estimator, Layout(shared=False))))
        for k, (scored, kept) in enumerate(((4, 2), (2, 1))):
            mine = batch.positions // batch.input_ids.shape[1] == k
            assert (
                set(batch.positions[mine].tolist()) <= set(full.positions.tolist())
                and int(mine.sum()) == kept
            )
            ratio = batch.advantages[mine] / full.advantages[full.responses == k][:kept]
            assert torch.equal(ratio, torch.full((kept,), scored / kept))
    # Four standard deviations of a share of so many draws.
    assert (np.abs(counts - 0.5) <= 4 * 0.5 / rounds**0.5).all()
    assert Subset(tokens=1.0).of(made, estimator) is made


@pytest.mark.long
@pytest.mark.parametrize(
    "few", [{"responses": 2}, {"token_share": 0.3}, {"responses": 2, "token_share": 0.5}]
)
def test_sketches_are_right_on_average(few: dict[str, Any]) -> None:
    """Stages draw anew; their mean comes as near to the full sketch as their spread says."""
    policy = Policy(make_model(), make_tokenizer())
    records = make_records(3, seed=5)
    for record in records:  # the first two are one
        record["responses"][1] = record["responses"][0]
        record["rewards"] = [1.0, 1.0, 0.0, 0.5]
    options = dict(dim=1024, progress=False, behaviour="current")

    def rows(store: cropi.SketchStore) -> torch.Tensor:
        found = sketches_of(store)
        return torch.stack([found[name] for name in sorted(found)]).double()

    full = rows(cropi.sketch(policy, records, **options))
    parts = torch.stack(
        [rows(cropi.sketch(policy, records, stage=str(i), **few, **options)) for i in range(40)]
    )
    assert (parts != parts[0]).any(), "stages draw anew"
    error = (parts.mean(0) - full).norm(dim=1)
    spread = (parts - parts.mean(0)).square().sum(2).mean(0).sqrt() / 40**0.5
    assert (error <= 3 * spread).all(), (error / full.norm(dim=1), spread / full.norm(dim=1))
    again = rows(cropi.sketch(policy, records, stage="0", **few, **options))
    assert torch.equal(again, parts[0]), "a draw is that of the stage and the prompt"
    same = rows(cropi.sketch(policy, records, responses=99, token_share=1.0, **options))
    assert torch.equal(same, full)


def test_validation_prompts_keep_all_their_responses() -> None:
    policy = Policy(make_model(), make_tokenizer())
    train, valid = make_records(4, seed=1), make_records(3, seed=2)
    options = dict(dim=1024, progress=False, behaviour="current")
    few = cropi.score(policy, train, valid, responses=2, token_share=0.5, **options)
    stores = [
        cropi.sketch(policy, valid, set="valid", **(options | few_of))
        for few_of in ({}, {"token_share": 0.5})
    ]
    assert not torch.equal(*(next(store.shards())[1] for store in stores)), (
        "by itself the option holds for any file"
    )
    all_ = cropi.score(policy, train, valid, **options)
    assert few.table.shape == all_.table.shape and not np.array_equal(few.table, all_.table)


def test_refused_in_words() -> None:
    policy = Policy(make_model(), make_tokenizer())
    for responses in (0, -1, 1.5, True):
        with pytest.raises(CropiError, match="responses"):
            cropi.sketch(policy, make_records(1, seed=1), responses=responses, progress=False)
    for share in (0.0, -0.1, 1.1, True):
        with pytest.raises(CropiError, match="token_share"):
            cropi.sketch(policy, make_records(1, seed=1), token_share=share, progress=False)
    with pytest.raises(
        CropiError, match="'gspo' has a ratio of whole responses, which needs all of their tokens"
    ):
        cropi.sketch(policy, make_records(1, seed=1), token_share=0.5, estimator="gspo", progress=False)
