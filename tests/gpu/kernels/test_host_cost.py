"""What a pass asks of the host, on a driver of paper: Triton binds arguments, what it would compile does nothing.

The shape is that of a 1.5B model: 28 layers, q, k and v with biases, a tied head; its matrices are as narrow as folds
allow, since no time but the host's is looked at.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import rehearsal
import torch
from rehearsal import set_stage
from triton.runtime.jit import JITFunction

from cropi_kernels import GradientSketcher, SketchSpec, _launch, plan_matrix, sketch_grouped
from cropi_kernels.sketcher.sums.accumulator import Accumulator
from cropi_kernels.sketcher.sums.clock import Clock
from cropi_kernels.sketcher.sums.gpu_engine import GpuEngine
from cropi_kernels.sketcher.taps import taps

transformers = pytest.importorskip("transformers")

LAYERS, VOCAB = 28, 260
OF_A_LAYER = 11  # 4 folds, 4 slabs, 2 norms, the biases; before there was an engine, 33
OF_A_PASS = 350
BEFORE, CALLS = 125, 325  # of functions of the package: before the model, and within it a layer
PACKAGE = os.path.dirname(_launch.__file__)
SHAPES = ((1, 40, 1), (2, 32, 2), (3, 27, 3), (4, 16, 4))  # rows, tokens of a row, segments


LAUNCHED: Counter[str] = Counter()
# By this process: what one test has compiled, none after it compiles again.
COMPILED: Counter[str] = Counter()


class Paper:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        assert x > 0 and y > 0 and z > 0
        LAUNCHED[self.name] += 1

    def launch_metadata(self, *arguments: Any) -> None:
        return None


def compiled() -> list[dict[Any, Any]]:
    """The tables in which Triton and our launches keep what was compiled."""
    gc.unfreeze()  # tests/support/fixtures.py hides what was there before the first test
    kept = {JITFunction: "device_caches", _launch.Launch: "_compiled"}
    return [vars(x)[kept[type(x)]] for x in gc.get_objects() if type(x) in kept]


@pytest.fixture(scope="module", autouse=True)
def kernels_of_paper() -> Iterator[None]:
    """They take no other test's place in this process, nor another's theirs."""
    before = [(table, table.copy()) for table in compiled()]
    for table, _ in before:
        table.clear()
    yield
    for table in compiled():
        table.clear()
    for table, kept in before:
        table.update(kept)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Nothing reads it, and the time to fill it is not the host's."""


@pytest.fixture(autouse=True)
def paper(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_none(self: Any, key: str, signature: Any, device: int, *rest: Any) -> Paper:
        COMPILED[self.fn.__name__] += 1
        made = self.device_caches[device][0][key] = Paper(self.fn.__name__)
        return made

    monkeypatch.setattr(JITFunction, "_do_compile", compile_none)
    monkeypatch.setattr(_launch, "BY_ADDRESS", True)
    set_stage(monkeypatch)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=192, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config).bfloat16().eval()


@contextlib.contextmanager
def active(model: Any) -> Iterator[Any]:
    """``step(rows, length, segments)``: a pass. Its numbers are those of memory that nothing has written."""
    with GradientSketcher(model, SketchSpec(vocab_width=128), verify=False) as sketcher:

        def step(rows: int, length: int, segments: int) -> None:
            ids = torch.arange(rows * length).view(rows, length) % VOCAB
            labels = ids.clone()
            weights, where = torch.ones(rows), torch.arange(rows) * segments // rows
            sketcher.policy_gradient(ids, segments=where, labels=labels, weights=weights)

        yield step


def test_variants_of_a_model(model: Any) -> None:
    """One or two of each kernel, and none for another number of tokens or segments: each is a stall of seconds."""
    with active(model) as step:
        step(*SHAPES[0])
        first = Counter(COMPILED)
        for shape in SHAPES[1:]:
            step(*shape)
    assert COMPILED == first and {"slab_kernel", "norm_kernel", "tail_kernel", "rows_kernel"} <= set(first)
    # The head's own slab and folds; a chunk table for each way to cut.
    most = {"fold_kernel": 3, "chunks_kernel": 4, "slab_kernel": 2}
    assert all(n <= most.get(name, 1) for name, n in first.items()), first


