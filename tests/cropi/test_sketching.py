"""The sketching job from Python: what it asks of a model."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.oracle import stored_logprobs, with_token_ids
from support.stores import sketches_of
from support.versions import checkpoint_layers, needs

from cropi.data.readers import read
from cropi.data.scan import scan
from cropi.errors import CropiError
from cropi.gradient.estimators import ESTIMATORS
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec, UncoveredParameterError

pytestmark = pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")


def sketched(out: Path, model: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The sketches of a few records by name."""
    path = write_lines(out.with_suffix(".jsonl"), make_records(8))
    sketch(
        Policy(model, make_tokenizer()),
        SketchJob([path], out, spec=SketchSpec(dim=1024), **options),
        progress=False,
    )
    return sketches_of(out)


@needs("transformers", "5.23", "the layer is called there, and has a tap")
def test_a_model_that_cannot_be_sketched_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy changes what the store is made of: one that was begun without it would refuse to go on."""
    monkeypatch.setattr("cropi_kernels.sketcher.taps.exact.LARGEST", 100)
    config = transformers.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)
    model, exclude = transformers.MambaForCausalLM(config).eval(), ["*.A_log", "*.D", "*.conv1d.*"]
    with pytest.raises(UncoveredParameterError, match="mixer.dt_proj"):
        sketched(tmp_path / "out", model, exclude=exclude)
    assert not (tmp_path / "out").exists()
    assert sketched(tmp_path / "out", model, exclude=[*exclude, "*.dt_proj.*"])


def test_a_disk_without_room_for_the_store_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that is there goes on: what it lacks is less."""
    whole = scan(read(write_lines(tmp_path / "r.jsonl", make_records(8)))).usable * 1024 * 4
    free = SimpleNamespace(free=whole - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(CropiError, match=r"the sketches of \d prompts need .* GB at least, but"):
        sketched(tmp_path / "out", make_model(), store_dtype="float32")
    assert not (tmp_path / "out").exists()
    free.free = whole
    assert sketched(tmp_path / "out", make_model(), store_dtype="float32")
    free.free = 0
    assert sketched(tmp_path / "out", make_model(), store_dtype="float32")


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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about a new name
def test_training_mode_without_dropout_is_taken_and_gradient_checkpointing_with_it(tmp_path: Path) -> None:
    expected = sketched(tmp_path / "eval", make_model())
    model = make_model().train()
    checkpoint_layers(model, {"use_reentrant": False})
    got = sketched(tmp_path / "train", model)
    assert model.training and got.keys() == expected.keys()
    for name, vector in expected.items():
        torch.testing.assert_close(got[name], vector, rtol=1e-5, atol=1e-6)


def with_ratio(records: list[dict[str, Any]], model: Any, ratio: list[float]) -> list[dict[str, Any]]:
    """Records with log-probs under which the policy's ratio is ``ratio[k]`` at every token of response k."""
    made = [with_token_ids(record) for record in records]
    for record in made:
        record["logprobs"] = [
            [min(p - math.log(r), 0.0) for p in found]
            for r, found in zip(ratio, stored_logprobs(model, record), strict=True)
        ]
    return made


@pytest.mark.long
def test_norm_ratio_and_clipped_tokens_of_a_row_are_those_of_its_responses(tmp_path: Path) -> None:
    """Rows of one response each, so that every prompt is put together from several micro-batches."""
    model, ratio = make_model(), [1.5, 1.5, 1.0, 1.0]
    records = with_ratio([r | {"rewards": [1.0, 0.0, 1.0, 0.0]} for r in make_records(6)], model, ratio)
    path = write_lines(tmp_path / "t.jsonl", records)
    job = SketchJob(
        [path], tmp_path / "s", spec=SketchSpec(dim=1024), estimator=ESTIMATORS["ppo"], layout="padded",
        tokens_per_batch=1,
    )  # fmt: skip
    sketch(Policy(model, make_tokenizer()), job, progress=False)
    ((rows, vectors),) = SketchStore.open(tmp_path / "s").shards()
    by_id = {record["id"]: [len(ids) for ids in record["response_ids"]] for record in records}
    assert {row.id for row in rows} == set(by_id) and len({str(sizes) for sizes in by_id.values()}) > 1
    for row, vector in zip(rows, vectors):
        sizes = by_id[row.id]
        assert (
            row.tokens == sum(sizes)
            and row.norm == pytest.approx(float(vector.norm()), rel=1e-5)
            and row.norm > 0
        )
        mean = sum(r * n for r, n in zip(ratio, sizes)) / sum(sizes)
        assert row.extra["ratio"] == pytest.approx(mean, rel=1e-4)
        # Clipped at 1.2 where the advantage is positive: the first response alone.
        assert row.extra["clipped"] == pytest.approx(sizes[0] / sum(sizes), rel=1e-9)


@pytest.mark.long
def test_the_checks_of_the_model_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name; and what they found is kept with the policy, so that the second store does not pay for it again."""
    from cropi_kernels.sketcher import gradient_sketcher

    tests: list[int] = []
    compute = gradient_sketcher.policy_self_test

    def counted(*args: Any) -> Any:
        tests.append(1)
        return compute(*args)

    monkeypatch.setattr(gradient_sketcher, "policy_self_test", counted)
    policy = Policy(make_model(), make_tokenizer())
    path = write_lines(tmp_path / "t.jsonl", make_records(6))
    for name, verify in (("off", False), ("on", True), ("again", True)):
        job = SketchJob([path], tmp_path / name, SketchSpec(dim=1024), verify=verify)
        sketch(policy, job, progress=False)
        assert len(tests) == (0 if not verify else 1)
    stores = [SketchStore.open(tmp_path / name) for name in ("off", "on")]
    one, other = (sketches_of(store) for store in stores)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
