"""The staged curriculum in real GRPO runs: what is trained on, when, in which order, and how a run is resumed."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_tokenizer

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

from support import trl_runs  # noqa: E402
from support.commands import json_lines  # noqa: E402
from support.trl_runs import SPEC, Seen, dataset, selected, staged, stored  # noqa: E402

from cropi.errors import CropiError  # noqa: E402
from cropi.gradient.estimators import Estimator  # noqa: E402
from cropi.model.policy import Policy  # noqa: E402
from cropi.pipeline import NothingToFollow  # noqa: E402
from cropi.ranking.influence import SharedPrompts, influence  # noqa: E402
from cropi.ranking.selection import select  # noqa: E402
from cropi.sketching.job import SketchJob  # noqa: E402
from cropi.sketching.run import sketch  # noqa: E402
from cropi.store.store import SketchStore  # noqa: E402
from cropi.trainers.trl import Curriculum  # noqa: E402
from cropi.trainers.trl import stages as stages_module  # noqa: E402
from cropi.trainers.trl.ranks import Ranks  # noqa: E402
from cropi.trainers.trl.sampler import StagePlan, StageSampler  # noqa: E402
from cropi.trainers.trl.scoring import last_scored  # noqa: E402
from cropi.trainers.trl.stages import Stages  # noqa: E402


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trajectories of 16 of the 20 training prompts, and of two validation sets."""
    return trl_runs.files(tmp_path_factory.mktemp("stored"), sets=["x", "y"])


# ------------------------------------------------------------------------------------------------ sampler
def sampler(rows: list[int], stage: int = 0, **changes: Any) -> StageSampler:
    given: dict[str, Any] = dict(chunks=7, prompts=3, generations=4, repeats=2, shuffle=True, seed=5)
    return StageSampler(StagePlan(stage, rows), **(given | changes))


def test_sampler_keeps_trl_pattern() -> None:
    order = list(sampler([10, 11, 12, 13, 14, 15, 16, 17]))
    assert len(order) == len(sampler([0, 1, 2])) == 7 * 3 * 4 * 2
    batches = [order[i : i + 12] for i in range(0, len(order), 12)]
    for first, again in zip(batches[::2], batches[1::2]):
        assert first == again  # a generation batch is given out as often as it is used
        assert len(set(first)) == 3  # different prompts
        assert all(len(set(first[i : i + 4])) == 1 for i in (0, 4, 8))  # each num_generations times in a row
    counts = Counter(order)
    assert set(counts) <= set(range(10, 18)) and max(counts.values()) - min(counts.values()) <= 8 * 2


def test_one_pass_is_trl_own_order() -> None:
    from trl.trainer.utils import RepeatSampler

    from cropi.trainers.trl.sampler import pass_seed

    own = RepeatSampler(range(9), 4, batch_size=3, repeat_count=2, shuffle=True, seed=pass_seed(5, 2, 0))
    assert list(sampler(list(range(9)), stage=2, chunks=3)) == list(own)


def test_sampler_order_depends_on_stage_and_seed_and_the_plan_of_the_moment() -> None:
    rows = list(range(9))
    assert list(sampler(rows)) == list(sampler(rows)) == list(sampler(rows[::-1]))
    assert list(sampler(rows)) != list(sampler(rows, stage=1)) != list(sampler(rows, stage=1, seed=6))
    plan = StagePlan(0, rows)
    one = StageSampler(plan, chunks=3, prompts=3, generations=1, repeats=1, shuffle=False, seed=0)
    assert list(one) == rows
    plan.rows = [4, 2, 8]
    assert list(one) == [2, 4, 8] * 3