def test_variants_of_a_stack_of_experts() -> None:
    """As of a model: tokens, segments and experts vary with the batch, and one kernel serves all."""
    plan = plan_matrix(SketchSpec(width=16), "experts", 64 * 48, 64)

    def call(experts: int, segments: int, tokens: int) -> None:
        offsets = torch.arange(experts * segments + 1) * (tokens // (experts * segments))
        d, a = torch.ones(tokens, 48), torch.ones(tokens, plan.folded_cols)
        sketch_grouped(d.bfloat16(), a.bfloat16(), offsets, plan, torch.zeros(segments, 32768))

    call(64, 1, 64)
    first = Counter(COMPILED)
    LAUNCHED.clear()
    for experts, segments, tokens in ((64, 16, 2048), (64, 3, 1001), (64, 1, 65)):
        call(experts, segments, tokens)
    assert COMPILED == first and LAUNCHED["grouped_kernel"] == 3


def test_launches_of_a_pass(model: Any) -> None:
    with active(model) as step:
        step(2, 32, 2)
        LAUNCHED.clear()
        step(2, 32, 2)
    per_layer = {name: n // LAYERS for name, n in LAUNCHED.items() if n >= LAYERS}
    assert per_layer == {"fold_kernel": 4, "slab_kernel": 4, "norm_kernel": 2, "sums_kernel": 1}
    assert sum(per_layer.values()) == OF_A_LAYER and sum(LAUNCHED.values()) <= OF_A_PASS


def test_the_hosts_time_in_taps(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the way of an operator a tap, in this run: 0.37 of it measured, and 0.27 of what it was before kernels
    were launched straight."""
    spent, call, within = 0, taps.Tap.__call__, taps.Tap.within

    def timed(run: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any) -> Any:
            nonlocal spent
            start = time.thread_time_ns()
            try:
                return run(*args)
            finally:
                spent += time.thread_time_ns() - start

        return timing

    monkeypatch.setattr(taps.Tap, "__call__", timed(call))
    monkeypatch.setattr(taps.Tap, "within", lambda self, add: timed(within(self, add)))

    def least(served: bool) -> int:
        nonlocal spent
        took = []
        monkeypatch.setattr(GpuEngine, "serves", staticmethod(lambda out: served))
        with active(model) as step:
            for _ in range(4):
                spent = 0
                step(2, 32, 2)
                took.append(spent)
        return min(took)

    least(True), least(False)  # compiles, uploads
    both = [(least(True), least(False)) for _ in range(2)]  # in turns: other work on the machine slows both
    engine, operators = map(min, zip(*both))
    assert engine <= 0.5 * operators, f"{engine / 1e6:.1f} ms, and {operators / 1e6:.1f} ms by operators"


def test_calls_of_python_functions(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this package, in a pass that measures no spans: before the model's first module, and in a layer. Before they
    were made fewer, 483 and 488."""
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, argument: Any) -> None:
        calls[at] += event == "call" and PACKAGE in frame.f_code.co_filename

    def begin(*args: Any) -> None:
        nonlocal at
        at = "within"

    monkeypatch.setattr(Clock, "timed", lambda clock: contextlib.nullcontext())
    with active(model) as step, model.model.register_forward_pre_hook(begin):
        step(2, 32, 2)
        at = "before"
        sys.setprofile(count)
        try:
            step(2, 32, 2)
        finally:
            sys.setprofile(None)
    assert 0 < calls["before"] <= BEFORE, calls
    assert 0 < calls["within"] <= LAYERS * CALLS, calls["within"] / LAYERS


def test_spans_are_measured_in_some_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs two events, and a layer has sixteen; the shares of the pass between them are the latest."""
    events = 0

    class Event(rehearsal.Event):
        def __init__(self, enable_timing: bool = False) -> None:
            nonlocal events
            events += 1
            super().__init__(enable_timing)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    acc, before = Accumulator(SketchSpec()), 0.0
    for number in range(1, 10):
        clock = Clock(torch.device("cuda"), number)
        for _ in range(3):
            with clock.timed():
                pass
        assert clock.measures == (number in (1, 2, 4, 8))
        share = acc.sketch_share(clock, lambda: 100.0)()
        assert share > 0 and (clock.measures or share == before)
        before = share
    assert events == 4 * 3 * 2
    # Whether anybody has looked at the measured ones, or looks at them later, changes nothing.
    acc, shares = Accumulator(SketchSpec()), []
    for number in range(1, 6):
        clock = Clock(torch.device("cuda"), number)
        with clock.timed():
            pass
        shares.append(acc.sketch_share(clock, lambda number=number: 100.0 * number))
    last, fourth, third, second = (shares[k]() for k in (4, 3, 2, 1))
    assert 0 < last == fourth and 0 < third == second != fourth
