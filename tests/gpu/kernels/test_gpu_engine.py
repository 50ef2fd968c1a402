"""What taps hand to the GPU engine, against the same in plain torch in float64: in the order of a backward pass."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rehearsal import set_stage

from cropi_kernels import SketchSpec, dispatch, plan_vector, sketch_vector
from cropi_kernels.sketcher.batch.segments import Segments
from cropi_kernels.sketcher.sums.engine import Norm, Operators, Site
from cropi_kernels.sketcher.sums.gpu_engine import GpuEngine
from cropi_kernels.sketcher.sums.matrix import SlabMatrix
from cropi_kernels.testing import sum_error_bound

SPEC = SketchSpec(width=128)
BATCH, LENGTH, WIDTH, HEADS = 2, 40, 136, 3
SITE = Site("a.q_proj")


def tensor(seed: int, *shape: int) -> torch.Tensor:
    """Numbers that every dtype holds."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=g).double() / 4


@dataclasses.dataclass
class Layer:
    """The calls of a layer's backward pass: q, k and v with biases, a norm of heads, an MLP, a LayerNorm; one gradient
    that is not dense [batch, length, n]."""

    first: int = 0  # token that the batch begins with
    last: int = BATCH * LENGTH

    def rows(self, seed: int, dtype: torch.dtype, *more: int) -> torch.Tensor:
        x = tensor(seed, BATCH * LENGTH, *more)[self.first : self.last].to(dtype)
        batch = BATCH if self.last - self.first == BATCH * LENGTH else 1
        return x.view(batch, -1, *more)

    def run(self, engine: Operators, dtype: torch.dtype) -> None:
        def matrix(name: str, rows: int) -> SlabMatrix:
            return SlabMatrix(SPEC, f"model.0.attn.{name}.weight", rows, WIDTH, "linear")

        x, hidden = self.rows(0, dtype, WIDTH), self.rows(1, dtype, WIDTH)
        q, k, v, gate, up, down = (
            matrix(name, 20 + 8 * i) for i, name in enumerate(("q", "k", "v", "gate", "up", "down"))
        )
        kept, mlp, other = (engine.fold(y, m, SITE) for y, m in ((x, q), (hidden, gate), (x * 2, down)))
        seed = 2
        order = (down, other), (up, mlp), (gate, mlp), (v, kept), (k, kept), (q, kept)
        for m, folded in order:
            dy = self.rows(seed, dtype, m.rows)
            if m is k:  # between matrices that share their inputs, as norms of heads are
                heads = Norm(False, 1e-6, plan_vector(SPEC, "model.0.k_norm.weight", 8), None)
                engine.add_norm(self.rows(30, dtype, HEADS, 8), self.rows(31, dtype, HEADS, 8), heads, SITE)
            engine.add_linear(dy, folded, m, SITE)
            if folded is kept:
                engine.add_bias(dy, plan_vector(SPEC, f"model.0.{m.name}.bias", m.rows), SITE)
            seed += 1
        plans = (plan_vector(SPEC, f"model.0.norm.{p}", WIDTH) for p in ("weight", "bias"))
        engine.add_norm(
            x, hidden.float() if dtype != torch.float64 else hidden, Norm(True, 1e-5, *plans), SITE
        )
        turned = self.rows(seed, dtype, 24).transpose(-1, -2).contiguous().transpose(-1, -2)
        engine.add_bias(turned, plan_vector(SPEC, "model.0.o.bias", 24), SITE)

    def segments(self, *cuts: int) -> Segments:
        ids = torch.zeros(BATCH * LENGTH, dtype=torch.int64)
        for cut in cuts:
            ids[cut:] += 1
        ids = ids[self.first : self.last]
        ids = (ids - ids[0]).view(BATCH if self.last - self.first == BATCH * LENGTH else 1, -1)
        return Segments.of(ids, *ids.shape, None)

    def sketches(self, dtype: torch.dtype, *cuts: int, engine: type[Operators] = GpuEngine) -> torch.Tensor:
        where = self.segments(*cuts)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        made = engine(where, torch.zeros(where.count, SPEC.base_dim, dtype=wide))
        self.run(made, dtype)
        return made.settle()


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Falls of the engine to an operator are the GPU's, too."""
    set_stage(monkeypatch)