# ------------------------------------------------------------------------------------------------- stages
@pytest.mark.long
def test_stages_train_on_selected_prompts_only(files: dict[str, Path], tmp_path: Path) -> None:
    seen = Seen()
    trainer = staged(tmp_path, {**files, "fraction": 0.25}, reward_funcs=seen, max_steps=6)
    trainer.train()
    assert sorted(seen.ids) == [0, 1, 2, 3, 4, 5]
    for stage in range(3):
        chosen = selected(tmp_path, stage)
        assert len(chosen) == 4  # a quarter of the 16 prompts that have trajectories
        assert set(seen.ids[2 * stage]) | set(seen.ids[2 * stage + 1]) == set(chosen)
    for ids in seen.ids.values():
        assert len(ids) == 8 and len(set(ids[:4])) == len(set(ids[4:])) == 1 and ids[0] != ids[4]
    notes = json_lines(tmp_path / "cropi" / "stages.jsonl")
    assert [(n["stage"], n["step"], n["pool"], n["selected"], n["dataset"]) for n in notes] == [
        (0, 0, 16, 4, 20), (1, 2, 16, 4, 20), (2, 4, 16, 4, 20),
    ]  # fmt: skip


@pytest.mark.long
def test_selection_is_that_of_the_command_line_under_the_current_policy(
    files: dict[str, Path], tmp_path: Path
) -> None:
    trainer = staged(
        tmp_path,
        files | {"estimator": "cropi"},  # the command line's default; the trainer's own is that of its loss
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        learning_rate=3e-2,
        eval_dataset=None,
    )
    trainer.train()
    from transformers import AutoModelForCausalLM

    policies = [make_model(), AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")]
    expected = []
    for stage, model in enumerate(policies):
        stores = {}
        for name in ("train", "valid"):
            out = tmp_path / f"by-hand-{stage}-{name}"
            sketch(
                Policy(model.eval(), make_tokenizer()),
                SketchJob([files[name]], out, spec=SPEC),
                progress=False,
            )
            stores[name] = SketchStore.open(out)
        scores = influence(stores["train"], [stores["valid"]])
        expected.append([scores.rows[i].id for i in select(scores, fraction=0.5).chosen])
    assert [selected(tmp_path, stage) for stage in range(2)] == expected
    assert expected[0] != expected[1]  # the policy moved far enough for a re-scoring to matter


@pytest.mark.long
def test_recorded_rollouts_feed_the_next_stage(tmp_path: Path) -> None:
    seen = Seen()
    trainer = staged(tmp_path, reward_funcs=[seen], max_steps=6)
    trainer.train()
    warm = {i for step in (0, 1) for i in seen.ids[step]}
    assert len(warm) == 4
    assert set(selected(tmp_path, 1)) < warm and len(selected(tmp_path, 1)) == 2
    assert {r["set"] for r in json_lines(tmp_path / "cropi/rollouts/valid.jsonl")} == {"valid"}
    newest = {r["id"]: r["step"] for r in json_lines(tmp_path / "cropi/rollouts/train-rank00000.jsonl")}
    assert {r["id"]: r["step"] for r in json_lines(tmp_path / "cropi/rollouts/train.jsonl")} == newest


@pytest.mark.long
def test_use_recorded_replaces_stored_rollouts(files: dict[str, Path], tmp_path: Path) -> None:
    trainer = staged(
        tmp_path, {**files, "use_recorded": True, "behaviour": "current", "keep_sketches": True}, max_steps=4
    )
    trainer.train()
    used = {g["id"]: g for g in json_lines(tmp_path / "cropi/stage-0001/both-train.jsonl")}
    store = SketchStore.open(tmp_path / "cropi/stage-0001/sketches-train-00000")
    assert {row.id for row in store.rows()} == set(used), "the merged records are what is sketched"
    recorded = {
        r["id"]: r for r in json_lines(tmp_path / "cropi/rollouts/train-rank00000.jsonl") if r["step"] < 2
    }
    assert len(used) == 16 and recorded and set(recorded) <= set(used)
    for name, group in used.items():
        assert group.get("step") == (recorded[name]["step"] if name in recorded else None)


@pytest.mark.long
def test_lora(files: dict[str, Path], tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM"
    )
    trainer = staged(
        tmp_path, {**files, "keep_sketches": True}, peft_config=config, max_steps=4, learning_rate=1e-2
    )
    trainer.train()
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    store = SketchStore.open(tmp_path / "cropi/stage-0001/sketches-train-00000")
    assert store.manifest["parameters"]["covered"] == trainable > 0
    assert len(selected(tmp_path, 0)) == len(selected(tmp_path, 1)) == 8
    assert all("lora" in name for name, p in trainer.model.named_parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------------ resuming
@pytest.mark.long
@pytest.mark.parametrize("at", [2, 3], ids=["between-stages", "inside-a-stage"])
def test_resumed_run_is_the_run(at: int, tmp_path: Path) -> None:
    runs: dict[str, Any] = {}
    whole = tmp_path / "whole"
    for name in ("whole", "again"):
        seen = Seen()
        out = tmp_path / name
        trainer = staged(out, reward_funcs=[seen], save_strategy="steps", save_steps=1, max_steps=6)
        if name == "again":
            # A run that got to step 5 before it was killed, in the middle of a line, with a checkpoint of step `at`.
            shutil.copytree(whole, out, dirs_exist_ok=True)
            for step in range(at + 2, 7):
                shutil.rmtree(out / f"checkpoint-{step}")
            for path in (out / f"checkpoint-{at + 1}").iterdir():  # this one was being written
                path.unlink() if path.suffix == ".json" else path.write_bytes(path.read_bytes()[:100])
            with open(out / "cropi/rollouts/train-rank00000.jsonl", "a", encoding="utf-8") as file:
                file.write('{"id": "p0-0')
            with open(out / "cropi/stages.jsonl", "a", encoding="utf-8") as file:
                file.write('{"stage": 2, "st')
            trainer = staged(out, reward_funcs=[seen], save_strategy="steps", save_steps=1, max_steps=6)
        trainer.train(resume_from_checkpoint=name == "again")
        runs[name] = (trainer, seen)
    (first, seen), (second, seen_again) = runs["whole"], runs["again"]
    assert seen_again.ids == {step: ids for step, ids in seen.ids.items() if step >= at}
    logs = [tmp_path / name / "cropi/rollouts/train-rank00000.jsonl" for name in runs]
    assert logs[0].read_bytes() == logs[1].read_bytes()
    notes = [json_lines(tmp_path / name / "cropi/stages.jsonl") for name in runs]
    assert [[{**note, "seconds": 0} for note in run] for run in notes] == [
        [{**n, "seconds": 0} for n in notes[0]]
    ] * 2
    for stage in (1, 2):
        assert selected(tmp_path / "whole", stage) == selected(tmp_path / "again", stage)
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.long
def test_a_run_that_had_reached_its_last_step_is_not_trained_one_step_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its last checkpoint is inside a stage, from where transformers' trainer by itself goes on with a step."""
    run = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "lr_scheduler_type": "constant",
           "num_iterations": 2}  # fmt: skip
    first = staged(tmp_path, **run)
    first.train()
    seen = Seen()
    second = staged(tmp_path, reward_funcs=seen, **run)
    second.train(resume_from_checkpoint=True)
    assert "within a generation batch" not in caplog.text
    assert not seen.ids and second.state.global_step == 1 and not (tmp_path / "checkpoint-2").exists()
    for (name, a), b in zip(first.model.named_parameters(), second.model.parameters()):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(make_model().parameters(), second.model.parameters()))


