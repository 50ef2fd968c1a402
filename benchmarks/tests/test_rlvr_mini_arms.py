"""The arms of the miniature RLVR experiment: what they choose, and that a stopped run ends as an unbroken one."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the experiment's policy is a transformers model")

from support.mini import NANO, Killed, fresh

from benchmarks.rlvr_mini import run as run_module
from benchmarks.rlvr_mini.arms import ARMS, LEVERS, choose
from benchmarks.rlvr_mini.data import base_model
from benchmarks.rlvr_mini.grpo import Trainer
from benchmarks.rlvr_mini.live import Live, sampled_anew
from benchmarks.rlvr_mini.tasks import Problem, verify
from cropi import Selector
from cropi.errors import CropiError
from cropi.store.store import SketchStore
from cropi_kernels import LiveSketcher, SketchSpec, canonical_name
from cropi_kernels.testing import sketch_gradients


def exact_sketches(
    model: Any, groups: list[Any], spec: SketchSpec, optimiser: torch.optim.Optimizer | None
) -> dict[str, torch.Tensor]:
    """Every prompt's gradient by autograd in float64, one response at a time, scaled as AdamW's next step scales a
    gradient, and sketched coordinate by coordinate."""
    wide, found = copy.deepcopy(model).double(), {}
    for group in groups:
        rewards = torch.tensor(group.rewards, dtype=torch.float64)
        if float(rewards.std()) == 0:
            continue
        wide.zero_grad()
        for ids, beta, advantage in zip(
            group.response_ids, group.logprobs, (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        ):
            logits = wide(input_ids=torch.tensor([group.prompt_ids + ids])).logits[
                0, len(group.prompt_ids) - 1 : -1
            ]
            values = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
            ratios = (values.detach() - torch.tensor(beta, dtype=torch.float64)).exp()
            ((ratios * values).mean() * advantage / len(rewards)).backward()
        gradients = {}
        for (name, p), own in zip(wide.named_parameters(), model.parameters(), strict=True):
            gradients[canonical_name(name)] = p.grad.clone()
            if optimiser is not None:
                state = optimiser.state[own]
                moment = state["exp_avg_sq"].double() / (1 - 0.99 ** float(state["step"]))
                # What has never had a gradient takes no step.
                gradients[canonical_name(name)] *= torch.where(moment > 0, 1 / (moment.sqrt() + 1e-8), 0)
        found[group.id] = sketch_gradients(wide, gradients, spec)
    return found


@pytest.mark.parametrize(
    "name",
    ["alike_adam_pool3", "then_adam_pool3", "live_adam_pool3", "live_budget_adam_pool3", "budget_adam_pool3"],
)
def test_arms_under_the_optimiser_scale_validation_gradients_alone(
    name: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = fresh(work)
    trainer = Trainer(model, 1e-3, 1, 256)
    problems = [data.problems[g.id] for g in data.pool if min(g.rewards) < max(g.rewards)][:4]
    arm, pool = dataclasses.replace(LEVERS[name], thin=1, first=1.0), data.pool[::4]
    live, rows = None, dict[str, torch.Tensor]()
    if arm.live:
        live = Live(model, NANO, 0, pool, alike=arm.alike)
        monkeypatch.setattr(live.selector, "update", lambda ids, made, step: rows.update(zip(ids, made)))
    sets = {group.id: group.set for group in data.valid}
    # Where prompts share, the first draw knows of no validation set.
    for stage in (1,) if arm.alike else (0, 1):
        for step in range(6 * stage):
            trainer.step(problems, 4, torch.Generator().manual_seed(step))
        optimiser = trainer.optimiser if stage else None  # before its first step it holds no moments
        valid = exact_sketches(model, data.valid, NANO.spec(0), optimiser)
        train = exact_sketches(model, pool, NANO.spec(0), None) if arm.budget else {}
        choose(
            arm, NANO, 0, stage, model, pool, data.valid, tmp_path / f"{stage}", trainer.optimiser, live=live
        )
        if live is None:
            for part in ("valid", "train"):
                store = SketchStore.open(tmp_path / f"{stage}" / "sketches" / part)
                rows |= {row.id: made for held, table in store.shards() for row, made in zip(held, table)}
            right = train | valid
        else:  # the selector keeps the direction of each set's mean
            means = [
                torch.stack([v for k, v in valid.items() if sets[k] == s]).mean(0) for s in NANO.targeted
            ]
            right = train | {s: mean / mean.norm() for s, mean in zip(NANO.targeted, means, strict=True)}
            rows |= dict(zip(sorted(NANO.targeted), live.selector.state_dict()["valid"], strict=True))
        assert len(right) >= 2
        for key, row in right.items():
            assert float((rows[key].double() - row).norm() / row.norm()) < 2e-4, (stage, key)


def test_validation_prompts_are_sampled_anew(work: Path) -> None:
    model, data = fresh(work)
    made = {group.id: group for group in sampled_anew(model, data.valid, 3, seed=1)}
    assert made.keys() == {group.id for group in data.valid}
    for group in data.valid:
        mine = made[group.id]
        assert (mine.prompt_ids, mine.set, mine.answer) == (group.prompt_ids, group.set, group.answer)
        problem = Problem(group.task, group.extra["difficulty"], group.prompt, group.answer)
        assert mine.rewards == [verify(problem, ids) for ids in mine.response_ids] and len(mine.rewards) == 3
    again = {group.id: group for group in sampled_anew(model, data.valid, 3, seed=1)}
    assert again == made and sampled_anew(model, [], 3, seed=1) == []


def test_chosen_prompts_have_a_gradient_and_full_data_takes_all(work: Path, tmp_path: Path) -> None:
    model, data = fresh(work)
    mixed = {g.id for g in data.pool if min(g.rewards) < max(g.rewards)}
    n = int(len(data.pool) * NANO.fraction)
    for arm in (*ARMS.values(), *LEVERS.values()):
        if arm.live:  # drawn by what training has shown: a run of its own
            continue
        # Of this pool half has no gradient: the first stage must score more to choose so many.
        arm = arm if arm.budget is None else dataclasses.replace(arm, first=0.9)
        chosen = choose(arm, NANO, 0, 0, model, data.pool, data.valid, tmp_path / arm.name)
        assert len(chosen) == len(set(chosen))
        if arm.method == "full":
            assert set(chosen) == data.problems.keys()
        elif arm.method == "random":
            assert len(chosen) == n
        else:
            assert 0 < len(chosen) <= n and set(chosen) <= mixed


def test_nothing_to_select_is_a_clear_error(work: Path, tmp_path: Path) -> None:
    model, data = fresh(work)
    solved = [dataclasses.replace(g, rewards=[1.0] * len(g.rewards)) for g in data.pool]
    with pytest.raises(CropiError, match="no prompt of the pool has a gradient.*base_steps"):
        choose(ARMS["learnability"], NANO, 0, 0, model, solved, data.valid, tmp_path)


# ---------------------------------------------------------------------------------------------- resume
@pytest.mark.parametrize(
    "arm",
    [
        ARMS["cropi"],
        *(dataclasses.replace(LEVERS[name], pool=1) for name in ("live_pool3", "live_adam_pool3")),
        *(dataclasses.replace(LEVERS[name], pool=1, stage=1) for name in ("alike_pool3", "fresh_pool3")),
    ],
)
def test_resumed_run_ends_as_an_unbroken_one(
    arm: Any, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = fresh(work)
    unbroken = run_module.run_arm(arm, NANO, 0, model, data, tmp_path / "a")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    real = run_module.Trainer.step

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.done == 3:
            raise Killed
        return real(self, *args, **kwargs)

    model, data = fresh(work)
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Trainer, "step", dies)
        with pytest.raises(Killed):
            run_module.run_arm(arm, NANO, 0, model, data, tmp_path / "b")
    assert not (tmp_path / "b" / "result.json").exists()
    model, data = fresh(work)
    resumed = run_module.run_arm(arm, NANO, 0, model, data, tmp_path / "b")
    for key in ("chosen", "steps", "selections"):
        assert resumed[key] == unbroken[key], key
    assert [e["accuracy"] for e in resumed["evaluations"]] == [e["accuracy"] for e in unbroken["evaluations"]]
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    assert any(not torch.equal(v, base_model(NANO, work).state_dict()[k]) for k, v in weights.items())


def test_steps_that_do_not_count_are_not_sketched_and_change_nothing(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The validation mean is renewed before steps 1 and 2 of four, and a visit counts one step later at most.
    arm = dataclasses.replace(LEVERS["then_long_cut_pool3"], pool=1, stage=1, within=1, longer=1, cut=40)
    blocks, sketched, listens = [0], LiveSketcher.batch, Selector.listens

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        blocks[-1] += 1
        return sketched(self, *args, **kwargs)

    monkeypatch.setattr(LiveSketcher, "batch", counted)
    model, data = fresh(work)
    some = run_module.run_arm(arm, NANO, 0, model, data, tmp_path / "a")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    add = Selector._add
    monkeypatch.setattr(Selector, "listens", lambda self, step=None: True)
    monkeypatch.setattr(Selector, "_add", lambda self, *given: listens(self, self.step) and add(self, *given))
    blocks.append(0)
    model, data = fresh(work)
    every = run_module.run_arm(arm, NANO, 0, model, data, tmp_path / "b")
    assert some["selections"] == every["selections"] and some["steps"] == every["steps"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert 0 < blocks[0] < blocks[1]


@pytest.mark.parametrize(
    "name", ["budget_pool3", "live_budget_pool3", "budget_adam_pool3", "live_budget_adam_pool3"]
)
def test_arms_within_a_budget_score_a_part(name: str, work: Path, tmp_path: Path) -> None:
    arm = dataclasses.replace(LEVERS[name], pool=1, first=0.8)
    model, data = fresh(work)
    run = run_module.run_arm(arm, NANO, 0, model, data, tmp_path)
    sizes = [len(one["chosen"]) for one in run["selections"]]
    assert sizes == [int(NANO.fraction * len(data.pool))] * (NANO.steps // NANO.stage)
    plans = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("stage-*/anew.json"))]
    assert all(plan["spent"] <= plan["tokens"] for plan in plans) and len(plans) == (0 if arm.live else 1)


def test_a_run_killed_before_its_policy_is_kept_writes_it_the_next_time(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_module.save_torch

    def dies(path: Path, value: Any) -> None:
        if path.name == "policy.pt":
            raise Killed
        real(path, value)

    model, data = fresh(work)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_torch", dies)
        with pytest.raises(Killed):
            run_module.run_arm(ARMS["random"], NANO, 0, model, data, tmp_path / "run")
    model, data = fresh(work)
    run_module.run_arm(ARMS["random"], NANO, 0, model, data, tmp_path / "run")
    kept = torch.load(tmp_path / "run" / "policy.pt")
    assert all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
