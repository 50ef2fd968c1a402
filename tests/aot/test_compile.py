"""Gates that need no GPU: registers, spills, shared memory, tensor cores, vector loads, 64-bit addresses."""

from __future__ import annotations

import functools
import re

import pytest
from aot_cases import Case, all_cases, slab
from aot_compile import SHARED_LIMIT, Compiled, compile_for

CASES = {(capability, case.name): case for capability in SHARED_LIMIT for case in all_cases(capability)}


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
    assert got.spills == 0 and got.stack == 0, f"{got.spills} spills, stack of {got.stack} B"
    assert got.registers <= case.registers
    assert got.registers * 32 * case.options["num_warps"] <= 65536
    assert got.shared <= SHARED_LIMIT[capability]
    if case.tensor_cores:
        assert got.opcodes["HGMMA" if capability >= 90 else "HMMA"] > 0
    if case.name.startswith("slab"):
        assert got.opcodes["LDGSTS"] >= 6, "operands must arrive by asynchronous copies"
    offsets_in_32_bits(case, got.ttir)


def offsets_in_32_bits(case: Case, ttir: str) -> None:
    """No product of run-time numbers may be 32 bits wide where it becomes an address: T x V passes 2^31.

    In the compiler's first form every multiplication of two values that are not constants must be of i64, unless its
    result is a number of blocks (it feeds no address), which the slab kernel's loop length is.
    """
    constants = set(re.findall(r"(%[\w.#-]+) = arith\.constant", ttir))
    splat_of = dict(re.findall(r"(%[\w.#-]+) = tt\.splat (%[\w.#-]+)", ttir))
    pattern = re.compile(r"(%[\w.#-]+) = arith\.muli (%[\w.#-]+), (%[\w.#-]+)[^:]*: (?:tensor<[^>]*x)?(i32)")
    for result, left, right, _ in pattern.findall(ttir):
        operands = {splat_of.get(x, x) for x in (left, right)}
        if operands & constants or {left, right} & constants:
            continue
        users = re.findall(rf"tt\.addptr [^\n]*{re.escape(result)}\b", ttir)
        assert not users and case.name.startswith(("slab", "fold")), f"32-bit product {result} in {case.name}"


def test_the_audit_sees_a_32_bit_address() -> None:
    ttir = "%a = arith.muli %x, %y : i32\n%b = tt.addptr %p, %a : !tt.ptr<f32>, i32"
    with pytest.raises(AssertionError, match="32-bit"):
        offsets_in_32_bits(CASES[90, "reduce"], ttir)


def test_misaligned_operands_compile_too() -> None:
    """Rows that start anywhere: no vector loads, but no error and no wrong answer."""
    case = slab("bfloat16", 64, 90)
    got = compile_for(case.kernel, 90, case.types, case.constants, (), **case.options)
    assert got.spills == 0 and got.shared <= SHARED_LIMIT[90]
