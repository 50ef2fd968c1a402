"""What goes between a device and the host around a pass: equal tensors, in one copy each way."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from support import zoo
from torch.overrides import TorchFunctionMode

from cropi_kernels import GradientSketcher, SketchSpec, token_logprobs
from cropi_kernels.sketcher.batch import host, labels
from cropi_kernels.sketcher.batch.row_segments import RowSegments
from cropi_kernels.sketcher.batch.segments import Segments
from cropi_kernels.sketcher.formed import FormedSketcher
from cropi_kernels.sketcher.policy.head_pass import PolicyGradient

SPEC = SketchSpec(width=16, vocab_width=64)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory is taken for a device's: tensors are packed and copied as those of a GPU."""
    monkeypatch.setattr(host, "_away", lambda device: True)


def test_copies_on_the_host_are_equal(away: None) -> None:
    big = 2**40 + 1
    given = [
        torch.tensor([[1, -big], [big, 3]]), None, torch.arange(6).view(2, 3).T, torch.tensor([True, False, True]),
        torch.tensor([-7, 7], dtype=torch.int32), torch.tensor([0.5, 1e30]), torch.empty(0, 4, dtype=torch.int64),
        torch.tensor([1.0, 0.0]).bfloat16(), torch.tensor(255, dtype=torch.uint8),
    ]  # fmt: skip
    got = host.on_host(*given)
    assert len(got) == len(given)
    for x, y in zip(given, got):
        if x is None:
            assert y is None
        else:
            assert y.dtype == x.dtype and y.shape == x.shape and torch.equal(x, y)


def test_what_is_on_the_host_is_not_copied() -> None:
    x, device = torch.arange(3), torch.device("cpu")
    assert host.on_host(x, None)[0] is x and host.on_device(device, x)[0] is x


def test_values_that_were_sent_are_not_asked_for(away: None) -> None:
    x, device = torch.arange(6).view(2, 3), torch.device("cpu")
    there = host.sent(device, x)
    assert there is not x and there.data_ptr() != x.data_ptr() and torch.equal(there, x)
    assert host.on_host(there)[0] is x
    for changed in (there, x):
        there = host.sent(device, x)
        (there if changed is not x else x).add_(1)
        (got,) = host.on_host(there)
        assert got is not x and torch.equal(got, there), "a copy that was written to has values of its own"
    with torch.inference_mode():
        assert torch.equal(host.on_host(host.sent(device, x))[0], x)
    other = host.sent(device, x)[:1]
    assert host.on_host(other)[0].tolist() == x[:1].tolist()


