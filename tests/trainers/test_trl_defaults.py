"""TRL with its own defaults, and with each of the switches that change the model's precision or what is around it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import trl_runs
from support.made_data import make_model

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens", "ignore::FutureWarning"),
]

# What a user need not write: everything that `trl_runs.arguments` sets to be quick and quiet stays.
DEFAULT = object()


def run(out: Path, files: bool, lora: bool, **changes: Any) -> list[list[str]]:
    """Train three stages; what each has selected."""
    changes = {key: value for key, value in changes.items() if value is not DEFAULT}
    if lora:
        from peft import LoraConfig

        changes["peft_config"] = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear")
    (out / "data").mkdir(parents=True)
    stages: dict[str, Any] = trl_runs.files(out / "data", 20, 4) if files else {"train": None, "valid": None}
    trainer = trl_runs.staged(out, stages, **changes)
    assert trainer.args.bf16 == (changes.get("bf16", False) is not False), "TRL trains in bfloat16 by default"
    trainer.train()
    assert trainer.state.global_step == 6
    return [trl_runs.selected(out, stage) for stage in range(0 if files else 1, 3)]


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run without autocast selects first, from stored trajectories: before any step, the policies are equal."""
    return cache(lambda lora: run(tmp_path_factory.mktemp("float32") / "out", True, lora, bf16=False)[0])


def trl_default() -> dict[str, Any]:
    """Without ``bf16=False``: the argument of `trl_runs` is replaced by TRL's own default."""
    from trl import GRPOConfig

    field = GRPOConfig.__dataclass_fields__["bf16"]
    return {"bf16": field.default}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_trls_default_and_float32_select_alike_and_train_to_the_end(
    tmp_path: Path, float32: Any, lora: bool
) -> None:
    chosen = run(tmp_path / "out", True, lora, **trl_default())
    assert all(chosen) and chosen[0] == float32(lora)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", ["default", False])
def test_recorded_rollouts_train_to_the_end(tmp_path: Path, lora: bool, bf16: bool | str) -> None:
    assert all(run(tmp_path / "out", False, lora, **(trl_default() if bf16 == "default" else {"bf16": bf16})))


def bfloat16(**changes: Any) -> dict[str, Any]:
    return {"model": make_model().to(torch.bfloat16), "bf16": True} | changes


def float32_tied_head() -> dict[str, Any]:
    return bfloat16(model=make_model(tie_word_embeddings=True).to(torch.bfloat16), cast_lm_head_to_fp32=True)


def compiled() -> dict[str, Any]:
    return {"bf16": True, "torch_compile": True, "torch_compile_backend": "eager"}


@pytest.mark.parametrize(
    "changes",
    [
        bfloat16,
        lambda: bfloat16(cast_lm_head_to_fp32=True),
        float32_tied_head,
        lambda: {"bf16": True, "gradient_checkpointing": True},
        pytest.param(compiled, marks=pytest.mark.slow),
    ],
    ids=["bfloat16", "float32-head", "float32-tied-head", "checkpointed", "compiled"],
)
def test_every_switch_of_precision_trains_to_the_end(tmp_path: Path, changes: Any) -> None:
    assert all(run(tmp_path / "out", True, False, **changes()))


def test_a_model_given_by_name_is_loaded_and_wrapped_by_trl(tmp_path: Path, float32: Any) -> None:
    make_model().save_pretrained(tmp_path / "model")
    chosen = run(tmp_path / "out", True, False, model=str(tmp_path / "model"), **trl_default())
    assert chosen[0] == float32(False)
