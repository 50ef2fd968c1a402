"""Gates that need no GPU: registers, spills, shared memory, tensor cores, vector loads, 64-bit addresses."""

from __future__ import annotations

import functools
import os
import re

import pytest
import triton
from aot_cases import Case, all_cases, slab
from aot_compile import PRODUCTS, SHARED_LIMIT, Compiled, compile_for, unfenced_products

from cropi_kernels import _triton

# `make test` compiles what it runs in the emulator: all for sm_90, and for sm_80 products, whose tiles are of another
# size there. Of the others it compiles what is most likely to be too large for them; the rest, `make test-gpu-aot`.
SAMPLE = ("slab bfloat16 256 slots", "slab bfloat16 64 sums")
PRODUCT = ("slab", "grouped", "embedding")
EVERYTHING = os.environ.get("CROPI_AOT") == "all"
CASES = {
    (capability, case.name): case
    for capability in SHARED_LIMIT
    for case in all_cases(capability)
    if EVERYTHING
    or capability == 90
    or capability == 80
    and case.name.startswith(PRODUCT)
    or capability != 89
    and case.name in SAMPLE
    # What this Triton serves there.
    if _triton.fence_reason(divmod(capability, 10), triton.__version__) is None
}
# Bytes of a thread's stack. There ptxas keeps to a number of registers with which one more program fits on a
# multiprocessor: embeddings to 128 (156 without a spill, one program of eight warps instead of two), with nine spills;
# slabs of 128 columns to 128, where they add to the sums at the end. Of log-probs by turns, two groups share the
# registers; the spills are at the end of a tile. With 3.6.0 alone: what combines tiles keeps one number, so that eight
# programs fit, and slabs with tiles of A that stay keep two where the pair changes. A program of 16 warps, for rows of
# 8192 numbers of float32, has all the registers that there are.
SPILLED = {
    (90, "slab bfloat16 128 sums"): 8,
    (100, "slab bfloat16 128 sums"): 48,
    (100, "embedding bfloat16"): 24,
    (120, "rms-backward float32 8192"): 16,
    (90, "turns bfloat16 entropy"): 16,
    (90, "log-prob of tiles"): 8,
    (90, "slab turns bfloat16 256 slots signs stay"): 8,
}
# More registers than elsewhere: of the slab, as many programs fit on a multiprocessor all the same; of the others four
# instead of five.
REGISTERS = {(120, "slab bfloat16 128 sums"): 198} | {
    (120, f"project gather by runs{kind}"): 50 for kind in (" bfloat16", " float16", ", kept bfloat16")
}


@functools.cache
def build(capability: int, name: str) -> Compiled:
    case = CASES[capability, name]
    return compile_for(case.kernel, capability, case.types, case.constants, case.aligned, **case.options)


@pytest.mark.parametrize("capability,name", CASES, ids=[f"sm_{c}-{n}" for c, n in CASES])
def test_kernel_fits(capability: int, name: str) -> None:
    case, got = CASES[capability, name], build(capability, name)
    print(
        f"sm_{capability} {name}: {got.registers} registers, {got.shared} B shared, {dict(got.opcodes.most_common(6))}"
    )
    stack = SPILLED.get((capability, name), 0)
    assert got.stack <= stack and (got.spills == 0 or stack), f"{got.spills} spills, stack of {got.stack} B"
    assert got.registers <= REGISTERS.get((capability, name), case.registers)
    assert got.registers * 32 * case.options["num_warps"] <= 65536
    assert got.shared <= SHARED_LIMIT[capability]
    if case.tensor_cores:
        assert got.opcodes[PRODUCTS[capability]] > 0
    elif "float32" in case.name:
        assert "tf32" not in got.ptx and not any(got.opcodes[name] for name in PRODUCTS.values()), (
            "sums of rounded numbers"
        )
    if case.name.startswith(("slab", "grouped")) and "anywhere" not in case.name:
        assert got.opcodes["LDGSTS"] >= 4, "operands must arrive by asynchronous copies"
    offsets_in_32_bits(case, got.first)


@pytest.mark.parametrize(
    "name", [n for c, n in CASES if c == 90 and n.startswith("slab") and "float32" not in n]
)
def test_products_are_not_waited_for_one_by_one(name: str) -> None:
    """Where ptxas cannot follow the accumulator, it begins and awaits each product by itself: two more instructions."""
    opcodes = build(90, name).opcodes
    assert 0 < opcodes["WARPGROUP"] <= opcodes["HGMMA"], opcodes