def test_a_layer_against_float64(stage: None, half: torch.dtype) -> None:
    cuts = 5, 60
    got = Layer().sketches(half, *cuts)
    where = Layer().segments(*cuts)
    exact = torch.zeros(3, SPEC.base_dim, dtype=torch.float64)
    layer = Operators(where, exact)
    with torch.no_grad():
        Layer().run(layer, torch.float64)
    # Sums of 80 products up to 4 * 4, of folds of two features that were rounded once.
    error = (got - exact).abs()
    bound = sum_error_bound(torch.tensor(80.0 * 16), 200) + torch.finfo(half).eps * exact.abs().max()
    assert exact.any(1).all() and (error <= bound).all(), float(error.max())


def test_bits_do_not_depend_on_company_or_run(stage: None, half: torch.dtype) -> None:
    together, again = Layer().sketches(half, 5, 60), Layer().sketches(half, 5, 60)
    alone = Layer(5, 60).sketches(half)
    assert torch.equal(together, again) and torch.equal(alone[0], together[1])


def test_what_waits_is_in_the_sketches_whenever_they_are_read(stage: None, half: torch.dtype) -> None:
    """As the self-test reads them: after every call."""
    where = Layer().segments(5, 60)
    engine, sums = GpuEngine(where, torch.zeros(3, SPEC.base_dim)), torch.zeros(3, SPEC.base_dim)
    counted = 0

    class Reads(Operators):
        def __getattribute__(self, name: str) -> object:
            nonlocal counted
            if not name.startswith("add_"):
                return getattr(engine, name)

            def read(*args: object) -> None:
                nonlocal counted
                getattr(engine, name)(*args)
                took = engine.settle().clone()
                assert took.any(), name
                sums.add_(took)
                engine.out.zero_()
                counted += 1

            return read

    Layer().run(Reads(where, engine.out), half)
    whole = Layer().sketches(half, 5, 60)
    assert counted == 12 and not engine.settle().any()
    torch.testing.assert_close(sums, whole, rtol=1e-5, atol=1e-3)


def test_a_gradient_that_changes_before_it_is_read_is_an_error(stage: None) -> None:
    """By a hook that came after ours, say: nothing else holds it."""
    engine = GpuEngine(Layer().segments(), torch.zeros(1, SPEC.base_dim))
    matrix = SlabMatrix(SPEC, "a.q.weight", 24, WIDTH, "linear")
    dy, x = torch.ones(BATCH, LENGTH, 24), torch.ones(BATCH, LENGTH, WIDTH)
    engine.add_linear(dy, engine.fold(x, matrix, SITE), matrix, SITE)
    dy.mul_(2)
    with pytest.raises(RuntimeError, match="outputs of a.q_proj was changed in place"):
        engine.settle()


