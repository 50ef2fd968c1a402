"""On a GPU a pass is launched before the results of the one before it are looked at: the same rows, and no waiting."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import sketches_of

import cropi.sketching.run
from cropi.model.policy import Policy
from cropi.sketching import passes
from cropi.sketching.job import SketchJob
from cropi.sketching.summary import Summary
from cropi.store.store import SketchStore
from cropi_kernels import GradientSketcher, SketchSpec
from cropi_kernels.sketcher.batch import host


def run_job(folder: Path, out: str, **options: Any) -> Summary:
    file = write_lines(folder / "train.jsonl", make_records(16))
    options = {"tokens_per_batch": 48, "verify": False} | options
    job = SketchJob([file], folder / out, SketchSpec(dim=1024), **options)
    return cropi.sketching.run.sketch(Policy(make_model(), make_tokenizer()), job, progress=False)


def held(folder: Path, out: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rows = sorted(SketchStore.open(folder / out).rows(), key=lambda row: row.id)
    return [asdict(row) for row in rows], sketches_of(folder / out)


def assert_equal(folder: Path, first: str, second: str) -> None:
    (rows, sketches), (others, there) = held(folder, first), held(folder, second)
    assert rows == others and sketches.keys() == there.keys() and len(sketches) > 8
    assert all(torch.equal(sketch, there[name]) for name, sketch in sketches.items())


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU is taken for a device that works beside the host; what happened, in order."""
    happened: list[str] = []
    compute, look = GradientSketcher.policy_gradient, passes.Passes._rows

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = compute(self, *args, **kwargs)
        happened.append("launched")
        return result

    def looked(self: Any, *args: Any) -> Any:
        happened.append("looked at")
        return look(self, *args)

    monkeypatch.setattr(GradientSketcher, "policy_gradient", launched)
    monkeypatch.setattr(passes.Passes, "_rows", looked)
    return happened


@pytest.mark.long
@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_passes_ahead_give_the_same_store(
    tmp_path: Path, ahead: list[str], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    run_job(tmp_path, "one by one", layout=layout)
    count = ahead.count("launched")
    assert count > 3 and ahead == ["launched", "looked at"] * count
    ahead.clear()
    monkeypatch.setattr(passes, "AHEAD", ("cpu",))
    monkeypatch.setattr(host, "_away", lambda device: True)  # batches are copied, as to a GPU
    copied: list[int] = []
    room = host._room
    monkeypatch.setattr(host, "_room", lambda size, device: copied.append(size) or room(size, device))
    summary = run_job(tmp_path, "ahead", layout=layout)
    assert ahead == ["launched", *["launched", "looked at"] * (count - 1), "looked at"]
    assert_equal(tmp_path, "one by one", "ahead")
    # One copy a pass, to the device: the host has the values of its batch, and asks for none.
    assert len(copied) == count
    assert 0 < summary.wall and sum(summary.seconds.values()) < 2 * summary.wall + 1


@pytest.mark.long
def test_what_was_launched_before_an_error_is_kept(
    tmp_path: Path, ahead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(tmp_path, "whole", layout="padded")
    monkeypatch.setattr(passes, "AHEAD", ("cpu",))
    compute, left = GradientSketcher.policy_gradient, 3

    def breaks(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ZeroDivisionError("the fourth pass")
        return compute(self, *args, **kwargs)

    ahead.clear()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(GradientSketcher, "policy_gradient", breaks)
        run_job(tmp_path, "broken", layout="padded")
    assert ahead.count("looked at") == 3 and 0 < len(sketches_of(tmp_path / "broken"))
    run_job(tmp_path, "broken", layout="padded")
    assert_equal(tmp_path, "whole", "broken")


@pytest.mark.long
def test_batches_that_are_halved_run_ahead_too(
    tmp_path: Path, ahead: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = GradientSketcher.policy_gradient

    def limited(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        if input_ids.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return compute(self, input_ids, **kwargs)

    monkeypatch.setattr(GradientSketcher, "policy_gradient", limited)
    run_job(tmp_path, "one by one")
    monkeypatch.setattr(passes, "AHEAD", ("cpu",))
    run_job(tmp_path, "ahead")
    assert_equal(tmp_path, "one by one", "ahead")


class Copies:
    """A device's copies to the host, and its events: what is copied is there once an event behind it was waited for."""

    def __init__(self) -> None:
        self.queue: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.pinned: list[torch.Tensor] = []

    def launch(self, to: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        assert any(to is memory for memory in self.pinned), "a copy to other memory makes the host wait"
        self.queue.append((to, values))
        return to.fill_(torch.nan)

    def arrive(self, count: int) -> None:
        for to, values in self.queue[:count]:
            to.copy_(values)
        self.queue[:count] = [(to, to) for to, _ in self.queue[:count]]


@pytest.mark.long
@pytest.mark.parametrize("fault", ["", "no wait", "event before the copies"])
def test_results_are_read_when_their_copies_have_arrived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Until then the memory that they go to holds NaN. With a fault the store is another, so that this would show."""
    run_job(tmp_path, "one by one", layout="padded")
    copies, empty = Copies(), torch.empty

    class OfDevice(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 0))

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.copy_:
                assert kwargs == {"non_blocking": True}
                return copies.launch(args[0], args[1].as_subclass(torch.Tensor))
            return super().__torch_function__(func, types, args, kwargs or {})

    class Event:
        def record(self, stream: Any) -> None:
            self.behind = 0 if fault == "event before the copies" else len(copies.queue)

        def synchronize(self) -> None:
            if fault != "no wait":
                copies.arrive(self.behind)

    def pinned(*size: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = empty(*size, **kwargs)
        copies.pinned += [made] * pin_memory
        return made

    fetched = passes.Fetched
    monkeypatch.setattr(passes, "AHEAD", ("cpu",))
    monkeypatch.setattr(passes, "Fetched", lambda *given: fetched(*(x.as_subclass(OfDevice) for x in given)))
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    run_job(tmp_path, "ahead", layout="padded")
    monkeypatch.setattr(torch, "empty", empty)
    assert len(copies.pinned) == len(copies.queue) > 12
    if not fault:
        assert_equal(tmp_path, "one by one", "ahead")
    else:
        with pytest.raises(AssertionError):
            assert_equal(tmp_path, "one by one", "ahead")