# Tiles arrive by the copy engine, which writes as the products read.
@pytest.mark.parametrize(
    "name",
    [n for c, n in CASES if c == 90 and CASES[c, n].tensor_cores and "tiles" not in n and "turns" not in n],
)
def test_copies_are_fenced_from_products(name: str) -> None:
    """What this Triton compiles is what the package says of it: fenced, or refused where it is known to matter."""
    ptx = build(90, name).ptx
    assert "wgmma.mma_async" in ptx and "cp.async.wait" in ptx, "the check would see nothing"
    fenced = unfenced_products(ptx) == 0
    assert fenced or _triton.release(triton.__version__) < _triton.FENCED


@pytest.mark.parametrize("name", [n for c, n in CASES if n.startswith("slab turns")])
def test_copies_that_another_warp_makes_are_fenced(name: str) -> None:
    ptx = build(90, name).ptx
    assert "wgmma.mma_async" in ptx and "mbarrier.try_wait" in ptx, "the check would see nothing"
    assert unfenced_products(ptx, "mbarrier.try_wait") == 0


def test_this_release_takes_turns() -> None:
    """A newer Triton falls back to kernels that are slower: `TURNS` is to be raised where the cases compile."""
    assert _triton.gluon_is_known(), triton.__version__


def test_the_check_sees_a_missing_fence() -> None:
    loop = "$L:\n\tcp.async.wait_group 2;\n\tbar.sync 0;\n{}\twgmma.mma_async.sync.aligned.m64n64k16 {{}};\n\tbra L;\n"
    assert unfenced_products(loop.format("")) == 1
    assert unfenced_products(loop.format("\tfence.proxy.async.shared::cta;\n")) == 0


# Products of two run-time numbers that may be 32 bits wide: a pair's index, the loop's length; a column below `cols`;
# an entry's index; the number of tiles.
NARROW_PRODUCTS = {"slab": 2, "fold": 6, "swiglu-fold": 1, "grouped": 1, "turns": 1}


def offsets_in_32_bits(case: Case, ttir: str) -> None:
    """Tokens times a stride passes 2^31: every product of two run-time numbers must be 64 bits wide, or be known here.

    Reads the compiler's first form, where an index that Triton took for i32 still shows as such.
    """
    constants = set(re.findall(r"(%[\w.#-]+) = arith\.constant", ttir))
    origin = dict(re.findall(r"(%[\w.#-]+) = tt\.(?:splat|broadcast|expand_dims) (%[\w.#-]+)", ttir))

    def constant(value: str) -> bool:
        while value in origin:
            value = origin[value]
        return value in constants

    products = re.findall(r"arith\.muli (%[\w.#-]+), (%[\w.#-]+) : (?:tensor<[\dx]+x)?i32\b", ttir)
    narrow = [pair for pair in products if not any(map(constant, pair))]
    assert len(narrow) <= NARROW_PRODUCTS.get(case.name.split()[0], 0), (
        f"32-bit products in {case.name}: {narrow}"
    )


def test_the_audit_sees_a_32_bit_address() -> None:
    ttir = (
        "%c = arith.constant 4 : i32\n%a = arith.muli %x, %c : i32\n%b = arith.muli %x, %y : tensor<16x1xi32>"
    )
    with pytest.raises(AssertionError, match="32-bit products"):
        offsets_in_32_bits(CASES[90, "reduce"], ttir)


def test_misaligned_operands_compile_too() -> None:
    """Rows that start anywhere: no vector loads, but no error and no wrong answer."""
    case = slab("bfloat16", 64, 90)
    build = functools.partial(compile_for, case.kernel, 90, case.types, case.constants, **case.options)
    # A layer whose outputs are no multiple of 16; folded inputs are one always.
    outputs, both = build(aligned=("cols", "stride_a", "padded_rows")), build(aligned=())
    assert outputs.stack == outputs.spills == 0
    # Each number has an address of its own, for which the 128 registers that let two programs share a multiprocessor do
    # not suffice. What such rows wait for are their loads, eight times as many. Triton 3.9 keeps every token's place in
    # the inputs over the loop. Made in the loop, no release would spill more than 16 bytes, and the loop of aligned
    # operands of 256 columns would have 7 % more instructions.
    assert both.stack <= (80 if _triton.installed() < (3, 9) else 440)
    assert max(outputs.shared, both.shared) <= SHARED_LIMIT[90]
