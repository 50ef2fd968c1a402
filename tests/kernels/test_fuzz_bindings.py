"""Random calls of every op on a CPU, right ones and spoilt ones: a right result, or an error in words, nothing else.

Operands lie between forbidden pages, so that a byte too many ends the process. They hold small integers: sums are exact
in float32, and results must be those of the float64 reference to the bit, where an op only adds.
"""

from __future__ import annotations

import dataclasses
import random
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import fuzz
from support.fixtures import LEVELS
from support.guarded import Arena

import cropi_kernels as ck
from cropi_kernels import ProjectionSpec, SketchSpec, _native, plan_matrix, plan_vector

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mprotect through Linux's libc")

CALLS = 10_000
HALF = [torch.float32, torch.bfloat16, torch.float16]
# What an error may say beside a ValueError's words: which kernel cannot serve the call, and where a tensor lies.
IN_WORDS = re.compile(
    r"cannot run|no kernel of|sparse rows are projected on the CPU|can't allocate memory|size calculation overflowed"
)
PLANS = [
    (plan_matrix(SketchSpec(dim=dim, width=width, vocab_width=16), f"a.b.{role}", rows, cols, role), role)  # type: ignore[arg-type]
    for dim in (1024, 65536)
    for width, rows, cols in ((16, 20, 40), (16, 33, 7), (None, 5, 300), (64, 130, 129), (16, 1, 1))
    for role in ("linear", "tied", "embedding")
]
VECTORS = [plan_vector(SketchSpec(dim=dim), "n.weight", n) for dim in (64, 65536) for n in (1, 7, 576)]
SPECS = [
    ProjectionSpec(dim, kind=kind, nnz=nnz, keep=keep)  # type: ignore[arg-type]
    for dim, kind, nnz, keep in (
        (64, "countsketch", 1, 1.0), (7, "countsketch", 1, 1.0), (1000, "countsketch", 1, 0.25),
        (64, "sjlt", 4, 1.0), (20, "sjlt", 4, 1.0), (130, "rademacher", 1, 1.0), (5, "gaussian", 1, 0.5),
    )
]  # fmt: skip
Args = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """``run(backend, args)``; ``exact``: the result is a sum of integers, and of nothing else."""

    name: str
    args: Args
    run: Callable[[str | None, Args], Any]
    exact: bool


