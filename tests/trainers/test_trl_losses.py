"""The estimator that is read from a GRPOConfig against the gradient of TRL's own loss, in float64."""

from __future__ import annotations

import inspect
import logging
import re
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
from support.trl_runs import SPEC, _given, arguments, dataset, digits, staged  # noqa: E402

from cropi.errors import CropiError  # noqa: E402
from cropi.gradient.estimators import Estimator, sequence_behaviour  # noqa: E402
from cropi.store.store import SketchStore  # noqa: E402
from cropi.trainers.trl.losses import AVERAGED, estimator_of_config  # noqa: E402

GROUPS, SIZE, WIDTH = 3, 4, 8
REWARDS = [[1.0, 0.0, 0.5, 0.0], [0.0, 0.0, 3.0, 1.0], [0.25, 1.0, 1.0, 0.5]]


def trl_gradient(
    tmp_path: Path, spread: float, **config: Any
) -> tuple[Any, Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(args, mask, new, old, d loss / d new)`` of one batch of TRL's own loss, all ``[rows, tokens]`` in float64."""
    from trl import GRPOTrainer

    args = arguments(tmp_path, per_device_train_batch_size=12, num_generations=4, **config)
    trainer = GRPOTrainer(
        model=make_model(),
        reward_funcs=digits,
        args=args,
        train_dataset=dataset(20),
        processing_class=make_tokenizer(),
    )
    generator = torch.Generator().manual_seed(5)
    rows = GROUPS * SIZE
    lengths = torch.randint(1, WIDTH + 1, (rows,), generator=generator)
    mask = (torch.arange(WIDTH) < lengths[:, None]).long()
    old = -3 * torch.rand(rows, WIDTH, generator=generator, dtype=torch.float64)
    new = old + spread * torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    leaf = new.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (leaf, torch.zeros_like(leaf), None)
    rewards = torch.tensor(REWARDS, dtype=torch.float64)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if args.scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + 1e-4)
    elif args.scale_rewards == "batch":
        advantages = advantages / (rewards.std() + 1e-4)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    ids = torch.zeros(rows, WIDTH, dtype=torch.long)
    loss = trainer._compute_loss(trainer.model, {
        "prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2] + 1, "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages.flatten(), "old_per_token_logps": old, "num_items_in_batch": mask.sum(),
    })  # fmt: skip
    loss.backward()
    return args, mask.bool(), new, old, leaf.grad


def our_weights(
    estimator: Estimator, mask: torch.Tensor, new: torch.Tensor, old: torch.Tensor
) -> torch.Tensor:
    """The weights of every prompt on its own, ``[rows, tokens]``, 0 where nothing is scored."""
    found = torch.zeros_like(new)
    for g in range(GROUPS):
        rows = slice(g * SIZE, (g + 1) * SIZE)
        scored = mask[rows]
        lengths = scored.sum(1)
        responses = torch.arange(SIZE).repeat_interleave(lengths)
        behaviour = old[rows][scored]
        if estimator.level == "sequence":
            behaviour = sequence_behaviour(new[rows][scored], behaviour, responses)
        per_token = [
            torch.from_numpy(values)[responses]
            for values in (estimator.advantages(REWARDS[g]), estimator.divisors(lengths.tolist()))
        ]
        part = torch.zeros_like(new[rows])
        part[scored] = estimator.of_sequences().weights(new[rows][scored], behaviour, *per_token)
        found[rows] = part
    return found


