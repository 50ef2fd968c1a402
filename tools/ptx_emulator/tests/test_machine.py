"""The PTX machine runs kernels as a GPU does, and finds the mistakes that it is there to find."""

from __future__ import annotations

import struct

import pytest
import torch
from ptx_emulator.lanes import Divergent
from ptx_emulator.machine import launch
from ptx_emulator.memory import GlobalMemory, OutOfBounds, Race
from ptx_emulator.text import parse

HEADER = """
.version 8.7
.target sm_80
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel(.param .u64 x, .param .u64 y)
{
.reg .pred %p<4>; .reg .b16 %h<4>; .reg .b32 %r<16>; .reg .b64 %rd<16>;
ld.param.b64 %rd1, [x];
ld.param.b64 %rd2, [y];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
mov.b32 %r2, smem;
shl.b32 %r3, %r1, 2;
add.s32 %r4, %r2, %r3;      // this thread's word of shared memory
xor.b32 %r5, %r3, 128;
add.s32 %r6, %r2, %r5;      // another warp's
"""


def run(body: str, x: torch.Tensor, y: torch.Tensor, threads: int = 64, shared: int = 1024) -> None:
    program = parse(HEADER + body + "\nret;\n}\n")
    parameters = {n: struct.pack("Q", t.data_ptr()) for n, t in (("x", x), ("y", y))}
    launch(program, (1, 1, 1), threads, parameters, GlobalMemory([x, y]), shared)


@pytest.fixture
def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(64, dtype=torch.float32) - 20, torch.zeros(64)


Operands = tuple[torch.Tensor, torch.Tensor]


def test_bfloat16_is_compared_as_a_number(operands: Operands) -> None:
    """By its bits, every negative number would be above 0."""
    x, y = operands
    x[3] = float("nan")
    run(
        """
        ld.global.b32 %r7, [%rd4];
        cvt.rn.bf16.f32 %h1, %r7;
        mov.b16 %h2, 0;
        setp.lt.bf16 %p1, %h1, %h2;
        selp.f32 %r8, 0f3F800000, 0f00000000, %p1;
        st.global.b32 [%rd5], %r8;
        """,
        *operands,
    )
    assert torch.equal(y, (x < 0).float())


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_a_pair_is_compared_half_by_half(kind: str, operands: Operands) -> None:
    x, y = operands
    x[3] = float("nan")
    run(
        f"""
        ld.global.b32 %r7, [%rd4];
        neg.f32 %r8, %r7;
        cvt.rn.{kind}.f32 %r9, %r8, %r7;   // the first in the upper half
        mov.b32 %r10, 0;
        setp.lt.{kind} %p1|%p2, %r9, %r10;
        selp.f32 %r11, 0f3F800000, 0f00000000, %p1;
        selp.f32 %r12, 0f40000000, 0f00000000, %p2;
        add.f32 %r13, %r11, %r12;
        st.global.b32 [%rd5], %r13;
        """,
        x,
        y,
    )
    assert torch.equal(y, (x < 0).float() + 2 * (-x < 0))


def test_lanes_part_and_meet_again(operands: Operands) -> None:
    x, y = operands
    run(
        """
        ld.global.b32 %r7, [%rd4];
        setp.lt.f32 %p1, %r7, 0f00000000;
        @%p1 bra $NEGATIVE;
        mul.f32 %r7, %r7, 0f40000000;
        bra $DONE;
    $NEGATIVE:
        neg.f32 %r7, %r7;
    $DONE:
        shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;
        add.f32 %r7, %r7, %r8;
        st.global.b32 [%rd5], %r7;
        """,
        x,
        y,
    )
    one = torch.where(x < 0, -x, 2 * x).view(-1, 2)
    assert torch.equal(y.view(-1, 2), one + one.flip(1))


def test_a_loop_with_its_own_count_per_lane(operands: Operands) -> None:
    x, y = operands
    run(
        """
        mov.b32 %r7, 0;
    $AGAIN:
        add.s32 %r7, %r7, 1;
        setp.le.s32 %p1, %r7, %r1;
        @%p1 bra $AGAIN;
        cvt.rn.f32.s32 %r8, %r7;
        st.global.b32 [%rd5], %r8;
        """,
        x,
        y,
    )
    assert torch.equal(y, torch.arange(64) + 1.0)


EXCHANGE = """
ld.global.b32 %r7, [%rd4];
st.shared.b32 [%r4], %r7;
{}
ld.shared.b32 %r8, [%r6];
st.global.b32 [%rd5], %r8;
"""
COPY = """
cp.async.ca.shared.global [%r4], [%rd4], 0x4;
cp.async.commit_group;
{}
bar.sync 0;
ld.shared.b32 %r8, [%r6];
st.global.b32 [%rd5], %r8;
"""


@pytest.mark.parametrize("body,between", [(EXCHANGE, "bar.sync 0;"), (COPY, "cp.async.wait_group 0;")])
def test_warps_exchange_through_shared_memory(body: str, between: str, operands: Operands) -> None:
    x, y = operands
    run(body.format(between), x, y)
    assert torch.equal(y, x.view(2, 32).flip(0).flatten())
    with pytest.raises(Race):
        run(body.format(""), x, y)


def test_copies_of_a_later_group_are_not_there_yet(operands: Operands) -> None:
    with pytest.raises(Race, match="not delivered"):
        run(COPY.format("cp.async.wait_group 1;"), *operands)


