"""The miniature RLVR experiment: its tasks, its rollouts, and that a run which was stopped ends as an unbroken one."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the experiment's policy is a transformers model")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.rlvr_mini import __main__ as command  # noqa: E402
from benchmarks.rlvr_mini import choices, cost  # noqa: E402
from benchmarks.rlvr_mini import run as run_module  # noqa: E402
from benchmarks.rlvr_mini.arms import ARMS, LEVERS, choose  # noqa: E402
from benchmarks.rlvr_mini.config import SCALES, Scale  # noqa: E402
from benchmarks.rlvr_mini.data import SeedData, base_model, seed_data  # noqa: E402
from benchmarks.rlvr_mini.generate import generate  # noqa: E402
from benchmarks.rlvr_mini.grpo import Trainer, logprobs  # noqa: E402
from benchmarks.rlvr_mini.live import Live  # noqa: E402
from benchmarks.rlvr_mini.model import make_model  # noqa: E402
from benchmarks.rlvr_mini.pretrain import pretrain  # noqa: E402
from benchmarks.rlvr_mini.report import reference, write_report  # noqa: E402
from benchmarks.rlvr_mini.rollouts import thinned, to_tokens  # noqa: E402
from benchmarks.rlvr_mini.scoring import _gradients, exact_scores, sketched_scores  # noqa: E402
from benchmarks.rlvr_mini.summary import Finished, mean_curve, reach, resampled_gains  # noqa: E402
from benchmarks.rlvr_mini.tasks import (  # noqa: E402
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
from cropi.errors import CropiError  # noqa: E402
from cropi.gradient.batches import make_batches  # noqa: E402
from cropi.gradient.estimators import make_estimator  # noqa: E402
from cropi.gradient.layout import Layout  # noqa: E402
from cropi.store.store import SketchStore  # noqa: E402
from cropi_kernels import SketchSpec, canonical_name  # noqa: E402
from cropi_kernels.sketcher.decoder import split_model  # noqa: E402
from cropi_kernels.testing import sketch_gradients  # noqa: E402

NANO = SCALES["nano"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    base_model(NANO, folder)
    return folder


def fresh(work: Path) -> tuple[Any, SeedData]:
    model = base_model(NANO, work)
    return model, seed_data(NANO, 0, model, work / "seed0")


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
    scale = torch.cat([(1 / (v.sqrt() + 1e-8)).flatten() for v in corrected])
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
                gradients[canonical_name(name)] /= moment.sqrt() + 1e-8
        found[group.id] = sketch_gradients(wide, gradients, spec)
    return found


@pytest.mark.parametrize(
    "name", ["alike_adam_pool3", "live_adam_pool3", "live_budget_adam_pool3", "budget_adam_pool3"]
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
    for stage in (
        (1,) if arm.alike else (0, 1)
    ):  # prompts that share: the first draw knows of no validation set
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
class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "arm",
    [
        ARMS["cropi"],
        *(dataclasses.replace(LEVERS[name], pool=1) for name in ("live_pool3", "live_adam_pool3")),
        dataclasses.replace(LEVERS["alike_pool3"], pool=1, stage=1),
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


# --------------------------------------------------------------------------------------------- command
def test_command_runs_two_arms_and_reports(work: Path, tmp_path: Path) -> None:
    options = ["--scale", "nano", "--work", str(tmp_path), "--arms", "full", "cropi"]
    command.main(options)
    table = (tmp_path / "nano" / "report" / "table.md").read_text()
    assert "| full data, step 12 | 1 |" in table and "| CROPI, sketch, step 4 | 1 |" in table
    assert (tmp_path / "nano" / "report" / "targeted.png").stat().st_size > 0
    result = tmp_path / "nano" / "seed0" / "cropi" / "result.json"
    first = result.stat().st_mtime_ns
    assert len(json.loads(result.read_text())["selections"]) == NANO.steps // NANO.stage
    command.main(options)  # nothing is left to do
    assert result.stat().st_mtime_ns == first


def test_other_numbers_in_one_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nano").mkdir()
    other: Scale = dataclasses.replace(NANO, lr=1.0)
    (tmp_path / "nano" / "scale.json").write_text(json.dumps(dataclasses.asdict(other)))
    with pytest.raises(CropiError, match="lr = 1.0, and this run has"):
        command.main(["--scale", "nano", "--work", str(tmp_path)])
    with pytest.raises(CropiError, match="no run is finished"):
        command.main(["--scale", "nano", "--work", str(tmp_path / "x"), "--report-only"])


def test_cost_of_a_selection_by_parts(work: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "cost.md", tmp_path / "nano"
    options = ["--scale", "nano", "--work", str(tmp_path), "--repeats", "1", "--out", str(out)]
    with pytest.raises(CropiError, match="cropi_exact/result.json is missing; run python -m"):
        cost.main(options)
    folder.mkdir()
    shutil.copy(work / "base.pt", folder)
    model = base_model(NANO, folder)
    data = seed_data(NANO, 0, model, folder / "seed0")
    chosen = choose(ARMS["cropi"], NANO, 0, 0, model, data.pool, data.valid, tmp_path / "sketches")
    for arm, names in (("cropi", []), ("cropi_exact", chosen)):
        (folder / "seed0" / arm).mkdir()
        result = {"selections": [{"chosen": names}], "cpu": {"train": 2.0 * NANO.steps}}
        (folder / "seed0" / arm / "result.json").write_text(json.dumps(result))
    cost.main(options)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")][
        1:
    ]
    assert (
        len(rows) == 2 + len(cost.VARIANTS) and f"training took {2.0 * NANO.stage:.1f} s" in out.read_text()
    )
    shared = {row[0]: float(row[3]) for row in rows[2:]}
    assert shared["sketches of width 64, all of the responses"] == 1.0  # the choice that was written above
    assert all(0.0 <= value <= 1.0 for value in shared.values())
    for row in rows:  # seconds and share agree, to the digits written
        seconds = float(row[1])
        assert float(row[2].rstrip("%")) == pytest.approx(100 * seconds / (seconds + 4.0), abs=0.2)


def test_choices_of_levers_under_a_trained_policy(work: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "choices.md", tmp_path / "nano"
    options = ["--scale", "nano", "--work", str(tmp_path), "--out", str(out)]
    with pytest.raises(CropiError, match="cropi/policy.pt is missing; run python -m"):
        choices.main(options)
    (folder / "seed0" / "cropi").mkdir(parents=True)
    shutil.copy(work / "base.pt", folder)
    weights = base_model(NANO, folder).state_dict()
    rng = torch.Generator().manual_seed(0)
    moved = {
        k: v + 0.1 * v.std() * torch.randn(v.shape, generator=rng)
        for k, v in weights.items()
        if v.numel() > 1
    }
    torch.save(weights | moved, folder / "seed0" / "cropi" / "policy.pt")
    choices.main(options)
    rows = [line.strip("| ").split(" | ") for line in out.read_text().splitlines() if line.startswith("| ")][
        1:
    ]
    assert rows[0][0] == ARMS["cropi_exact"].label and float(rows[0][2]) == 1.0
    assert {row[0] for row in rows[1:]} == {arm.label for arm in choices.COMPARED}
    shared = {row[0]: float(row[2]) for row in rows}
    assert shared[LEVERS["cropi_nofold"].label] >= 0.5  # 256 numbers of a small model: most of the choice
    model = base_model(NANO, folder)
    model.load_state_dict(weights | moved)
    data = seed_data(NANO, 0, model, folder / "seed0")
    exact = choose(ARMS["cropi_exact"], NANO, 0, 0, model, data.pool, data.valid, tmp_path / "x")
    families = [data.problems[name].family in NANO.targeted for name in exact]
    assert float(rows[0][3]) == pytest.approx(sum(families) / len(families), abs=0.006)


def test_report_of_runs_on_a_larger_pool_alone(tmp_path: Path) -> None:
    """Written by hand, so that every number of the tables is known."""
    targeted, other = NANO.targeted[0], "copy"
    rises = {"full_pool3": 0.01, "cropi_pool3": 0.04, "live_pool3": 0.03}
    for name, rise in rises.items():
        events, steps = [], 12 if name == "full_pool3" else 4
        for step in range(steps + 1):
            # The first selection takes 3 s, every later one 1 s, and a step of training 2 s.
            selecting = 0.0 if step == 0 or name == "full_pool3" else 3.0 + (step - 1) // NANO.stage
            accuracy = dict.fromkeys(NANO.targeted, 0.2 + rise * step) | {other: 0.1}
            events.append({"step": step, "accuracy": dict.fromkeys(FAMILIES, 0.1) | accuracy})
            events[-1]["cpu"] = {"train": 2.0 * step, "select": selecting}
        run = {
            "arm": name,
            "seed": 0,
            "collect_cpu": 5.0,
            "evaluations": events,
            "steps": [{"mixed": 0.5}],
            "cpu": events[-1]["cpu"],
            "selections": [
                {"step": step, "targeted": 0.5, "chosen": ["a"], "cells": {f"{targeted} 1": 1}}
                for step in range(0, steps if name == "full_pool3" else NANO.steps, NANO.stage)
            ],
        }
        folder = tmp_path / "seed0" / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(run))
    write_report(NANO, tmp_path, tmp_path / "out")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "took 5 s of processor time" in table
    assert "| full data, pool x 3, step 12 | 1 | 0.310 |" in table  # the mean of steps 10 to 12
    # Two selections of 3 and 1 s beside 4 s of training a stage: 4 of 12 s, and 1 of 5 after the first.
    assert "| CROPI, sketch, pool x 3 | 3.00, 1.00 | 4.0 | 33.3% | 20.0% |" in table
    assert (
        "| live, pool x 3 | -0.030 | -0.030 |" in table
    )  # step 4: the mean of steps 2 to 4, 0.29 against 0.32
    assert (tmp_path / "out" / "live.png").stat().st_size and not (tmp_path / "out" / "targeted.png").exists()


def test_steps_to_reach_are_interpolated() -> None:
    curve = [(0, 0.2, 0.0), (10, 0.4, 5.0), (20, 0.6, 10.0)]
    assert reach(curve, 0.5) == pytest.approx((15.0, 7.5))
    assert reach(curve, 0.7) is None
    other = [(0, 0.2, 0.0), (20, 0.4, 30.0)]
    runs = [Finished("x", i, c, [], 0.2, 1.0, 9.0, 0.0, [], 0.5) for i, c in enumerate((curve, other))]
    assert np.allclose(mean_curve(runs), [(0, 0.2, 0.0), (20, 0.5, 20.0)])
    assert runs[0].share == pytest.approx(0.1)


def test_speed_up_of_resampled_seeds_and_against_full_data_of_the_same_pool() -> None:
    def run(arm: str, seed: int, rises: list[float]) -> Finished:
        curve = [(10 * i, value, float(i)) for i, value in enumerate(rises)]
        return Finished(arm, seed, curve, [(0, 0.1), (40, 0.1)], rises[0], 1.0, 9.0, 0.0, [], 0.5)

    slow = [run("full", seed, [0.2, 0.3, 0.4, 0.5, 0.6]) for seed in (0, 1)]
    fast = [run("cropi", 0, [0.2, 0.4, 0.6, 0.6, 0.6]), run("cropi", 1, [0.2, 0.3, 0.4, 0.5, 0.5])]
    assert resampled_gains(slow, slow, 40) == (1.0, 1.0)
    low, high = resampled_gains(fast, slow, 40)
    # Seed 1 twice never gets there, seed 0 twice in 20 steps.
    assert low == 0.0 and high == pytest.approx(2.0)
    assert resampled_gains(fast, [run("full", s, [0.2, 0.1, 0.1, 0.1, 0.1]) for s in (0, 1)], 40) == (
        0.0,
        0.0,
    )
    by_arm = {name: [] for name in (*ARMS, *LEVERS)} | {"full": slow, "full_pool3": fast}
    assert reference(ARMS | LEVERS, by_arm, "cropi") == slow
    assert reference(ARMS | LEVERS, by_arm, "cropi_pool3") == fast