def test_vectors_that_leave_in_several_launches_have_the_same_bits(
    stage: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many launches depends on the tokens of the batch. The vectors fall on the same numbers of the sketch."""
    from cropi_kernels.sketcher.sums import gpu_engine

    size, launches = 1024, []
    named = (plan_vector(SPEC, f"model.{i}.bias", size) for i in range(1000))
    plans = [plan for plan in named if int(plan.position.min()) == 5 * size][:6]
    dys = [torch.randn(1, 4, size, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    launch = GpuEngine._launch_tail

    def counted(self: GpuEngine, tail: gpu_engine.Tail, last: bool) -> None:
        launches.append(len(tail.plans))
        launch(self, tail, last)

    def sketches(room: int) -> torch.Tensor:
        monkeypatch.setattr(gpu_engine, "TAIL", room * size)
        engine = GpuEngine(
            Segments.of(torch.tensor([[0, 0, 0, 1]]), 1, 4, None), torch.zeros(2, SPEC.base_dim)
        )
        for dy, plan in zip(dys, plans):
            engine.add_bias(dy, plan, SITE)
        return engine.settle()

    monkeypatch.setattr(GpuEngine, "_launch_tail", counted)
    at_once, in_turns = sketches(12), sketches(6)  # two segments
    assert launches == [0, 6, 0, 3, 3] and torch.equal(at_once, in_turns)
    exact = torch.zeros(2, SPEC.base_dim, dtype=torch.float64)
    for dy, plan in zip(dys, plans):
        sums = torch.stack([dy[0, :3].double().sum(0), dy[0, 3].double()])
        sketch_vector(sums, plan, exact, backend="reference")
    torch.testing.assert_close(at_once.double(), exact, rtol=0, atol=30 * 2.0**-24 * float(exact.abs().max()))


@pytest.mark.parametrize(
    "adds, stays", [(False, False), (True, False), (True, True)], ids=["slots", "sums", "stay"]
)
def test_slabs_of_256_columns(adds: bool, stays: bool, stage: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches, of which each is added up at once, or both into the pass's sums."""
    from cropi_kernels.ops import _device_plan
    from cropi_kernels.ops.sketch_linear import triton as slab

    monkeypatch.setattr(slab, "takes_turns", lambda device: True)
    monkeypatch.setattr(slab, "WIDE_SUMS", adds)
    monkeypatch.setattr(slab, "A_STAYS", stays)
    monkeypatch.setattr(_device_plan, "cache", {})
    spec, where, reduced = SketchSpec(width=256), Layer().segments(60), 0
    engine = GpuEngine(where, torch.zeros(2, spec.base_dim))
    exact = Operators(where, torch.zeros(2, spec.base_dim, dtype=torch.float64))
    reduce = engine._reduce

    def counted(*args: object) -> None:
        nonlocal reduced
        reduced += 1
        reduce(*args)

    engine._reduce = counted
    gate, up, k, q = (SlabMatrix(spec, f"{n}.weight", 48, 272, "linear") for n in ("gate", "up", "k", "q"))
    for to, dtype in (engine, torch.bfloat16), (exact, torch.float64):
        x, hidden = (tensor(i, BATCH, LENGTH, 272).to(dtype) for i in range(2))
        mlp, kept = to.fold(hidden, gate, SITE), to.fold(x, q, SITE)
        for i, (matrix, folded) in enumerate(((up, mlp), (gate, mlp), (k, kept), (q, kept))):
            to.add_linear(tensor(i, BATCH, LENGTH, 48).to(dtype), folded, matrix, SITE)
    error = (engine.settle() - exact.settle()).abs()
    # Of each matrix 80 products up to 2 * 4, in any order; the fold of two features is exact.
    assert error.max() <= 4 * sum_error_bound(torch.tensor(80.0 * 8), 200) and exact.out.any(1).all()
    assert reduced == (1 if adds else 2)


def test_what_waits_together_does_not_depend_on_addresses(stage: None) -> None:
    """A gradient may lie where that of a matrix was, once its kernels are launched."""
    memory = torch.ones(BATCH, LENGTH, 24)
    engine = GpuEngine(Layer().segments(), torch.zeros(1, SPEC.base_dim))
    of_matrix, of_another = (plan_vector(SPEC, f"{name}.bias", 24) for name in "ab")
    kept = engine.fold(torch.ones(BATCH, LENGTH, WIDTH), SlabMatrix(SPEC, "q", 24, WIDTH, "linear"), SITE)
    for name in ("q", "k", "v"):
        dy = memory.view_as(memory)
        engine.add_linear(dy, kept, SlabMatrix(SPEC, name, 24, WIDTH, "linear"), SITE)
    engine.add_bias(dy, of_matrix, SITE)
    assert [one.plan for one in engine._biases] == [of_matrix]
    engine._biases[0].dy = memory.clone()
    del dy
    engine.add_bias(memory.view_as(memory), of_another, SITE)
    assert [one.plan for one in engine._biases] == [of_another]


def test_inputs_that_come_back_with_other_strides(stage: None, half: torch.dtype) -> None:
    """What autograd kept went through whatever hooks are set for saved tensors."""
    matrix = SlabMatrix(SPEC, "a.q.weight", 24, WIDTH, "linear")
    dy, x = (tensor(i, BATCH, LENGTH, n).to(half) for i, n in enumerate((24, WIDTH)))
    got = []
    for turned in (False, True):
        engine = GpuEngine(Layer().segments(60), torch.zeros(2, SPEC.base_dim))
        kept = engine.fold(x, matrix, SITE)
        engine.add_linear(dy, kept.t().contiguous().t() if turned else kept, matrix, SITE)
        got.append(engine.settle())
    torch.testing.assert_close(got[1], got[0], rtol=1e-5, atol=1e-3)


def test_only_whole_slabs_are_served(stage: None) -> None:
    assert GpuEngine.serves(torch.zeros(1, 32768)) and not GpuEngine.serves(torch.zeros(1, 4096))
    assert not GpuEngine.serves(torch.zeros(0, 32768))
    assert dispatch.choose("sketch_linear", torch.zeros(1)) == "triton", "the stage is not set"
