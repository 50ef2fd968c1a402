"""The miniature RLVR experiment: its tasks, its rollouts, its scores, and base training that was stopped."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="the experiment's policy is a transformers model")

from support.mini import NANO, Killed, fresh

from benchmarks.rlvr_mini.data import base_model, seed_data
from benchmarks.rlvr_mini.generate import generate
from benchmarks.rlvr_mini.grpo import Trainer, logprobs
from benchmarks.rlvr_mini.model import make_model
from benchmarks.rlvr_mini.pretrain import pretrain
from benchmarks.rlvr_mini.rollouts import thinned, to_tokens
from benchmarks.rlvr_mini.scoring import _gradients, exact_scores, sketched_scores
from benchmarks.rlvr_mini.tasks import (
    DIFFICULTIES,
    END,
    FAMILIES,
    Problem,
    decode,
    encode,
    held_out,
    make_problem,
    make_set,
    verify,
)
from cropi.errors import CropiError
from cropi.gradient.batches import make_batches
from cropi.gradient.estimators import make_estimator
from cropi.gradient.layout import Layout
from cropi_kernels import SketchSpec
from cropi_kernels.sketcher.policy.decoder import split_model


# ----------------------------------------------------------------------------------------------- tasks
def solve(prompt: str) -> str:
    """An independent solution of every family, from the prompt's text alone."""
    tag, body = prompt[0], prompt[1:-1]
    if tag == "C":
        return body
    if tag == "R":
        return body[::-1]
    if tag == "S":
        return "".join(sorted(body))
    if tag in "AB":
        return str(eval(body))
    if tag == "M":
        value, modulus = body.split("%")
        return str(eval(value) % int(modulus))
    if tag == "N":
        letter, text = body.split(":")
        return str(sum(c == letter for c in text))
    while any(pair in body for pair in ("()", "[]", "{}")):
        body = body.replace("()", "").replace("[]", "").replace("{}", "")
    return body[::-1].translate(str.maketrans("([{", ")]}"))


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_right_and_fit(family: str) -> None:
    rng = random.Random(3)
    for difficulty in DIFFICULTIES:
        for _ in range(40):
            problem = make_problem(family, difficulty, rng)
            assert problem.answer == solve(problem.prompt), problem
            assert decode(encode(problem.prompt)) == problem.prompt
            assert len(problem.prompt) <= 24 and 1 <= len(problem.answer) < 12
            assert verify(problem, [*encode(problem.answer), END]) == 1.0


def test_verifier_refuses_wrong_unended_and_trailing_answers() -> None:
    problem = Problem("add", 2, "A17+5=", "22")
    assert verify(problem, [*encode("22"), END]) == 1.0
    for wrong in ([*encode("23"), END], encode("22"), [*encode("222"), END], [*encode("2"), END], [END], []):
        assert verify(problem, wrong) == 0.0
    assert verify(problem, [*encode("22"), 63, END]) == 0.0  # a token outside the alphabet


def test_pool_and_evaluation_sets_never_meet() -> None:
    taken: set[str] = set()
    pool = make_set(4, random.Random(0), evaluation=False)
    test = make_set(4, random.Random(0), evaluation=True, taken=taken)
    more = make_set(4, random.Random(1), evaluation=True, taken=taken)
    prompts = [{p.prompt for p in problems} for problems in (pool, test, more)]
    assert not prompts[0] & (prompts[1] | prompts[2]) and not prompts[1] & prompts[2]
    assert all(held_out(p) for p in prompts[1]) and not any(held_out(p) for p in prompts[0])


def test_bad_names_are_named() -> None:
    with pytest.raises(CropiError, match="family must be one of copy.*'chess'"):
        make_problem("chess", 1, random.Random(0))
    with pytest.raises(CropiError, match="difficulty must be one of.*9"):
        make_problem("add", 9, random.Random(0))
    with pytest.raises(CropiError, match="character 'z'"):
        encode("az")


# -------------------------------------------------------------------------------------------- rollouts
def test_stored_logprobs_are_those_of_the_model(work: Path) -> None:
    model, _ = fresh(work)
    problems = make_set(1, random.Random(5), evaluation=False)[::3]
    made = generate(
        model, [encode(p.prompt) for p in problems], 3, generator=torch.Generator().manual_seed(0), rows=16
    )
    assert any(len(r.ids) < 12 for group in made for r in group)  # some end early: rows drop out on the way
    for problem, group in zip(problems, made, strict=True):
        prompt = encode(problem.prompt)
        for r in group:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + r.ids[:-1]])).logits[0, len(prompt) - 1 :]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(r.ids)[:, None])[:, 0]
            # float32, |log-prob| up to about 10, a few hundred roundings in sequence
            torch.testing.assert_close(torch.tensor(r.logprobs), expected, rtol=1e-4, atol=1e-4)
            assert END not in r.ids[:-1]


def test_training_logprobs_are_those_of_the_rollouts(work: Path) -> None:
    model, data = fresh(work)
    groups = [to_tokens(g) for g in data.pool]
    split, estimator = split_model(model), make_estimator("cropi")
    for batch in make_batches(groups, estimator, Layout(shared=True), budget=256, stored_behaviour=True):
        assert batch.behaviour is not None
        got = logprobs(split, batch).detach()
        if batch.behaviour.ndim == 2:  # some responses are equal, and computed once
            got = got[:, None].expand_as(batch.behaviour)
        torch.testing.assert_close(got, batch.behaviour, rtol=1e-4, atol=1e-4)