SEVERAL_USES: dict[str, dict[str, Any]] = {
    "iterations": {"num_iterations": 2},
    "slices": {"per_device_train_batch_size": 4, "steps_per_generation": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("uses, at", [("iterations", 3), ("slices", 3), ("slices", 2)])
def test_a_run_that_goes_on_keeps_its_generation_batches(
    uses: str, at: int, files: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each is used for two steps, and so the stages begin with batches of their own; TRL by itself would begin one at
    the step at which it goes on, and use it beyond the next."""
    settings = SEVERAL_USES[uses] | {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    runs = []
    for checkpoint in (None, str(tmp_path / f"checkpoint-{at}")):
        seen = Seen()
        trainer = staged(tmp_path, {**files, "stage_steps": 2}, reward_funcs=[seen], **settings)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append((seen.ids, [p.detach() for p in trainer.model.parameters()]))
    (whole, weights), (again, other) = runs
    assert sorted(whole) == [0, 2, 4]
    # The responses to the rest of a batch are sampled anew, to the same prompts; the next stage is chosen by weights
    # that these responses have trained.
    assert sorted(again) == [at, 4] and again[at] == whole[2]
    assert at == 3 or again[4] == whole[4]
    assert ("within a generation batch" in caplog.text) == (at == 3)
    assert at == 3 or all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))


@pytest.mark.long
def test_resuming_with_other_settings_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    run = dict(save_strategy="steps", save_steps=2, max_steps=4)
    staged(tmp_path, files, **run).train()
    with pytest.raises(CropiError, match=r"fraction = 0.5, but this run has 0.25"):
        staged(tmp_path, {**files, "fraction": 0.25}, **run).train(resume_from_checkpoint=True)
    with pytest.raises(CropiError, match="rollouts of an earlier run.*resume_from_checkpoint=True"):
        staged(tmp_path, files, **run).train()
    (tmp_path / "checkpoint-4" / "cropi_state.json").unlink()
    with pytest.raises(CropiError, match="holds no cropi_state.json"):
        staged(tmp_path, files, **run).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-2" / "cropi_state.json").write_text('{"version": 1, "st')
    with pytest.raises(CropiError, match="holds no whole checkpoint of a curriculum.*new output_dir"):
        staged(tmp_path, files, **run).train(resume_from_checkpoint=True)


@pytest.mark.long
def test_checkpoint_state_is_plain_json(files: dict[str, Path], tmp_path: Path) -> None:
    staged(tmp_path, files, save_strategy="steps", save_steps=2, max_steps=2).train()
    state = json.loads((tmp_path / "checkpoint-2" / "cropi_state.json").read_text())
    assert state["stage"] == 0 and state["selected"] == selected(tmp_path, 0)
    log = tmp_path / "cropi/rollouts/train-rank00000.jsonl"
    assert state["logs"] == {log.name: log.stat().st_size}


def test_a_trl_run_keeps_its_prompts_where_all_gradients_vanish(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def choose(*args: Any, later: bool, **options: Any) -> Any:
        assert later
        raise NothingToFollow("no prompt of the validation set 'x' has a usable gradient")

    monkeypatch.setattr("cropi.trainers.trl.stages.choose_prompts", choose)
    options = Curriculum(stage_steps=2)
    run = SimpleNamespace(
        options=options, model=None, _chosen=["a"], prompts=1, ids=[], ranks=Ranks(), seed=0,
        trainer=SimpleNamespace(_tokenizer=None, args=SimpleNamespace(disable_tqdm=True)),
        _check_recorded=lambda *_: None, _valid=lambda *_: ([], options), _sources=lambda *_: [],
    )  # fmt: skip
    run._kept = lambda folder: Stages._kept(run, folder)  # type: ignore[arg-type]
    for stage in (2, 3):  # the second as an attempt before a resume left it: its sketches are gone
        (tmp_path / f"stage-000{stage}").mkdir()
        (tmp_path / f"stage-000{stage}" / "anew.json").touch()
    kept = Stages._score(run, 3, tmp_path / "stage-0003", 0.0)  # type: ignore[arg-type]
    assert last_scored(tmp_path, 4) == tmp_path / "stage-0002"
    assert kept is not None and kept.ids == ["a"] and kept.figures == {"kept": True}
    assert "stage 3: no prompt of the validation set 'x'" in caplog.text and "before are kept" in caplog.text


def test_a_reference_model_that_follows_the_policy_is_not_in_a_checkpoint(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By hand: weights were 1e-3 off after two steps, and the next stage's prompts others."""
    for beta, resumed in ((0.0, True), (0.1, False), (0.1, True)):
        args = SimpleNamespace(
            sync_ref_model=True, beta=beta, gradient_accumulation_steps=1, steps_per_generation=1
        )
        trainer = SimpleNamespace(args=args, num_iterations=1, _step=0)
        Stages.go_on(SimpleNamespace(trainer=trainer, step=3, _resumed=resumed))  # type: ignore[arg-type]
        assert trainer._step == 3 * resumed
        assert ("keeps no reference model in a checkpoint" in caplog.text) == (beta > 0 and resumed)


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers do: other weights stand in the model between ``eval()`` and ``train()``."""

    averaged = False

    def train(self) -> None:
        self._move(False)

    def eval(self) -> None:
        self._move(True)

    def _move(self, averaged: bool) -> None:
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"] if averaged != self.averaged):
                p.add_(1.0 if averaged else -1.0)
        self.averaged = averaged


@pytest.mark.long
def test_the_policy_is_the_weights_that_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage 1 was sketched at the averaged weights, because an evaluation came before it, later ones were not."""
    model, seen = make_model(), list[bool]()
    optimizer, choose = Averaging(model.parameters(), lr=0.0), stages_module.choose_prompts
    before = {name: p.clone() for name, p in model.named_parameters()}

    def choosing(policy: Any, *args: Any, **options: Any) -> Any:
        seen.append(all(torch.allclose(p, before[name], atol=1e-3) for name, p in policy.named_parameters()))
        return choose(policy, *args, **options)

    monkeypatch.setattr(stages_module, "choose_prompts", choosing)
    changes = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 6, "optimizers": (optimizer, None)}
    train = {"train": stored(tmp_path / "train.jsonl", seed=0, count=16), "fraction": 1.0}
    trainer = staged(tmp_path / "a", train, model=model, eval_dataset=dataset(4), **changes)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    assert seen == [True] * 3
    # What is true of every stage is said once.
    assert len([one for one in told if one.category is SharedPrompts]) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "how", ["clipped", "equal rewards", "low scores", "lower scores", "no task", "no such task", "count"]
)
def test_a_later_stage_whose_choice_fills_no_batch_keeps_the_prompts(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the training, also with on_nothing="keep"."""
    varied: list[str] = []
    changes: dict[str, Any] = {}

    def rewards(completions: list[str], id: list[str], **columns: Any) -> list[float]:
        varied.extend(id if how not in ("equal rewards", "count") else () if varied else id[:1])
        return [float(i % 2 and name in varied) for i, name in enumerate(id)]

    # Every ratio differs from 1 after a step.
    clipped = Estimator("clipped", clip_low=1e-12, clip_high=1e-12, delta=1e-12)
    options = {
        "clipped": {"estimator": clipped}, "equal rewards": {"on_nothing": "keep"}, "low scores": {"min_score": -0.03},
        "lower scores": {"min_score": 0.0}, "no task": {"per": "task"}, "no such task": {"quota": ["sums=0.5"]},
        "count": {"count": 2, "fraction": 0.1},
    }[how]  # fmt: skip
    options |= {"valid": stored(tmp_path / "valid.jsonl", seed=1, count=8), "stage_steps": 1}
    if how.endswith("task"):
        # The first two are recorded, and name no task or another one.
        task = {"no task": None, "no such task": "others"}[how]
        tasks = [task, task] + ["sums"] * 18
        given = dataset(20, task=None)
        changes |= {"train_dataset": given.add_column("task", tasks), "shuffle_dataset": False}
    trainer = staged(
        tmp_path / "a", options, max_steps=2, reward_funcs=rewards, learning_rate=1e-2, **changes
    )
    with caplog.at_level("WARNING"):
        trainer.train()
    said = {
        "clipped": "none of the 2 training prompts has a usable gradient (2 with zero gradient); the prompts",
        "equal rewards": "1 of the 1 prompts whose rewards differ have a gradient, and one generation batch takes 2",
        "low scores": "of 2 prompts with a gradient 1 can be chosen (min_score, dedup or a quota leaves the others",
        "lower scores": "min_score 0.0: no prompt has so high a score, the highest is -0.02",
        "no task": "shares were to be fixed for every task (per task, or a quota), but no prompt names its task",
        "no such task": "quota: there is no task 'sums'; there are 'others'; the prompts of the stage before are kept",
        "count": "count 2 is more than the 1 prompts that have a gradient; lower it; the prompts of the stage before",
    }
    assert trainer.state.global_step == 2 and f"stage 1: {said[how]}" in caplog.text
    assert not (tmp_path / "a" / "cropi" / "stage-0001" / "selected.jsonl").exists()
    assert json_lines(tmp_path / "a" / "cropi" / "stages.jsonl")[1]["selected"] == 20