CONFIGS: dict[str, tuple[float, dict[str, Any]]] = {
    "defaults": (0.3, {}),
    "grpo": (0.3, {"loss_type": "grpo"}),
    "grpo, clip higher": (0.3, {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3}),
    "grpo, two sides": (0.6, {"loss_type": "grpo", "delta": 1.5}),
    "grpo, delta inside of the clip": (0.6, {"loss_type": "grpo", "delta": 1.1, "epsilon_high": 0.4}),
    "bnpo": (0.3, {"loss_type": "bnpo"}),
    "dapo": (0.3, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": (0.3, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "cispo": (1.2, {"loss_type": "cispo", "epsilon_high": 2.0}),
    "gspo": (1e-3, {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4}),
    "dapo of sequences": (0.3, {"loss_type": "dapo", "importance_sampling_level": "sequence"}),
    "cispo of sequences": (0.6, {"loss_type": "cispo", "importance_sampling_level": "sequence"}),
    "luspo": (0.3, {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    "batch": (0.3, {"loss_type": "grpo", "scale_rewards": "batch"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_the_gradient_of_trls_loss_up_to_one_factor(name: str, tmp_path: Path) -> None:
    import trl

    spread, config = CONFIGS[name]
    known = trl.GRPOConfig.__dataclass_fields__
    if any(key not in known for key in config):
        pytest.skip(f"this TRL has no {', '.join(key for key in config if key not in known)}")
    args, mask, new, old, gradient = trl_gradient(tmp_path, spread, **config)
    estimator, _ = estimator_of_config(args)
    ours, theirs = our_weights(estimator, mask, new, old), -gradient
    live = ours != 0
    assert torch.equal(live, theirs != 0), "the same tokens have a gradient"
    assert 0 < int(live.sum()) and not bool(live[~mask].any())
    if estimator.clip_low is not None:
        assert int(live.sum()) < int(mask.sum()), "some tokens must be clipped"
    factors = theirs[live] / ours[live]
    # One factor for all prompts and tokens: a product and a few quotients in float64.
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=64 * 2.0**-52, atol=0.0)
    assert float(factors[0]) > 0


def test_what_the_estimator_leaves_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = arguments(tmp_path, beta=0.04, scale_rewards="batch", mask_truncated_completions=True)
    _, left_out = estimator_of_config(args)
    assert [text.split(":")[0] for text in left_out] == [
        "beta=0.04", "scale_rewards='batch'", "mask_truncated_completions"
    ]  # fmt: skip
    assert estimator_of_config(arguments(tmp_path))[1] == []
    with caplog.at_level(logging.WARNING):
        staged(tmp_path, top_entropy_quantile=0.5)
    assert "selections leave out a part of the loss: top_entropy_quantile" in caplog.text


# Options of GRPOConfig that change no weight of a token: what is generated, the model, the reference, logs.
NO_WEIGHT = frozenset(
    """
    cache_implementation cast_lm_head_to_fp32 chat_template_kwargs disable_dropout ds3_gather_for_generation
    generation_batch_size generation_kwargs log_completions log_completions_hub_repo log_multimodal log_unique_prompts
    max_completion_length max_tool_calling_iterations min_p model_init_kwargs num_completions_to_print num_generations
    num_generations_eval num_iterations pad_to_multiple_of ref_model_mixup_alpha ref_model_sync_steps
    repetition_penalty reward_weights shuffle_dataset steps_per_generation sync_ref_model temperature top_k top_p
    transformers_continuous_batching_config trust_remote_code use_transformers_continuous_batching
    use_transformers_paged
    """.split()
)
# Part of what an option that is read switches on, by how their names begin; `checks.balances_experts` reads the rest.
PARTS = ("vllm_", "sapo_", "vespo_", "entropy_", "use_bias_correction_kl", "router_aux_loss_coef")


def test_no_option_of_the_loss_is_overlooked() -> None:
    """An option that is new in TRL shows itself here: read it, refuse it, say that it is left out, or list it."""
    import trl
    from transformers import TrainingArguments

    from cropi.trainers.trl import losses

    own = trl.GRPOConfig.__dataclass_fields__.keys() - TrainingArguments.__dataclass_fields__.keys()
    read = set(re.findall(r"\bargs\.(\w+)|\"(\w+)\"", inspect.getsource(losses)))
    names = {name for pair in read for name in pair}
    assert {name for name in own if name not in NO_WEIGHT | names and not name.startswith(PARTS)} == set()


@pytest.mark.long
def test_rloo_is_refused_with_a_trainer_of_the_same_gradient(tmp_path: Path) -> None:
    import trl

    from cropi.trainers.trl import curriculum

    with pytest.raises(CropiError, match=r"got .*RLOOTrainer.*loss_type='dr_grpo' and scale_rewards='none'"):
        curriculum(trl.RLOOTrainer)
    with pytest.raises(
        CropiError, match=r"got .*Own.*in place of RLOOTrainer, GRPOTrainer with loss_type='dr_grpo'"
    ):
        curriculum(type("Own", (trl.RLOOTrainer,), {}))
    with pytest.raises(CropiError, match=r"got .*DPOTrainer.*another trainer's steps cropi\.LiveSketcher"):
        curriculum(trl.DPOTrainer)
    config = arguments(tmp_path, loss_type="dr_grpo", scale_rewards="none")
    same = {
        key: getattr(config, key)
        for key in (
            "per_device_train_batch_size",
            "num_generations",
            "max_completion_length",
            "temperature",
            "bf16",
        )
    }
    other = trl.RLOOConfig(str(tmp_path), use_cpu=config.use_cpu, report_to=[], beta=0.0, **same)
    found = []
    for base, args in ((trl.GRPOTrainer, config), (trl.RLOOTrainer, other)):
        trainer = base(
            model=make_model().double(), reward_funcs=digits, args=args, train_dataset=dataset(20),
            processing_class=make_tokenizer(),
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        torch.manual_seed(0)
        batch = trainer._generate_and_score_completions([trainer.train_dataset[i // 4] for i in range(8)])
        trainer._compute_loss(trainer.model, batch).backward()
        found.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    factor = config.max_completion_length * 4 / 3  # dr_grpo's divisor; 4 / (4 - 1) for leaving one out
    # Advantages are float32 in both.
    assert found[0].any() and (found[1] - factor * found[0]).norm() <= 8 * 2.0**-24 * found[1].norm()


@pytest.mark.parametrize("kind", ["sapo", "vespo", "dpo"])
def test_a_loss_without_an_estimator_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.loss_type = kind
    with pytest.raises(
        CropiError, match=rf"loss_type is '{kind}'.*there are those of grpo, bnpo.*estimator=\.\.\."
    ):
        estimator_of_config(args)
    assert kind not in AVERAGED


@pytest.mark.long
def test_the_curriculum_sketches_the_loss_that_is_trained(tmp_path: Path) -> None:
    kept = trl_runs.files(tmp_path) | {"keep_sketches": True}
    trainer = staged(
        tmp_path / "a", kept, max_steps=2, loss_type="dr_grpo", scale_rewards="none", epsilon=0.15
    )
    trainer.train()
    (store, *_) = sorted((tmp_path / "a").rglob("sketches-train*"))
    made = SketchStore.open(store).manifest["estimator"]
    assert (
        made
        == Estimator("trl dr_grpo", clip_low=0.15, clip_high=0.15, std=False, length="constant").to_dict()
    )
    other = staged(tmp_path / "b", kept | {"estimator": "cropi"}, max_steps=2)
    other.train()
    (store, *_) = sorted((tmp_path / "b").rglob("sketches-train*"))
    assert SketchStore.open(store).manifest["estimator"]["name"] == "cropi"
    assert len(json_lines(tmp_path / "a" / "cropi" / "stages.jsonl")) == 1


def test_a_trainer_with_a_loss_of_its_own_names_its_estimator(tmp_path: Path) -> None:
    from trl import GRPOTrainer

    # Of geometric means, since 1.16.
    gmpo = pytest.importorskip("trl.experimental.gmpo")

    class Louder(GRPOTrainer):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    class Same(GRPOTrainer):  # type: ignore[misc]
        def log(self, *args: Any, **kwargs: Any) -> Any:
            return super().log(*args, **kwargs)

    for base, method in ((gmpo.GMPOTrainer, "_compute_loss"), (Louder, "compute_loss")):
        with pytest.raises(
            CropiError, match=rf"{base.__name__} has a {method} of its own.*Curriculum\(estimator"
        ):
            staged(tmp_path, base=base)
        assert (
            staged(tmp_path, {"estimator": "gspo"}, base=base)._cropi.options.estimator_used().name == "gspo"
        )
    assert staged(tmp_path, base=Same)._cropi.options.estimator_used().name.startswith("trl ")


class Shaped:
    """Between two classes of a trainer: advantages other than TRL's, where ``factor`` is not 1."""

    factor = 0.5

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        return output | {"advantages": self.factor * output["advantages"]}


@pytest.mark.long
@pytest.mark.parametrize("above", [False, True], ids=["base", "subclass"])
def test_a_subclass_that_changes_advantages_is_noticed(
    above: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The estimator of the configuration is refused; another one, and records, are warned of once."""
    from trl import GRPOTrainer

    from cropi.trainers.trl import Curriculum, curriculum

    files = trl_runs.files(tmp_path, 8, 4)

    def trained(name: str, factor: float = 0.5, **options: Any) -> None:
        made = type("Shorter", (Shaped,) if above else (Shaped, GRPOTrainer), {"factor": factor})
        base = type("Shorter", (Shaped, curriculum()), {"factor": factor}) if above else curriculum(made)
        out = tmp_path / name
        given = dict(stage_steps=1, fraction=0.5, spec=SPEC, **(files | options))
        base(**_given(out, {"max_steps": 2}), curriculum=Curriculum(**given)).train()

    with pytest.raises(CropiError, match=r"Shorter changes the advantages.*Curriculum\(estimator"):
        trained("a")
    caplog.clear()
    trained("b", estimator="cropi")
    assert caplog.text.count("Shorter changes the advantages") == 1
    caplog.clear()
    trained("c", factor=1.0)
    assert "changes the advantages" not in caplog.text


def test_advantages_that_are_nan_are_not_changed_ones() -> None:
    """As TRL makes them of a reward that is NaN."""
    from cropi.trainers.trl.recorder import MADE, Recorder

    said: list[str] = []
    recorder: Any = SimpleNamespace(_changed=False, advantages_changed=said.append)
    made = torch.tensor([float("nan"), 0.5])
    Recorder.compare_advantages(recorder, {MADE: made, "advantages": made.clone()})
    assert not said and not recorder._changed
