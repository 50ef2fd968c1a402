"""A device without enough memory: the error names sizes and remedy, nothing finished is lost, batches are halved.

The device is played by injected `torch.OutOfMemoryError`s, which is what torch raises for a real one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import zoo
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import sketches_of

import cropi.sketching.run
from cropi.errors import CropiError
from cropi.gradient.batches import make_batches
from cropi.gradient.estimators import ESTIMATORS
from cropi.gradient.layout import Layout
from cropi.gradient.zero import Suspicion
from cropi.model.policy import Policy
from cropi.sketching import passes
from cropi.sketching.job import SketchJob
from cropi_kernels import (
    GradientSketcher,
    SketchSpec,
    fold_inputs,
    linear_logprob,
    logprob_and_grad,
    plan_matrix,
    project,
)
from cropi_kernels.ops.linear_logprob import chunks
from cropi_kernels.ops.project import ProjectionSpec
from cropi_kernels.ops.project import cpu as project_cpu
from cropi_kernels.ops.sketch_linear import cpu as linear_cpu

OutOfMemory = torch.OutOfMemoryError


def full(*args: Any, **kwargs: Any) -> Any:
    raise OutOfMemory("CUDA out of memory. Tried to allocate 20.00 GiB.")


# -------------------------------------------------------------------------------------------------- ops
def test_an_op_names_its_operands_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_matrix(SketchSpec(width=16), "a.b.weight", 20, 40)
    monkeypatch.setattr(linear_cpu, "fold_columns", full)
    with pytest.raises(OutOfMemory) as error:
        fold_inputs(torch.ones(1024, 40), plan)
    assert str(error.value) == (
        "cropi::fold_columns ran out of memory on cpu, given float32 [1024, 40] (0.2 MiB): give fewer tokens a call (a "
        "smaller micro-batch), or fewer segments. (CUDA out of memory. Tried to allocate 20.00 GiB.)"
    )


def test_the_ops_with_a_gradient_do_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, head, targets = torch.ones(3, 8), torch.ones(11, 8), torch.tensor([0, 5, 10])
    monkeypatch.setattr(chunks, "Logits", full)
    for run in (
        lambda: linear_logprob(hidden, head, targets),
        lambda: logprob_and_grad(hidden, head, targets, lambda logp, a, b: logp),
    ):
        with pytest.raises(OutOfMemory, match=r"float32 \[11, 8\].*smaller chunk_size.*20.00 GiB"):
            run()
    monkeypatch.setattr(project_cpu, "project", full)
    with pytest.raises(OutOfMemory, match=r"cropi::project .*fewer columns at a time"):
        project(hidden, ProjectionSpec(dim=64))


# --------------------------------------------------------------------------------------------- sketcher
def test_the_sketcher_names_the_batch_and_stays_usable() -> None:
    batch, model = zoo.padded(), zoo.make("llama")
    with GradientSketcher(model, SketchSpec(width=16, vocab_width=64)) as sketcher:
        want = batch.sketch(sketcher).sketches
        with pytest.raises(
            OutOfMemory, match=r"policy_gradient on 6 x 9 tokens with 18 scored ones and 3 segments"
        ) as error:
            batch.sketch(sketcher, weigh=full)
        assert "0.4 MiB" in str(error.value) and "fewer rows a call" in str(error.value)
        acc = sketcher._tapped.acc
        assert acc.segments is None and not acc._engines and not acc._folds
        assert torch.equal(batch.sketch(sketcher).sketches, want), "nothing of the failed call is left"


def test_sketches_that_do_not_fit_leave_no_batch_open(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, zeros = zoo.padded(), torch.zeros

    def small(*size: Any, **kwargs: Any) -> torch.Tensor:
        return full() if size[0] == 7 else zeros(*size, **kwargs)

    monkeypatch.setattr(torch, "zeros", small)
    with GradientSketcher(zoo.make("llama"), SketchSpec(width=16)) as sketcher:
        want = batch.sketch(sketcher).sketches
        with pytest.raises(OutOfMemory, match=r"and 7 segments \(sketches: 0.9 MiB\) ran out of memory"):
            batch.sketch(sketcher, num_segments=7)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="backend='cuda' cannot run"):
            patch.setenv("CROPI_KERNELS_BACKEND", "cuda")
            with sketcher.batch(batch.segments, shape=(6, 9)):
                pass
        assert torch.equal(batch.sketch(sketcher).sketches, want)


# ------------------------------------------------------------------------------------------- micro-batches
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "padded"])
def test_halves_hold_every_row_and_token_once(shared: bool) -> None:
    from test_batches import GROUPS

    for batch in make_batches(
        GROUPS, ESTIMATORS["cropi"], Layout(shared=shared), budget=60, stored_behaviour=True
    ):
        if batch.input_ids.shape[0] == 1:
            continue
        first, second = batch.halves()
        assert torch.equal(torch.cat([first.input_ids, second.input_ids]), batch.input_ids)
        assert torch.equal(torch.cat([first.targets, second.targets]), batch.targets)
        ids = [g.id for g in batch.groups]
        for half in (first, second):
            # A scored token predicts the same token from the same hidden state of the same prompt as before.
            assert [g.id for g in half.groups] == [i for i in ids if i in {g.id for g in half.groups}]
            assert half.segments[0] == 0 and int(half.segments[-1]) == len(half.groups) - 1
            assert torch.equal(half.segments[half.positions // half.input_ids.shape[1]], half.token_segments)
        done = [g.id for half in (first, second) for g, f in zip(half.groups, half.finished) if f]
        assert done == [g.id for g, f in zip(batch.groups, batch.finished) if f], (
            "finished once, in the last half"
        )


# -------------------------------------------------------------------------------------------------- jobs
@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A device whose memory holds ``most`` tokens; counts its attempts."""
    state = {"most": 1 << 30, "attempts": 0, "refused": 0}
    compute = GradientSketcher.policy_gradient

    def limited(self: GradientSketcher, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        state["attempts"] += 1
        if input_ids.numel() > state["most"]:
            state["refused"] += 1
            full()
        return compute(self, input_ids, **kwargs)

    monkeypatch.setattr(GradientSketcher, "policy_gradient", limited)
    return state


def run_job(tmp_path: Path, out: str, **options: Any) -> dict[str, torch.Tensor]:
    file = write_lines(tmp_path / "train.jsonl", make_records(16))
    job = SketchJob([file], tmp_path / out, SketchSpec(dim=1024), tokens_per_batch=300, **options)
    cropi.sketching.run.sketch(Policy(make_model(), make_tokenizer()), job, progress=False)
    return rows(tmp_path / out)


def rows(path: Path) -> dict[str, torch.Tensor]:
    return sketches_of(path)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_a_batch_that_does_not_fit_is_halved(
    tmp_path: Path, device: dict[str, int], layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    want = run_job(tmp_path, "whole", layout=layout)
    device["most"] = 60
    got = run_job(tmp_path, "halved", layout=layout)
    assert 0 < device["refused"] <= 4, "what did not fit is not tried again at every batch"
    assert want.keys() == got.keys()
    for name, sketch in want.items():
        assert float((got[name] - sketch).norm()) <= 1e-5 * float(sketch.norm()), name
    said = capsys.readouterr()
    assert "do not fit into the device's memory: halved; --tokens-per-batch" in said.out + said.err


@pytest.mark.long
def test_a_row_of_several_responses_that_does_not_fit_is_halved(
    tmp_path: Path, device: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Down to a response a row, which no prompt's longest one exceeds."""
    want = run_job(tmp_path, "whole", layout="shared")
    single = [len(record["prompt"]) + max(map(len, record["responses"])) for record in make_records(16)]
    device["most"] = max(single)
    got = run_job(tmp_path, "halved", layout="shared")
    assert device["refused"] and want.keys() == got.keys()
    for name, sketch in want.items():
        assert float((got[name] - sketch).norm()) <= 1e-5 * float(sketch.norm()), name
    said = capsys.readouterr()
    assert re.search(r"\b1 x \d+ tokens do not fit into the device's memory: halved", said.out + said.err)


@pytest.mark.long
def test_memory_that_ends_while_a_prompts_responses_are_measured_adds_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each response's gradient by itself takes more memory than their sum; the sums of the batch are there already."""
    monkeypatch.setattr(Suspicion, "is_suspicious", lambda *_: True)
    want = run_job(tmp_path, "whole", layout="padded")
    compute, refused = GradientSketcher.policy_gradient, 0

    def limited(self: GradientSketcher, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal refused
        if refused < 3 and len(input_ids) > 1 and len(kwargs["segments"].unique()) == len(input_ids):
            refused += 1
            full()
        return compute(self, input_ids, **kwargs)

    monkeypatch.setattr(GradientSketcher, "policy_gradient", limited)
    got = run_job(tmp_path, "refused", layout="padded")
    assert refused == 3 and want.keys() == got.keys()
    for name, sketch in want.items():
        assert float((got[name] - sketch).norm()) <= 1e-5 * float(sketch.norm()), name


@pytest.mark.long
def test_memory_that_ends_behind_a_pass_has_it_halved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where its numbers are made ready for the host."""
    want = run_job(tmp_path, "whole", layout="padded")
    sums, refused = passes.health_sums, 0

    def limited(estimator: Any, batch: Any, *args: Any) -> Any:
        nonlocal refused
        if batch.input_ids.numel() > 60:
            refused += 1
            full()
        return sums(estimator, batch, *args)

    monkeypatch.setattr(passes, "health_sums", limited)
    got = run_job(tmp_path, "halved", layout="padded")
    assert refused and want.keys() == got.keys()
    for name, sketch in want.items():
        assert float((got[name] - sketch).norm()) <= 1e-5 * float(sketch.norm()), name


@pytest.mark.long
def test_one_row_that_does_not_fit_ends_the_job_and_loses_nothing(
    tmp_path: Path, device: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    want = run_job(tmp_path, "whole", layout="padded")
    compute = GradientSketcher.policy_gradient
    calls = []

    def breaks(self: GradientSketcher, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(input_ids.shape)
        return full() if len(calls) > 1 else compute(self, input_ids, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(CropiError) as error:
        patch.setattr(GradientSketcher, "policy_gradient", breaks)
        run_job(tmp_path, "broken", layout="padded")
    assert "no memory for one row of" in str(error.value) and "--max-length" in str(error.value)
    kept = rows(tmp_path / "broken")
    assert 0 < len(kept) < len(want), "the first batch is in the store"
    got = run_job(tmp_path, "broken", layout="padded")  # the device is free again
    assert want.keys() == got.keys() and all(torch.equal(got[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"
        ),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["bad_alloc", "cpu", "cublas", "triton"],
)
def test_other_ways_to_say_it_are_halved_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    want = run_job(tmp_path, "whole")
    compute, refused = GradientSketcher.policy_gradient, 0

    def limited(self: GradientSketcher, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        nonlocal refused
        if input_ids.numel() > 60:
            refused += 1
            raise error
        return compute(self, input_ids, **kwargs)

    monkeypatch.setattr(GradientSketcher, "policy_gradient", limited)
    got = run_job(tmp_path, "halved")
    assert refused and want.keys() == got.keys()
    assert all(torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-6) for name in want)


def test_another_error_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(GradientSketcher, "policy_gradient", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run_job(tmp_path, "broken")
