"""Compile a Triton kernel for a GPU that is not here, and read what came out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import tempfile
from collections import Counter
from typing import Any

import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.experimental.gluon._runtime import GluonASTSource

from cropi_kernels._launch import OPTIONS

TOOLS = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin"
# Bytes of shared memory per block: CUDA C++ programming guide, technical specifications per compute capability.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# Instructions of the tensor cores.
PRODUCTS = dict.fromkeys((80, 86, 89, 120), "HMMA") | {90: "HGMMA", 100: "UTCHMMA"}
FLOATS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclasses.dataclass(frozen=True)
class Compiled:
    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]
    first: str  # the compiler's first form
    ptx: str

    @property
    def spills(self) -> int:
        return self.opcodes["LDL"] + self.opcodes["STL"]


def compile_for(
    kernel: Any,
    capability: int,
    types: dict[str, str],
    constants: dict[str, Any],
    aligned: tuple[str, ...],
    **options: int,
) -> Compiled:
    """``types``: every run-time argument's type ("*bf16", "i32"); ``aligned``: integers that are multiples of 16.

    Pointers are taken to be aligned, which is what torch's allocator gives.
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in aligned
    }
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    source = language(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    result = compile(source, target=GPUTarget("cuda", capability, 32), options=options | OPTIONS)
    usage = dict(re.findall(r"(REG|STACK):(\d+)", _dump(result.asm["cubin"], "--dump-resource-usage")))
    sass = _dump(result.asm["cubin"], "-sass")
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)", sass))
    return Compiled(
        int(usage["REG"]),
        int(usage["STACK"]),
        result.metadata.shared,
        opcodes,
        result.asm.get("ttir") or result.asm["source"],
        result.asm["ptx"],
    )


def unfenced_products(ptx: str, wait: str = "cp.async.wait") -> int:
    """Warp-group products that may read shared memory before copies to it are visible to them.

    `cp.async` writes through the generic proxy, `wgmma` reads its operands in shared memory through the async proxy:
    between the wait for the one and the other there must be a ``fence.proxy.async`` (PTX ISA, memory consistency model,
    proxies). Instructions are taken in the order of the text: a loop's wait stands in the loop.
    """
    waited, unfenced = False, 0
    for line in ptx.splitlines():
        word = re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", line)
        name = word.group(1) if word else ""
        if name.startswith(wait):
            waited = True
        elif name.startswith("fence.proxy.async"):
            waited = False
        elif name.startswith("wgmma.mma_async"):
            unfenced += waited
    return unfenced


def _dump(cubin: bytes, flag: str) -> str:
    # cuobjdump looks for nvdisasm there.
    env = dict(os.environ, PATH=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), flag, file.name]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
