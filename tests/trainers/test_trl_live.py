"""Live capture inside GRPOTrainer: every prompt's part of TRL's own gradient, and selection by it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")

import trl
from datasets import Dataset
from support.commands import json_lines
from support.made_data import make_model, make_tokenizer
from support.trl_runs import SPEC, staged, stored
from support.versions import needs

from cropi.errors import CropiError
from cropi.ranking.alike import prompt_features
from cropi.trainers.trl import Curriculum, Live
from cropi.trainers.trl.live import PLACES, LiveRun, features_of
from cropi.trainers.trl.mixins import RecorderHooks
from cropi.trainers.trl.recorder import MADE
from cropi_kernels import CoupledLossError
from cropi_kernels.names import canonical_name
from cropi_kernels.testing import sketch_gradients

LIVE = {"live": Live(dim=1024), "fraction": 0.5, "stage_steps": 2}


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return stored(tmp_path / "valid.jsonl", seed=1, count=4)


class Watched:
    """What one step of a trainer was given, and the sketches that came of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.inputs: list[dict[str, Any]] = []
        self.updates: list[tuple[list[Any], torch.Tensor]] = []
        begin, end = LiveRun.begin, LiveRun.end_step

        def beginning(run: LiveRun, inputs: dict[str, Any], scale: Any) -> dict[str, Any]:
            self.inputs.append(copy.deepcopy(inputs))
            return begin(run, inputs, scale)

        def ending(run: LiveRun, step: int) -> None:
            places = torch.cat(run._places)
            assert places.numel() == sum(map(len, run._sketches))
            self.updates.append(([run.selector.ids[i] for i in places.tolist()], torch.cat(run._sketches)))
            end(run, step)

        monkeypatch.setattr(LiveRun, "begin", beginning)
        monkeypatch.setattr(LiveRun, "end_step", ending)


def by_autograd(trainer: Any, model: Any, inputs: dict[str, Any], place: int) -> dict[str, torch.Tensor]:
    """The gradient of TRL's loss with no other prompt's advantages: each prompt's own part."""
    mine = inputs[PLACES] == place
    zeroed = torch.where(mine, inputs["advantages"], 0.0)
    given = {**inputs, "advantages": zeroed, MADE: zeroed}
    model.zero_grad()
    # Releases of transformers leave autocast to accelerate, and a division by the micro-batches of a step.
    with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
        loss = super(RecorderHooks, trainer)._compute_loss(model, given)
    (loss / trainer.accelerator.gradient_accumulation_steps).backward()
    return {
        canonical_name(n): -p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad
    }


