"""Which instructions stand where in the compiled module: code for one level must not reach a processor of another.

One inline function shared between levels would carry AVX to machines that cannot run it. The baseline is SSE2.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")

# Instructions that neither AVX's prefix "v" nor a register's name gives away, by the extension that brings them.
# tzcnt is not among them: on an older processor it is bsf, and compilers use it so.
BEYOND_SSE2 = re.compile(
    r"andn|bextr|bls(i|r|msk)|bzhi|mulx|p(dep|ext)|rorx|s(ar|hl|hr)x"  # BMI1, BMI2
    r"|lzcnt|popcnt|movbe|crc32\w?"
    r"|addsubp[sd]|h(add|sub)p[sd]|lddqu|mov(d|sh|sl)dup"  # SSE3
    r"|pabs[bwd]|palignr|ph(add|sub)s?[wd]|phaddsw|pmaddubsw|pmulhrsw|pshufb|psign[bwd]"  # SSSE3
    r"|p?blendv?(b|w|p[sd])|dpp[sd]|extractps|insertps|movntdqa|mpsadbw|packusdw|pextr[bdq]|pinsr[bdq]"  # SSE4.1
    r"|phminposuw|p(max|min)(sb|sd|ud|uw)|pmov[sz]x\w+|pmuldq|pmulld|ptest|rounds?[sp][sd]|pcmpeqq"
    r"|pcmp[ei]str[im]|pcmpgtq"  # SSE4.2
)
# Zmm registers, masks, and the upper half of the others: AVX-512 alone has them.
AVX512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")


def instructions(disassembly: str) -> Iterator[tuple[str, str, str]]:
    """(function, mnemonic, operands)."""
    function = ""
    for line in disassembly.splitlines():
        if line.endswith(">:"):
            function = line.split("<", 1)[1][:-2]
        elif found := re.match(
            r"\s+[0-9a-f]+:\s+(?:(?:bnd|lock|notrack|data16|rep\w*|[cdefgs]s)\s+)*(\w+)(.*)", line
        ):
            yield function, found[1], found[2]


def level(function: str) -> int:
    """Of a mangled name: that of its namespace, cropi::v3 or cropi::v4, else the baseline."""
    return 4 if "5cropi2v4" in function else 3 if "5cropi2v3" in function else 1


def misplaced(disassembly: str) -> list[str]:
    wrong = set()
    for function, mnemonic, operands in instructions(disassembly):
        at = level(function)
        wide = mnemonic.startswith("v") or "%ymm" in operands or BEYOND_SSE2.fullmatch(mnemonic)
        if (at == 1 and wide) or (at < 4 and AVX512.search(operands)):
            wrong.add(f"{function}: {mnemonic}{operands}")
    return sorted(wrong)


def disassembly(path: Path) -> str:
    tool = shutil.which("objdump")
    if tool is None:
        pytest.skip("objdump is not installed (Debian: binutils)")
    done = subprocess.run(
        [tool, "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.long
@x86_only
def test_instructions_stay_at_their_level() -> None:
    from cropi_kernels import _C  # a missing _C must fail here, not skip

    text = disassembly(Path(_C.__file__))
    assert not misplaced(text)
    registers = {at: set() for at in (1, 3, 4)}  # type: ignore[var-annotated]
    for function, _, operands in instructions(text):
        registers[level(function)] |= set(re.findall("%(.)mm", operands))
    assert registers == {1: {"x"}, 3: {"x", "y"}, 4: {"x", "y", "z"}}, (
        "a level was not built, or not for itself"
    )


@pytest.mark.parametrize(
    "function, line, wrong",
    [
        ("_ZN5cropi2v16kernelEv", "vaddps %xmm0,%xmm1,%xmm2", True),
        ("_ZN5cropi2v16kernelEv", "addps  %xmm0,%xmm1", False),
        ("_ZN5cropi2v16kernelEv", "shlx   %eax,%ebx,%ecx", True),
        ("_ZN5cropi2v16kernelEv", "pmulld %xmm0,%xmm1", True),
        ("_ZN5cropi2v16kernelEv", "lock xadd %eax,(%rdx)", False),
        ("parallel_for", "vmovups (%rax),%ymm0", True),
        ("parallel_for", "kmovw  %eax,%k1", True),
        ("_ZN5cropi2v36kernelEv", "vmovups (%rax),%ymm0", False),
        ("_ZN5cropi2v36kernelEv", "vmovups (%rax),%ymm17", True),
        ("_ZN5cropi2v36kernelEv", "vmovups (%rax),%zmm0", True),
        ("_ZN5cropi2v46kernelEv", "vmovups (%rax),%zmm0{%k1}{z}", False),
    ],
)
def test_a_misplaced_instruction_would_be_seen(function: str, line: str, wrong: bool) -> None:
    text = f"0000000000001000 <{function}>:\n    1000:\t{line}\n    1004:\tret\n"
    assert bool(misplaced(text)) == wrong
