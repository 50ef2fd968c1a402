"""The sketching job from Python: what it asks of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_data import make_model, make_records, make_tokenizer, write_lines

from cropi.errors import CropiError
from cropi.job import SketchJob
from cropi.sketching import sketch
from cropi.store import SketchStore
from cropi_kernels import SketchSpec

pytestmark = pytest.mark.filterwarnings("ignore::cropi.scan.LossyTokens")


def sketched(out: Path, model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The sketches of a few records by name."""
    path = write_lines(out.with_suffix(".jsonl"), make_records(8))
    sketch(
        model, make_tokenizer(), SketchJob([path], out, spec=SketchSpec(dim=1024), **options), progress=False
    )
    return {
        row.id: vector for rows, table in SketchStore.open(out).shards() for row, vector in zip(rows, table)
    }


def test_active_dropout_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    by_rate, by_module = make_model().train(), make_model("gpt2").train()
    by_rate.model.layers[1].self_attn.attention_dropout = 0.1
    by_module.transformer.h[0].mlp.dropout.p = 0.2
    for model, named in (
        (by_rate, "model is in training mode, and model.layers.1.self_attn has attention_dropout = 0.1"),
        (
            by_module,
            r"model is in training mode, and transformer.h.0.mlp.dropout has p = 0.2.*model.eval\(\)",
        ),
    ):
        with pytest.raises(CropiError, match=named):
            sketched(tmp_path / "s", model)
        with pytest.raises(CropiError, match="behaviour_" + named):
            sketched(tmp_path / "s", make_model(), behaviour="model", behaviour_model=model)
    assert not (tmp_path / "s").exists()
    assert sketched(tmp_path / "rate", by_rate.eval()) and sketched(tmp_path / "module", by_module.eval())


def test_training_mode_without_dropout_is_taken_and_gradient_checkpointing_with_it(tmp_path: Path) -> None:
    expected = sketched(tmp_path / "eval", make_model())
    model = make_model().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = sketched(tmp_path / "train", model)
    assert model.training and got.keys() == expected.keys()
    for name, vector in expected.items():
        torch.testing.assert_close(got[name], vector, rtol=1e-5, atol=1e-6)