def test_what_is_sent_is_copied_from_pinned_memory() -> None:
    """From other memory the host would wait. A device is played by the host's memory."""
    copied: list[tuple[torch.Tensor, torch.Tensor]] = []
    pinned = torch.empty(2, 3)

    class Cuda(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.empty_like:
                assert kwargs == {"device": torch.device("cuda", 1)}
                return func(*args)
            if func is torch.Tensor.pin_memory:
                return pinned.copy_(args[0])
            if func is torch.Tensor.copy_ and kwargs == {"non_blocking": True}:
                copied.append(args)
            return func(*args, **(kwargs or {}))

    x = torch.arange(6.0).view(2, 3)
    with Cuda():
        there = host.sent(torch.device("cuda", 1), x)
    ((to, source),) = copied
    assert to is there and source is pinned and torch.equal(there, x)


def test_what_is_fetched_is_there_when_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is played by a class of tensors whose copies arrive when their event has been waited for."""
    waited: list[str] = []

    class Away(torch.Tensor):
        device = property(lambda self: torch.device("cuda", 0))

    class Event:
        def record(self, stream: object) -> None:
            waited.append(f"recorded on {stream}")

        def synchronize(self) -> None:
            waited.append("waited")

    empty = torch.empty

    def pinned(*size: object, pin_memory: bool = False, **kwargs: object) -> torch.Tensor:
        assert pin_memory and kwargs["device"] == "cpu"
        return empty(*size, **kwargs)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    x, y = torch.arange(6.0).view(2, 3).T, torch.tensor([1, 2])
    fetched = host.Fetched(x.as_subclass(Away), y.as_subclass(Away))
    assert waited == ["recorded on the stream of cuda:0"]
    got = fetched.wait()
    assert waited[-1] == "waited" and torch.equal(got[0], x) and torch.equal(got[1], y)
    assert host.Fetched(x).wait()[0] is x, "what is on the host is not copied"


def test_a_result_goes_to_another_process() -> None:
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        result = zoo.LAYOUTS["padded"]().sketch(sketcher)
    for copied in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert torch.equal(copied.sketches, result.sketches)
        assert copied.seconds == result.seconds and copied.seconds["backward"] > 0
        assert json.loads(json.dumps(copied.seconds)) == result.seconds


def test_a_results_seconds_are_a_dict_that_is_measured_when_it_is_read() -> None:
    measured: list[int] = []

    def measure() -> dict[str, float]:
        measured.append(1)
        return {"forward": 0.5}

    none = torch.zeros(0)
    result = PolicyGradient(none, none, none, measure)
    repr(result)
    assert not measured
    assert json.dumps(result.seconds) == '{"forward": 0.5}' and result.seconds is result.seconds
    assert pickle.loads(pickle.dumps(result.seconds)) == {"forward": 0.5} and len(measured) == 1


def test_parts_of_one_copy_begin_where_kernels_read_fast(away: None) -> None:
    given = [torch.arange(n) + 10 * n for n in (3, 0, 1, 4, 5)]
    got = host.on_device(torch.device("cpu"), *given)
    assert all(torch.equal(x, y) for x, y in zip(given, got, strict=True))
    assert all(y.data_ptr() % 16 == 0 and y.is_contiguous() for y in got)
    assert len({y.untyped_storage().data_ptr() for y in got}) == 1


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_a_batch_that_was_copied_gives_the_same_bits(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = zoo.LAYOUTS[layout]()
    with GradientSketcher(zoo.make("llama"), SPEC) as sketcher:
        want = batch.sketch(sketcher)
        monkeypatch.setattr(host, "_away", lambda device: True)
        got = batch.sketch(sketcher)
        assert torch.equal(got.sketches, want.sketches) and torch.equal(got.logprobs, want.logprobs)
        if layout != "shared":  # whose positions repeat
            labels = torch.full_like(batch.input_ids, -100)
            labels.view(-1)[batch.positions + 1] = batch.targets
            changes = {"positions": None, "targets": None, "labels": labels}
            got = batch.sketch(sketcher, **changes)
            assert torch.equal(got.sketches, want.sketches) and torch.equal(got.weights, want.weights)


@pytest.mark.parametrize("way", ["policy_gradient", "formed", "token_logprobs"])
def test_ones_in_a_mask_that_is_added_come_in_the_copy_of_the_batch(
    way: str, away: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = zoo.make("llama"), zoo.packed()
    begin = (batch.position_ids == 0).cumsum(1)  # type: ignore[union-attr, attr-defined]
    ones = ((begin[:, :, None] == begin[:, None]).tril()[:, None]).float()
    rows = {"segments": torch.zeros(1, dtype=torch.int64), "num_segments": 1} if way == "formed" else {}
    copies: list[int] = []
    copy_of_batch = host.on_host
    monkeypatch.setattr(labels, "on_host", lambda *given: copies.append(1) or copy_of_batch(*given))

    def logprobs(mask: torch.Tensor) -> torch.Tensor:
        given = dict(positions=batch.positions, targets=batch.targets, position_ids=batch.position_ids)
        if way == "token_logprobs":
            return token_logprobs(model, batch.input_ids, attention_mask=mask, **given)  # type: ignore[arg-type]
        kind: Any = GradientSketcher if way == "policy_gradient" else FormedSketcher
        with kind(model, SPEC) as sketcher:
            return batch.sketch(sketcher, attention_mask=mask, **rows).logprobs

    with pytest.raises(ValueError, match="torch.float32, of ones and zeros: give attention_mask.bool"):
        logprobs(ones)
    assert len(copies) == 1, "one copy tells of the batch and of the mask"
    want = logprobs(ones.bool())
    added = (1 - ones) * -1e30
    assert torch.equal(logprobs(added), want)


def test_a_mask_that_is_added_is_not_waited_for(away: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch whose values the host has, as of a job's."""
    waited: list[int] = []
    room = host._room
    monkeypatch.setattr(host, "_room", lambda *given: waited.append(1) or room(*given))
    batch, mask = zoo.packed(), torch.zeros(1, 1, 2, 2)
    for send in (lambda x: x.clone(), lambda x: host.sent(torch.device("cpu"), x)):
        given = [send(x) for x in (batch.input_ids, batch.segments, batch.positions, batch.targets)]
        labels.Batch(*given[:2], None, *given[2:], mask, None).on_host()
        assert waited == [1]


def test_offsets_of_heads_and_columns_come_from_those_of_the_device() -> None:
    """Not from the host, which would wait: on ``meta`` a copy has no numbers, so that the values are the CPU's."""
    offsets, meta = torch.tensor([0, 6, 6, 18]), torch.device("meta")
    where = RowSegments(3, 6, offsets)
    where.keep(torch.empty(4, dtype=torch.int64, device=meta))
    before = where.offsets
    object.__setattr__(where, "offsets", None)  # reading them would fail
    assert where.offsets_on(meta, 4).is_meta
    assert where.tokens_first(torch.empty(3, 2, 5, device=meta), "head")[1].is_meta
    object.__setattr__(where, "offsets", before)
    assert where.tokens_first(torch.empty(3, 2, 5), "head")[1].tolist() == [0, 2, 2, 6]
    assert Segments(3, 6, offsets).offsets_on(torch.device("cpu"), 4).tolist() == [0, 24, 24, 72]