CASES: dict[str, dict[str, Any]] = {
    "defaults but for bfloat16": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "sequence ratios": {
        "importance_sampling_level": "sequence",
        "loss_type": "grpo",
        "num_iterations": 2,
        "seed": 1,
    },
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_sketches_are_those_of_trls_own_loss(
    case: str, tmp_path: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    trainer = staged(tmp_path / "out", LIVE | {"valid": valid, "stage_steps": 2}, max_steps=2, **CASES[case])
    first = copy.deepcopy(trainer.model)
    trainer.train()
    live = trainer._cropi.live
    assert len(set(watched.updates[0][0])) == 2 and watched.updates[0][1].any()
    assert live.sketcher.loss == "a sum over prompts" and not live.sketcher._handles
    ids, rows = watched.updates[0]
    micro = watched.inputs[: CASES[case].get("gradient_accumulation_steps", 1)]
    for name in set(ids):
        place = live.selector.places([name])[0]
        parts = [inputs for inputs in micro if bool((inputs[PLACES] == place).any())]
        want = sum(
            sketch_gradients(first, by_autograd(trainer, first, part, place), SPEC).cpu() for part in parts
        )
        got = rows[[i for i, other in enumerate(ids) if other == name]].sum(0)
        # A float32 pass of two layers: a few hundred roundings of 2^-24, and float32 sums.
        assert (got - want).norm() <= 1e-4 * want.norm() or not want.any(), name


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_sketches_under_trls_own_defaults(
    lora: bool, tmp_path: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 by autocast, checkpointing, one generation batch a step: at most twice as far from the gradient of each
    prompt in float64 as plain autograd with the same settings."""
    from peft import LoraConfig
    from trl import GRPOConfig

    defaults = {
        name: GRPOConfig.__dataclass_fields__[name].default
        for name in ("bf16", "gradient_checkpointing", "temperature")
    }
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    watched = Watched(monkeypatch)
    options = LIVE | {"valid": valid, "stage_steps": 1}
    trainer = staged(
        tmp_path / "out", options, max_steps=1, **defaults, **({"peft_config": config} if lora else {})
    )
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    own = copy.deepcopy(trainer.model)
    wide = copy.deepcopy(own).double()  # which autocast leaves as it is
    trainer.train()
    (ids, rows), (inputs, *_) = watched.updates[0], watched.inputs
    assert trainer._cropi.live.sketcher.loss is not None and rows.any()
    for name, got in zip(ids, rows, strict=True):
        place = trainer._cropi.live.selector.places([name])[0]
        near = sketch_gradients(own, by_autograd(trainer, own, inputs, place), SPEC).cpu()
        exact = sketch_gradients(wide, by_autograd(trainer, wide, inputs, place), SPEC).cpu()
        error, allowed = (got - exact).norm(), (near - exact).norm()
        assert error <= 2 * allowed <= 0.2 * exact.norm(), (name, error, allowed, exact.norm())


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, {"bf16": True}])
def test_the_steps_keep_their_bits(changes: dict[str, Any], tmp_path: Path, valid: Path) -> None:
    """All prompts in both runs, in one order: with TRL's defaults, and in bfloat16, which is one."""
    whole = {"fraction": 1.0, "stage_steps": 2, "valid": valid, "seed": 3}
    after = []
    for name, options in (("live", whole | {"live": Live()}), ("plain", whole)):
        trainer = staged(tmp_path / name, options, max_steps=2, **changes)
        trainer.train()
        after.append([p.detach().cpu() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(after[0], make_model().parameters(), strict=True))


@pytest.mark.long
def test_lora(tmp_path: Path, valid: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    trainer = staged(tmp_path / "out", LIVE | {"valid": valid}, max_steps=4, peft_config=config)
    trainer.train()
    live = trainer._cropi.live
    assert all("lora" in name for name in live.sketcher.coverage.names)
    assert live.selector.seen.any() and not live.selector.failed


@pytest.mark.long
def test_a_mixture_whose_rollouts_are_not_recorded(tmp_path: Path, valid: Path) -> None:
    """Validation prompts are sketched while the live taps are on its experts; a run with tools can be recorded by
    nobody, and needs no record to choose by its own steps."""
    model = make_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    options = LIVE | {"valid": valid, "recording": None, "live": Live(dim=1024, coupled=True)}
    trainer = staged(tmp_path / "out", options, max_steps=4, model=model, eval_dataset=None)
    trainer.train()
    live = trainer._cropi.live
    assert any("experts" in name for name in live.sketcher.coverage.names)
    assert live.selector.step == 4 and live.selector.seen.any() and not live.selector.failed
    assert not list((tmp_path / "out" / "cropi").glob("rollouts/*.jsonl"))
    with pytest.raises(
        CropiError, match=r"set live=Live\(coupled=True\) .* or args.router_aux_loss_coef=0.0"
    ):
        staged(tmp_path / "not", options | {"live": Live()}, model=model, eval_dataset=None)
    with pytest.raises(
        CropiError, match="valid is None, so it comes from what this run records, but recording"
    ):
        Curriculum(stage_steps=2, live=Live(), recording=None)


@pytest.mark.long
@needs("transformers", "5.23", "its attention has no second derivative here, and live.sketcher.loss says so")
def test_a_mixture_without_its_load_balancing_loss_is_not_coupled(
    tmp_path: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernels' own check says what the trainer's does, of a TRL that does not tell of that loss."""
    given = dict(eval_dataset=None, max_steps=2)
    options = LIVE | {"valid": valid, "recording": None}
    model = make_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    trainer = staged(tmp_path / "out", options, model=model, router_aux_loss_coef=0.0, **given)
    trainer.train()
    assert trainer._cropi.live.sketcher.loss.startswith("a sum over prompts")
    monkeypatch.setattr("cropi.trainers.trl.checks.balances_experts", lambda trainer: False)
    silent = staged(tmp_path / "other", options, model=model, **given)
    with pytest.raises(
        CoupledLossError, match=r"gate\.weight.* such as experts' load balancing.*coupled=True"
    ):
        silent.train()


@pytest.mark.long
def test_stages_are_drawn_from_what_steps_have_shown(tmp_path: Path, valid: Path) -> None:
    trainer = staged(tmp_path / "out", LIVE | {"valid": valid}, max_steps=6)
    trainer.train()
    notes = json_lines(tmp_path / "out" / "cropi" / "stages.jsonl")
    assert [note["selected"] for note in notes] == [10, 10, 10]
    assert notes[0]["new"] == 10 and notes[0]["score"] is None
    assert notes[2]["seen"] >= 4 and notes[2]["seconds_sketching"] > 0
    selector = trainer._cropi.live.selector
    shown = selector.scores(selector.ids)
    assert selector.step == 6 and ((shown >= -1) & (shown <= 1) | [math.isnan(x) for x in shown]).all()


@pytest.mark.long
def test_prompts_that_are_alike_share(tmp_path: Path, valid: Path) -> None:
    trainer = staged(tmp_path / "out", LIVE | {"valid": valid}, max_steps=4)
    trainer.train()
    selector, tokenizer = trainer._cropi.live.selector, make_tokenizer()
    texts = [row["prompt"] for row in trainer.train_dataset]
    want = prompt_features([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])
    np.testing.assert_allclose(selector._features, want, rtol=1e-5)
    assert selector.ids == [str(row["id"]) for row in trainer.train_dataset]
    assert selector.seen.any() and np.isfinite(selector.known()[0]).all()
    trainer._cropi.live.save(tmp_path)
    alone = staged(
        tmp_path / "alone", LIVE | {"valid": valid, "live": Live(dim=1024, alike=False)}
    )._cropi.live
    assert alone.selector._features is None
    with pytest.raises(
        CropiError, match="cropi_selector.pt knows of prompts with other tokens: the texts of"
    ):
        alone.load(tmp_path)


@pytest.mark.long
def test_steps_that_do_not_count_are_not_sketched(
    tmp_path: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The validation mean is new before step 1 of four; visits count one step later at most."""
    sketched: list[int] = []
    real = LiveRun._listening

    def listening(run: LiveRun, *args: Any) -> Any:
        sketched.append(run.selector.step + 1)
        return real(run, *args)

    monkeypatch.setattr(LiveRun, "_listening", listening)
    options = LIVE | {"valid": valid, "live": Live(dim=1024, refresh=2, within=1)}
    trainer = staged(tmp_path / "out", options, max_steps=4)
    trainer.train()
    assert set(sketched) == {1} and trainer._cropi.live.selector.step == 4


def test_the_texts_of_prompts() -> None:
    said = [
        {"role": "user", "content": "a b"},
        {"role": "user", "content": [{"type": "image"}, {"text": "c"}]},
    ]
    rows = [{"prompt": "a b"}, {"prompt": said}]
    taken: list[str] = []

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        taken.append(text)
        return {"input_ids": [ord(letter) for letter in text]}

    assert features_of(rows, tokenizer).shape == (2, 256)
    assert [text.split() for text in taken] == [["a", "b"], ["a", "b", "c"]]
    for same in (rows[:1], [rows[0], rows[0]], [{"id": 1}]):
        assert features_of(same, tokenizer) is None  # nothing that others lack
    # Prompts that a transform makes of other columns.
    made = Dataset.from_dict({"a": ["a", "a b"]}).with_transform(lambda rows: {"prompt": rows["a"]})
    assert features_of(made, tokenizer).shape == (2, 256) and taken[-2:] == ["a", "a b"]


@pytest.mark.long
def test_validation_by_evaluation(tmp_path: Path) -> None:
    """No files at all: the eval dataset is sampled once, and its rollouts are sketched anew every second stage."""
    trainer = staged(tmp_path / "out", LIVE | {"live": Live(refresh=2)}, max_steps=4)
    trainer.train()
    assert len(trainer._cropi.live.selector._valid) == 1


@pytest.mark.long
def test_opposed_prompts_are_dropped_from_a_step(
    tmp_path: Path, valid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second use of a generation batch on: what the first use showed."""
    watched = Watched(monkeypatch)
    options = LIVE | {"valid": valid, "live": Live(opposed=0.0, explore=0.0)}
    trainer = staged(tmp_path / "out", options, max_steps=2, num_iterations=2)
    known = trainer._cropi.live.selector.known
    monkeypatch.setattr(
        trainer._cropi.live.selector, "known", lambda step=None: (known()[0] - 5.0, known()[1])
    )
    trainer.train()
    assert len(watched.updates[0][0]) == 2 and watched.updates[1][0] == []
    live = trainer._cropi.live
    assert live.selector.scores(watched.updates[0][0]).shape == (2,)
    live.live, given = Live(opposed=0.5), watched.inputs[0]
    dropped, weighed = live._weighed(given, given[PLACES])
    assert not len(dropped) and torch.equal(weighed["advantages"], 0.5 * given["advantages"])


@pytest.mark.long
@pytest.mark.parametrize("how", ["another loss", "another batch"])
def test_a_loss_that_is_not_seen_is_an_error(how: str, tmp_path: Path, valid: Path) -> None:
    """Else the selector would have no visit, and draw every stage by chance."""

    class Own(trl.GRPOTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if how == "another loss":
                return trl.GRPOTrainer._compute_loss(self, model, inputs)
            return super().compute_loss(
                model, {k: v for k, v in inputs.items() if k != PLACES}, *args, **kwargs
            )

    options = LIVE | {"valid": valid, "recording": None, "estimator": "grpo"}
    trainer = staged(tmp_path / "out", options, base=Own, max_steps=2)
    with pytest.raises(
        CropiError, match="live: the loss of a training step was computed without TRL's _compute_loss"
    ):
        trainer.train()