def test_greedy_takes_the_likeliest_token(work: Path) -> None:
    model, _ = fresh(work)
    (made,) = generate(model, [encode("A2+3=")], 1)
    with torch.no_grad():
        assert made[0].ids[0] == int(model(input_ids=torch.tensor([encode("A2+3=")])).logits[0, -1].argmax())


def test_larger_pool_keeps_the_seeds_own_and_its_evaluation_sets(work: Path) -> None:
    model, data = fresh(work)
    large = seed_data(NANO, 0, base_model(NANO, work), work / "seed0", pool_times=3)
    assert large.valid == data.valid and large.test == data.test and large.collect_cpu > data.collect_cpu
    assert data.problems.items() < large.problems.items()
    records = {record.id: record for record in large.pool}
    assert all(records[record.id] == record for record in data.pool)
    assert records.keys() == large.problems.keys() and [r.id for r in large.pool] == sorted(records)
    prompts = [p.prompt for p in large.problems.values()]
    assert len(set(prompts)) == len(prompts) and not any(map(held_out, prompts))
    cells = [f"{p.family} {p.difficulty}" for p in large.problems.values()]
    assert cells.count("sort 4") == 3 * NANO.pool_cell
    assert all(len(r.rewards) == NANO.train_rollouts and r.prompt in prompts for r in large.pool)
    assert seed_data(NANO, 0, model, work / "seed0", pool_times=3) == large  # collected once


def test_thinned_groups_keep_right_and_wrong_responses(work: Path) -> None:
    _, data = fresh(work)
    seen = set()
    for group in [*data.pool, *data.valid]:
        for keep in (2, 3):
            small, right = thinned(group, keep), sum(group.rewards)
            expected = min(right, max(keep // 2, keep - (len(group.rewards) - right)))
            assert len(small.rewards) == keep and sum(small.rewards) == expected
            assert (0 < sum(small.rewards) < keep) == (0 < right < len(group.rewards))
            whole = list(zip(group.response_ids, group.logprobs, group.responses, group.rewards))
            rest = iter(whole)  # a subsequence: every response with its own reward and log-probs
            assert all(
                row in rest
                for row in zip(
                    small.response_ids, small.logprobs, small.responses, small.rewards, strict=True
                )
            )
            seen.add((keep, right))
    assert {r for _, r in seen} >= {0, 1, 2}


# --------------------------------------------------------------------------------------------- scoring
def test_sketched_scores_approach_exact_ones(work: Path, tmp_path: Path) -> None:
    model, data = fresh(work)
    estimator, dim = make_estimator("cropi"), 32768
    exact = exact_scores(model, data.pool, data.valid, estimator)
    close = sketched_scores(
        model, data.pool, data.valid, SketchSpec(dim=dim, width=None), estimator, tmp_path / "s", 0, tokens=64
    )
    assert close.ids == exact.ids and close.sets == exact.sets
    assert (close.usable == exact.usable).all() and exact.usable.any()
    error = (close.table - exact.table)[exact.usable]
    assert np.abs(error).max() < 6 * dim**-0.5  # six standard errors of a cosine


def test_scores_under_the_optimiser_are_cosines_with_its_scaled_mean(work: Path, tmp_path: Path) -> None:
    model, data = fresh(work)
    trainer = Trainer(model, 1e-3, 1, 256)
    problems = [data.problems[g.id] for g in data.pool if min(g.rewards) < max(g.rewards)][:4]
    for step in range(6):
        trainer.step(problems, 4, torch.Generator().manual_seed(step))
    states = [trainer.optimiser.state[p] for p in model.parameters()]
    assert all(states), "every parameter has made a step"
    corrected = [s["exp_avg_sq"] / (1 - 0.99 ** float(s["step"])) for s in states]
    # What has never had a gradient takes no step.
    scale = torch.cat([torch.where(v > 0, 1 / (v.sqrt() + 1e-8), 0).flatten() for v in corrected])
    estimator, dim = make_estimator("cropi"), 32768
    means: dict[str, torch.Tensor] = {}
    for group, gradient in _gradients(model, data.valid, estimator):
        means[str(group.set)] = means.get(str(group.set), 0.0) + scale * gradient
    close = sketched_scores(
        model, data.pool, data.valid, SketchSpec(dim=dim, width=None), estimator, tmp_path / "s", 1, tokens=64,
        optimiser=trainer.optimiser,
    )  # fmt: skip
    places = {name: i for i, name in enumerate(close.ids)}
    for group, gradient in _gradients(model, data.pool, estimator):
        exact = [float(torch.cosine_similarity(gradient, means[name], dim=0)) for name in close.sets]
        assert np.abs(close.table[places[group.id]] - exact).max() < 6 * dim**-0.5


def test_resumed_base_training_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.rlvr_mini import pretrain as module

    scale = dataclasses.replace(NANO, base_steps=24, base_decay=30)
    monkeypatch.setattr(module, "EVERY", 1)
    whole, broken, path = make_model(scale, 0), make_model(scale, 0), tmp_path / "c.pt"
    pretrain(whole, scale, 0)

    def dies(step: int, loss: float) -> None:
        if step == 18:
            raise Killed

    with pytest.raises(Killed):
        pretrain(broken, scale, 0, path, dies)
    again = make_model(scale, 0)
    pretrain(again, scale, 0, path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