@pytest.mark.parametrize(
    "body,message",
    [
        ("ld.shared.b32 %r8, [%r6]; st.shared.b32 [%r4], %r8;", "others have read"),
        ("st.shared.b32 [%r4], %r1; st.shared.b32 [%r6], %r1;", "another warp wrote"),
        ("st.shared.b32 [smem], %r1;", "different values"),
        ("ld.shared.b32 %r8, [%r6]; cp.async.ca.shared.global [%r4], [%rd4], 0x4;", "others have read"),
        # All read one word at once, and a thread of the last warp writes it.
        (
            "ld.shared.b32 %r8, [smem]; setp.eq.u32 %p1, %r1, 63; @%p1 st.shared.b32 [smem], %r1;",
            "others have read",
        ),
    ],
)
def test_races_in_shared_memory(body: str, message: str, operands: Operands) -> None:
    with pytest.raises(Race, match=message):
        run(body, *operands)


@pytest.mark.parametrize(
    "body",
    [
        "ld.global.b32 %r7, [%rd4+4];",  # the last lane's is past the end
        "ld.global.b32 %r7, [%rd4+-4];",
        "st.global.b32 [%rd5+4], %r1;",
        "ld.global.b32 %r7, [%rd1+2];",  # not aligned, as the next
        "ld.shared.b64 %rd6, [%r4];",
        "st.shared.b32 [%r4+800], %r1;",
        "mov.b64 %rd6, 64; ld.global.b32 %r7, [%rd6];",
    ],
)
def test_accesses_outside_of_the_operands(body: str, operands: Operands) -> None:
    with pytest.raises(OutOfBounds):
        run(body, *operands)


def test_shared_memory_begins_as_nan(operands: Operands) -> None:
    x, y = operands
    run("ld.shared.b32 %r8, [%r4]; st.global.b32 [%rd5], %r8;", x, y)
    assert y.isnan().all()


PHASES = """
add.s32 %r10, %r2, 512;     // an mbarrier, at which 32 threads arrive
setp.eq.s32 %p1, %r1, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r10], 32;
barrier.sync 1;
setp.lt.u32 %p2, %r1, 32;
@!%p2 bra $AGAIN;
{copy}
bar.sync 2, 32;             // of this warp alone
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r10];
bra $END;
$AGAIN:
{wait}
ld.shared.b32 %r8, [%r6];   // what the first warp has brought
st.global.b32 [%rd5], %r8;
$END:
"""
WAIT = "mbarrier.try_wait.parity.shared.b64 %p3, [%r10], {}; @!%p3 bra $AGAIN;"
BRING = "cp.async.ca.shared.global [%r4], [%rd4], 0x4;"


def test_warps_wait_for_a_phase(operands: Operands) -> None:
    x, y = operands
    run(PHASES.format(wait=WAIT.format(0), copy=BRING), x, y)
    assert torch.equal(y[32:], x[:32]) and not y[:32].any()
    for wait in ("", WAIT.format(1)):  # the phase before the first has ended
        with pytest.raises(Race, match="not delivered"):
            run(PHASES.format(wait=wait, copy=BRING), x, y)
    for was, now in (("{copy}", "bra $END;"), ("bar.sync 2, 32", "bar.sync 2, 64")):
        with pytest.raises(Divergent, match="others never reach"):
            run(PHASES.replace(was, now).format(wait=WAIT.format(0), copy=BRING), x, y)


def test_what_needs_a_whole_warp_says_so(operands: Operands) -> None:
    shuffle = "@%p1 shfl.sync.bfly.b32 %r8, %r1, 1, 31, -1;"
    run("setp.lt.u32 %p1, %r1, 32;" + shuffle, *operands)
    with pytest.raises(Divergent, match="part of a warp"):
        run("setp.lt.u32 %p1, %r1, 7;" + shuffle, *operands)


@pytest.mark.parametrize("apart", [2, 0])
def test_two_warps_may_write_the_halves_of_a_word(apart: int, operands: Operands) -> None:
    """A place of shared memory is no larger than the smallest access of a program, here 2 bytes."""
    body = f"""
        shr.u32 %r7, %r1, 5;
        cvt.u16.u32 %h1, %r7;
        mul.lo.s32 %r8, %r7, {apart};
        add.s32 %r8, %r2, %r8;
        st.shared.b16 [%r8], %h1;
        bar.sync 0;
        ld.shared.b32 %r9, [smem];
        st.global.b32 [%rd5], %r9;
        """
    if apart:
        run(body, *operands)
        assert (operands[1].view(torch.int32) == 1 << 16).all()
    else:
        with pytest.raises(Race, match="different values to the same byte"):
            run(body, *operands)


@pytest.mark.parametrize("first, last", [(0, 63), (1, 63), (0, 62), (7, 40)])
def test_registers_of_other_lanes_stay(first: int, last: int, operands: Operands) -> None:
    """Lanes branch around what some do, and among those a guard leaves out every one whose number is odd."""
    run(
        f"""
        mov.b32 %r7, 5;
        setp.lt.u32 %p1, %r1, {first};
        setp.gt.u32 %p2, %r1, {last};
        @%p1 bra $DONE;
        @%p2 bra $DONE;
        and.b32 %r8, %r1, 1;
        setp.eq.u32 %p3, %r8, 0;
        mov.b32 %r7, 6;
        @%p3 lop3.b32 %r7, %r1, %r1, %r1, 0x80;
    $DONE:
        cvt.rn.f32.u32 %r9, %r7;
        st.global.b32 [%rd5], %r9;
        """,
        *operands,
    )
    lane = torch.arange(64)
    want = torch.where(lane % 2 == 0, lane, 6)
    assert torch.equal(operands[1].long(), torch.where((lane >= first) & (lane <= last), want, 5))