class Maker:
    """Calls with arguments that fit."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.generator = rng, torch.Generator().manual_seed(rng.getrandbits(32))

    def whole(self, *shape: int, dtype: torch.dtype = torch.float32, most: int = 3) -> torch.Tensor:
        return torch.randint(-most, most + 1, shape, generator=self.generator).to(dtype)

    def sums(self, *shape: int) -> torch.Tensor:
        """What a call adds to: numbers that are quickly made."""
        return torch.zeros(shape).fill_(self.rng.randint(-3, 3))

    def half(self) -> torch.dtype:
        return self.rng.choice(HALF)

    def offsets(self, tokens: int, ranges: int) -> torch.Tensor:
        inner = sorted(self.rng.randint(0, tokens) for _ in range(ranges - 1))
        return torch.tensor([0, *inner, tokens] if ranges else [0])

    def any(self) -> Call:
        return self.rng.choice(MAKERS)(self)

    # ------------------------------------------------------------------------------------------ one op each
    def linear(self) -> Call:
        plan, role = self.rng.choice([p for p in PLANS if p[1] != "embedding"])
        n, s = self.rng.randint(0, 40), self.rng.randint(1, 3)
        args = dict(
            d=self.whole(n, plan.rows, dtype=self.half()), a=self.whole(n, plan.cols, dtype=self.half(), most=1),
            offsets=self.offsets(n, s), out=self.sums(s, plan.n_slabs * 32768),
        )  # fmt: skip

        def run(b: str | None, k: Args) -> Any:
            return ck.sketch_linear(k["d"], k["a"], k["offsets"], plan, k["out"], backend=b)

        return Call("sketch_linear", args, run, True)

    def grouped(self) -> Call:
        plan = self.rng.choice([p for p, role in PLANS if role == "linear"])
        groups = self.rng.choice([g for g in (1, 2, 3, 5) if plan.rows >= g])
        rows = self.rng.randint(1, plan.rows // groups)
        first = self.rng.randint(0, plan.rows - groups * rows)
        n, s = self.rng.randint(0, 40), self.rng.randint(1, 3)
        args = dict(
            d=self.whole(n, rows, dtype=self.half()), a=self.whole(n, plan.cols, dtype=self.half(), most=1),
            offsets=self.offsets(n, groups * s), out=self.sums(s, plan.n_slabs * 32768), first_row=first, row_step=rows,
        )  # fmt: skip

        def run(b: str | None, k: Args) -> torch.Tensor:
            more = dict(first_row=k["first_row"], row_step=k["row_step"], backend=b)
            return ck.sketch_grouped(k["d"], k["a"], k["offsets"], plan, k["out"], **more)

        return Call("sketch_grouped", args, run, True)

    def embedding(self) -> Call:
        plan, _ = self.rng.choice(PLANS)
        n, s = self.rng.randint(0, 40), self.rng.randint(1, 3)
        rows = torch.tensor([self.rng.randrange(plan.rows) for _ in range(n)], dtype=torch.int64)
        args = dict(
            x=self.whole(n, plan.cols, dtype=self.half(), most=1), rows=rows, offsets=self.offsets(n, s),
            out=self.sums(s, plan.n_slabs * 32768),
        )  # fmt: skip

        def run(b: str | None, k: Args) -> Any:
            return ck.sketch_embedding(k["x"], k["rows"], k["offsets"], plan, k["out"], backend=b)

        return Call("sketch_embedding", args, run, True)

    def vector(self) -> Call:
        plan = self.rng.choice(VECTORS)
        s = self.rng.randint(0, 3)
        args = dict(gradient=self.whole(s, plan.size), out=self.sums(s, plan.dim))
        return Call(
            "sketch_vector",
            args,
            lambda b, k: ck.sketch_vector(k["gradient"], plan, k["out"], backend=b),
            True,
        )

    def fold(self) -> Call:
        plan, _ = self.rng.choice(PLANS)
        outputs = self.rng.random() < 0.5
        fold, cols = (ck.fold_outputs, plan.rows) if outputs else (ck.fold_inputs, plan.cols)
        args = dict(x=self.whole(self.rng.randint(0, 40), cols, dtype=self.half(), most=1))
        return Call(fold.__name__, args, lambda b, k: fold(k["x"], plan, backend=b), True)

    def norm(self) -> Call:
        n, s, cols = self.rng.randint(0, 40), self.rng.randint(1, 3), self.rng.choice([1, 7, 8, 33, 300])
        centered = self.rng.random() < 0.5
        args = dict(
            x=self.whole(n, cols, dtype=self.half()),
            dy=self.whole(n, cols, dtype=self.half()),
            offsets=self.offsets(n, s),
        )
        more = dict(centered=centered, with_bias=self.rng.random() < 0.5)

        def run(b: str | None, k: Args) -> Any:
            return ck.norm_grad(k["x"], k["dy"], k["offsets"], 1e-3, **more, backend=b)

        return Call("norm_grad", args, run, False)

    def rms(self) -> Call:
        n, s, cols = self.rng.randint(0, 40), self.rng.randint(1, 3), self.rng.choice([1, 7, 8, 33, 300])
        dtype = self.half()
        args = dict(x=self.whole(n, cols, dtype=dtype), weight=self.whole(cols, dtype=dtype))
        if self.rng.random() < 0.5:
            return Call(
                "rms_norm", args, lambda b, k: ck.rms_norm(k["x"], k["weight"], 1e-3, backend=b), False
            )
        args |= dict(dy=self.whole(n, cols, dtype=dtype), scale=torch.rand(n), offsets=self.offsets(n, s))

        def run(b: str | None, k: Args) -> Any:
            return ck.rms_norm_backward(k["dy"], k["x"], k["weight"], k["scale"], k["offsets"], backend=b)

        return Call("rms_norm_backward", args, run, False)

    def gate(self) -> Call:
        plan, _ = self.rng.choice([one for one in PLANS if one[0].col_fold is not None])
        n, dtype, folds = self.rng.randint(0, 40), self.half(), self.rng.random() < 0.5
        cols = plan.cols if folds else self.rng.choice([1, 7, 8, 33, 300])
        args = {name: self.whole(n, cols, dtype=dtype, most=1) for name in ("dh", "gate", "up")}
        if self.rng.random() < 0.5:
            return Call(
                "swiglu_backward",
                args,
                lambda b, k: ck.swiglu_backward(k["dh"], k["gate"], k["up"], backend=b),
                False,
            )
        del args["dh"]
        made = plan if folds else None
        return Call("swiglu", args, lambda b, k: ck.swiglu(k["gate"], k["up"], made, backend=b), False)

    def bias(self) -> Call:
        n, s, cols = self.rng.randint(0, 40), self.rng.randint(0, 3), self.rng.choice([1, 7, 8, 33, 300])
        args = dict(
            dy=self.whole(n if s else 0, cols, dtype=self.half()), offsets=self.offsets(n if s else 0, s)
        )
        return Call("bias_grad", args, lambda b, k: ck.bias_grad(k["dy"], k["offsets"], backend=b), True)

    def logprob(self) -> Call:
        n, cols, vocab = (
            self.rng.randint(0, 20),
            self.rng.choice([1, 8, 33]),
            self.rng.choice([1, 7, 64, 300]),
        )
        dtype, fused = self.half(), self.rng.random() < 0.5
        words = [self.rng.choice([-100, self.rng.randrange(vocab)]) for _ in range(n)]
        targets = torch.tensor(words, dtype=torch.int64)
        args = dict(
            hidden=self.whole(n, cols, dtype=dtype, most=1), head=self.whole(vocab, cols, dtype=dtype, most=1),
            targets=targets, bias=self.whole(vocab, dtype=dtype), temperature=0.7,
            chunk_size=self.rng.choice([None, 1, 5]),
        )  # fmt: skip

        def run(b: str | None, k: Args) -> Any:
            more = dict(bias=k["bias"], temperature=k["temperature"], chunk_size=k["chunk_size"], backend=b)
            if fused:
                return ck.logprob_and_grad(
                    k["hidden"], k["head"], k["targets"], lambda p, i, j: torch.ones_like(p), **more
                )[:2]
            return ck.linear_logprob(k["hidden"], k["head"], k["targets"], return_entropy=True, **more)

        return Call("logprob_and_grad" if fused else "linear_logprob", args, run, False)

    def project(self) -> Call:
        spec, b, n = (
            self.rng.choice(SPECS),
            self.rng.randint(0, 3),
            self.rng.choice([0, 1, 5, 127, 129, 700, 3000]),
        )
        offset, mode = (
            self.rng.choice([0, 3, 128, 2**31 - 5, 2**40 + 1]),
            self.rng.choice(["new", "out", "adjoint"]),
        )
        exact = spec.sparse and spec.keep in (1.0, 0.25) and mode != "adjoint"
        if mode == "adjoint":
            args: Args = dict(y=self.whole(b, spec.dim, dtype=self.half()), n=min(n, 300), offset=offset)

            def run(b: str | None, k: Args) -> Any:
                return ck.project_transpose(k["y"], spec, k["n"], k["offset"], backend=b)

            return Call("project_transpose", args, run, exact)
        args = dict(x=self.whole(b, n, dtype=self.half()), offset=offset)
        if mode == "out":
            args["out"] = self.sums(b, spec.dim)

        def project(b: str | None, k: Args) -> torch.Tensor:
            return ck.project(k["x"], spec, k["offset"], out=k.get("out"), nonfinite="ignore", backend=b)

        return Call("project", args, project, exact)

    def csr(self) -> Call:
        spec, rows, width = self.rng.choice([s for s in SPECS if s.sparse]), self.rng.randint(0, 4), 500
        index = self.rng.choice([torch.int32, torch.int64])
        values = self.rng.randint(0, 60) if rows else 0
        args = dict(
            starts=self.offsets(values, rows).to(index),
            columns=torch.tensor([self.rng.randrange(width) for _ in range(values)], dtype=index),
            values=self.whole(values, dtype=self.rng.choice([torch.float32, torch.float64])), width=width, offset=3,
        )  # fmt: skip
        sparse = self.rng.random() < 0.5

        def run(b: str | None, k: Args) -> Any:
            x = ck.CsrRows(k["starts"], k["columns"], k["values"], k["width"])
            if not sparse:
                return ck.project_csr(x, spec, k["offset"], nonfinite="ignore", backend=b)
            got = ck.project_csr_sparse(x, spec, k["offset"], nonfinite="ignore", backend=b)
            dense = torch.zeros(len(got.starts) - 1, spec.dim, dtype=got.values.dtype)
            row = torch.repeat_interleave(torch.arange(len(got.starts) - 1), got.starts.diff().long())
            return dense.index_put_((row, got.columns.long()), got.values, accumulate=True)

        return Call("project_csr", args, run, True)


MAKERS: list[Callable[[Maker], Call]] = [
    Maker.linear, Maker.grouped, Maker.embedding, Maker.vector, Maker.fold, Maker.norm, Maker.rms, Maker.gate,
    Maker.bias, Maker.logprob, Maker.project, Maker.csr,
]  # fmt: skip


# ---------------------------------------------------------------------------------------------- spoiling
def odd_address(x: torch.Tensor) -> torch.Tensor:
    raw = bytearray(x.numel() * x.element_size() + 1)
    return (
        x
        if x.numel() == 0
        else torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape).copy_(x)
    )


HARMLESS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]] if x.ndim > 1 else x,
    lambda x: torch.stack([x, x], -1)[..., 0] if x.ndim > 1 else x,
    lambda x: odd_address(x.contiguous()),
    lambda x: torch.nn.Parameter(x, requires_grad=False) if x.is_floating_point() else x,
]
SPOIL: list[Callable[[torch.Tensor], Any]] = [
    lambda x: x.int(), lambda x: x.double(), lambda x: x.bool(), lambda x: x.to(torch.complex64), lambda x: x[None],
    lambda x: x.flatten(), lambda x: x[:-1], lambda x: x[..., :-1], lambda x: torch.cat([x, x]), lambda x: x[:0],
    lambda x: x * 0 - 1, lambda x: x + (1 << 40) if x.dtype == torch.int64 else x / 0, lambda x: x.flip(0),
    lambda x: x.to("meta"), lambda x: x.to_sparse(), lambda x: x.to(torch.float8_e4m3fn),
    lambda x: x.float().requires_grad_(), lambda x: x[:1].expand(x.shape) if len(x) else x,
]  # fmt: skip
NUMBERS = [
    -1,
    0,
    1,
    7,
    2**31,
    2**32 + 1,
    2**62,
    2**63 - 1,
    2**64,
    -(2**63),
    True,
    1.5,
    float("nan"),
    "3",
    None,
]


def spoilt(call: Call, rng: random.Random) -> Args:
    args = dict(call.args)
    name = rng.choice(list(args))
    if isinstance(args[name], torch.Tensor):
        args[name] = rng.choice(SPOIL)(args[name])
    else:  # a result of 2^31 columns is a right one, and takes minutes and gigabytes
        args[name] = rng.choice([n for n in NUMBERS if name != "n" or n not in (2**31, 2**32 + 1)])
    return args


def moved(args: Args, rng: random.Random, arenas: list[Arena]) -> Args:
    """Fresh copies of the tensors, some with other strides, each between forbidden pages."""
    result = dict(args)
    for arena, (name, x) in zip(arenas, args.items()):
        if not isinstance(x, torch.Tensor):
            continue
        result[name] = arena.place(x, at_end=rng.random() < 0.5)
        if name not in ("out", "offsets") and rng.random() < 0.1:
            result[name] = rng.choice(HARMLESS)(x)
    return result


def values(result: Any) -> list[torch.Tensor]:
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [x.detach().double() for x in parts if x is not None]


def check(call: Call, got: Any) -> None:
    """Against the reference on the same numbers in float64."""
    wide = {
        k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.args.items()
    }
    for x, y in zip(values(got), values(call.run("reference", wide)), strict=True):
        if call.exact:
            assert torch.equal(x, y), (
                f"{call.name}: differs from the reference by {float((x - y).abs().max())}"
            )
        else:
            assert torch.allclose(x, y, rtol=2e-2, atol=2e-2), (
                f"{call.name}: {float((x - y).abs().max())} off"
            )


def one(rng: random.Random, arenas: list[Arena]) -> bool:
    """One call; whether it gave a result."""
    call = Maker(rng).any()
    _native.native().set_level(rng.choice(LEVELS))
    if (threads := 2 if rng.random() < 0.002 else 1) != torch.get_num_threads():
        torch.set_num_threads(threads)  # which starts threads anew
    if rng.random() < 0.4:
        try:
            args = spoilt(call, rng)
        except (RuntimeError, NotImplementedError):  # torch cannot spoil it so
            return False
        try:
            call.run(rng.choice([None, "cpu"]), args)
            return True  # not every change is a fault
        except ValueError as error:
            assert 10 < len(str(error)) < 600
        except RuntimeError as error:
            assert IN_WORDS.search(str(error)), f"{call.name}: {error}"
        return False
    got = call.run("cpu", moved(call.args, rng, arenas))
    if rng.random() < 0.05:
        check(call, got)
    return True


@pytest.mark.slow
def test_fuzz_of_every_op() -> None:
    arenas, level = [Arena(1 << 21) for _ in range(6)], _native.native().current_level()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ends = fuzz.run(CALLS, lambda rng: one(rng, arenas))
    finally:
        _native.native().set_level(level)
    assert fuzz.repeats() or ends[True] > 0.55 * ends.total(), "most calls must be served"
