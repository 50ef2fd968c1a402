"""PTX text to instructions. The part of the language that compilers emit for kernels, not what a person may write."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

import numpy as np

WIDTHS = {"pred": np.bool_, "b8": np.uint8, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64}
# What a .reg may also be declared as.
WIDTHS |= {f"{k}{n}": WIDTHS[f"b{n}"] for k in "usf" for n in (8, 16, 32, 64) if k != "f" or n > 16}


@dataclasses.dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register, a variable or a parameter."""

    base: str
    offset: int


Operand = str | int | Address | tuple["str | int", ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """``@[!]guard name.modifiers operands;`` and the line of the text that it stands in."""

    line: int
    guard: str | None
    negated: bool
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]


@dataclasses.dataclass(frozen=True)
class Program:
    """One entry point. ``parameters`` are sizes, ``shared`` addresses, ``labels`` indices of instructions.

    ``grain``: every access to shared memory is a multiple of so many bytes.
    """

    name: str
    parameters: dict[str, int]
    registers: dict[str, type]
    shared: dict[str, int]
    shared_size: int
    instructions: list[Instruction]
    labels: dict[str, int]
    grain: int


def _number(text: str) -> int | None:
    """The bits of a literal: integers as they are, ``0f``/``0d`` as the pattern that they spell."""
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    text = text.rstrip("U")
    return int(text, 0) if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text) else None


@functools.cache
def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(_scalar(part) for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    return _scalar(text)


def _scalar(text: str) -> str | int:
    number = _number(text.strip())
    return text.strip() if number is None else number


def _instruction(line: int, text: str) -> Instruction:
    guard, negated = None, False
    if text.startswith("@"):
        word, text = text.split(None, 1)
        guard, negated = word.lstrip("@!"), "!" in word
    opcode, _, rest = text.partition(" ")
    name, *modifiers = re.split(r"\.|::", opcode.strip())
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s|][^,|]*", rest)
    return Instruction(line, guard, negated, name, tuple(modifiers), tuple(map(_operand, operands)))


def _statements(body: str) -> Iterator[tuple[int, str]]:
    """(line within the body, text) of labels, declarations and instructions; scopes are passed over."""
    pending, first = "", 0
    for line, text in enumerate(body.split("\n")):
        text = text.strip().replace("\t", " ")
        if not pending:
            first = line
            if text.endswith(":") or text.startswith(".loc") or text in "{}":
                if text.endswith(":"):
                    yield line, text
                continue
        pending += f" {text}"
        *done, pending = pending.split(";")
        for statement in done:
            statement = statement.strip().lstrip("{").strip()
            if statement:
                yield first, statement
        pending = pending.strip().strip("}").strip()


def _names(declared: str) -> Iterator[str]:
    """``%r<3>`` is %r0, %r1 and %r2."""
    for name in declared.split(","):
        many = re.match(r"\s*([\w%]+)<(\d+)>", name)
        yield from [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]


def _closing(text: str, begin: int) -> int:
    """Where the brace that is open at ``begin`` is closed."""
    depth = 1
    for m in re.finditer(r"[{}]", text[begin:]):
        depth += 1 if m[0] == "{" else -1
        if depth == 0:
            return begin + m.start()
    raise ValueError("a brace is not closed")


@functools.lru_cache(maxsize=100)
def parse(ptx: str, entry: str | None = None) -> Program:
    """One entry point of a module, by default the first."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    name = r"[^\s(]+" if entry is None else re.escape(entry)
    header = re.search(rf"\.entry\s+({name})\s*\((.*?)\)[^{{]*\{{", ptx, re.S)
    assert header, f"no entry point {entry or ''}"
    begin, end = header.end(), _closing(ptx, header.end())
    shared, shared_size = _shared(ptx[: ptx.index(".entry")] + ptx[begin:end])
    registers: dict[str, type] = {}
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    above = ptx.count("\n", 0, begin) + 1
    for line, text in _statements(ptx[begin:end]):
        if text.endswith(":"):
            labels[text[:-1]] = len(instructions)
        elif text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            registers |= dict.fromkeys(_names(names), WIDTHS[kind[1:]])
        elif not text.startswith("."):
            instructions.append(_instruction(above + line, text))
    parameters, grain = _parameters(header[2]), min(map(_bytes_of_shared, instructions), default=16)
    return Program(header[1], parameters, registers, shared, shared_size, instructions, labels, grain)


def _bytes_of_shared(i: Instruction) -> int:
    """That one lane touches at once; 16 where it touches none. Matrices of tensor cores have rows of 16."""
    if "shared" not in i.modifiers or "mbarrier" in i.modifiers or i.name not in ("ld", "st", "cp"):
        return 16
    if i.name == "cp":
        return int(str(i.operands[2]))
    values = i.operands[0 if i.name == "ld" else 1]
    return int(i.modifiers[-1][1:]) // 8 * (len(values) if isinstance(values, tuple) else 1)


def _parameters(text: str) -> dict[str, int]:
    """Name to bytes; a struct is an array of bytes."""
    found = re.findall(r"\.param\s[^,]*?\.[busf](\d+)\s[^,]*?(\w+)(?:\[(\d+)\])?\s*(?:,|$)", text)
    return {name: int(bits) // 8 * int(count or 1) for bits, name, count in found}


def _shared(text: str) -> tuple[dict[str, int], int]:
    """Addresses of variables, and where the last one ends; one without a size begins at 0."""
    addresses, top = {}, 0
    for align, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d*)\]", text):
        top = -(-top // int(align)) * int(align)
        addresses[name] = top
        top += int(size or 0)
    return addresses, top
