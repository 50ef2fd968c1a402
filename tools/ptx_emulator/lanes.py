"""The lanes of some blocks of threads: their registers, where each one is in the program, and barriers.

All threads run at once, every instruction under a mask. The lanes that are furthest behind go first, so that those that
took different ways meet again; a basic block is run by all lanes that are at its beginning.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from ptx_emulator.memory import GlobalMemory, SharedMemory
from ptx_emulator.numbers import KINDS, UNSIGNED, Array, words
from ptx_emulator.text import Address, Instruction, Operand, Program


class Divergent(AssertionError):
    """Some lanes of a warp are missing where an instruction needs all of them."""


T = TypeVar("T")
CONTROL = frozenset({"bra", "ret", "exit", "bar", "barrier"})
DTYPES = {name: np.dtype(kind) for name, kind in KINDS.items()}


@functools.cache
def _literal(bits: int, kind: str) -> Array:
    """One number that all lanes share."""
    if kind == "pred":
        return np.bool_(bits)
    want = DTYPES[kind]
    mask = (1 << want.itemsize * 8) - 1
    return np.array([bits & mask], UNSIGNED[want.itemsize]).view(want)[0]


def _extended(values: Array, kind: np.dtype[Any]) -> Array:
    """The bits of numbers for a register: those of a narrower integer with a sign are extended by it."""
    if values.dtype == kind or kind.kind == "b":
        return values
    if values.dtype.kind == "i" and values.dtype.itemsize < kind.itemsize:
        values = values.astype(f"i{kind.itemsize}")
    return words(values)


class Registers(dict[str, Array]):
    """Made when first named: of the thousands that a program declares, much is in blocks that no lane enters."""

    def __init__(self, kinds: dict[str, type], lanes: int) -> None:
        super().__init__()
        self.kinds, self.lanes = kinds, lanes

    def __missing__(self, name: str) -> Array:
        self[name] = np.zeros(self.lanes, self.kinds[name])
        return self[name]


class Lanes:
    """``blocks``: [n, 3] indices of the blocks that run together; ``parameters``: name to bytes.

    A subclass has a method ``_name`` for every instruction's name, called where at least one lane takes part.
    """

    def __init__(
        self,
        program: Program,
        blocks: Array,
        grid: tuple[int, ...],
        threads: int,
        parameters: dict[str, bytes],
        memory: GlobalMemory,
        shared_size: int,
    ) -> None:
        assert threads % 32 == 0
        self.program, self.memory, self.threads = program, memory, threads
        self.views: dict[tuple[Operand, str], Array] = {}
        self.parameters = np.frombuffer(
            b"".join(parameters[n].ljust(8, b"\0") for n in program.parameters), np.uint8
        )
        sizes = [0, *(max(8, len(parameters[n])) for n in program.parameters)]
        self.symbols = program.shared | dict(zip(program.parameters, np.cumsum(sizes).tolist()))
        lanes = len(blocks) * threads
        self.block = np.repeat(np.arange(len(blocks)), threads)
        thread = np.tile(np.arange(threads, dtype=np.uint32), len(blocks))
        self.warp = (thread >> 5).astype(np.int32)
        self.registers = Registers(program.registers, lanes)
        self.registers.update({"%tid.x": thread, "%ntid.x": np.uint32(threads)})
        for i, axis in enumerate("xyz"):
            self.registers[f"%ctaid.{axis}"] = blocks[:, i].astype(np.uint32)[self.block]
            self.registers[f"%nctaid.{axis}"] = np.uint32(grid[i])
        self.registers.update({"%laneid": thread & 31, "%tid.y": np.uint32(0), "%tid.z": np.uint32(0)})
        # Warps of different work wait for phases: what two of them touch between barriers of the block says nothing.
        phases = any(i.name == "mbarrier" for i in program.instructions)
        self.shared = SharedMemory(len(blocks), shared_size, program.grain, marks=not phases)
        self.at = np.zeros(lanes, np.int64)  # index of the next instruction
        self.waiting = np.zeros(lanes, np.bool_)  # at a barrier: which one, and of how many threads (0: all)
        self.barrier, self.expected = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
        self.blocked = np.zeros(lanes, np.bool_)  # until a phase of an mbarrier ends
        self.mask = np.ones(lanes, np.bool_)  # of the instruction that is being run
        self.count = lanes  # in the mask
        self.window = slice(0, lanes)  # from the first to the last lane that takes part
        self.warps = np.arange(lanes).reshape(-1, 32)
        # What was found of a mask, which most instructions share with the one before: the mask, and by what was asked.
        self.found_of: tuple[Array, dict[str, Any]] = (self.mask, {})
        self.methods: dict[str, Callable[[Instruction], None]] = {}

    # ------------------------------------------------------------------------------------------------ control
    def run(self) -> None:
        end, starts = len(self.program.instructions), set(self.program.labels.values())
        while True:
            ready = ~(self.waiting | self.blocked) & (self.at < end)
            if not ready.any():
                if not (self.waiting | self.blocked).any():
                    return
                if not self._open_barriers(end) and not self._deliver():
                    raise Divergent("no block can go on: some threads wait for what others never reach")
                continue
            here = int(self.at[ready].min())
            lanes = ready & (self.at == here)
            count = np.count_nonzero(lanes)
            self.window = slice(int(lanes.argmax()), len(lanes) - int(lanes[::-1].argmax()))
            for index in itertools.count(here):
                if index == end or (index != here and index in starts):
                    self.at[lanes] = index
                    break
                if not self._step(self.program.instructions[index], index, lanes, count):
                    break

    def _open_barriers(self, end: int) -> bool:
        """Those at which as many threads wait as they are for: a number, or all that have not left."""
        there = np.bincount(self.block[self.at < end], minlength=len(self.shared.epoch))
        key = self.block * 16 + self.barrier
        arrived = np.bincount(key[self.waiting], minlength=16 * len(there))
        expected = np.where(self.expected > 0, self.expected, there[self.block])
        opened = self.waiting & (arrived[key] == expected)
        self.shared.epoch[np.unique(self.block[opened & (self.expected == 0)])] += 1
        self.waiting &= ~opened
        return bool(opened.any())

    def _deliver(self) -> bool:
        """Where nobody can go on: whether something came to an end that was under way."""
        return False

    def _try_wait(self, i: Instruction, index: int, lanes: Array) -> bool:
        raise NotImplementedError

    def _step(self, i: Instruction, index: int, lanes: Array, count: int) -> bool:
        """Whether the lanes, ``count`` of them, go on with the next instruction."""
        self.mask, self.count = lanes, count
        if i.guard is not None:
            self.mask = lanes & (self.registers[i.guard] != i.negated)
            self.count = np.count_nonzero(self.mask)
        if i.name in CONTROL:
            return self._control(i, index, lanes)
        if i.name == "mbarrier" and "try_wait" in i.modifiers:
            return self._try_wait(i, index, lanes)
        if self.count:
            run = self.methods.get(i.name) or self._method(i)
            try:
                run(i)
            except Exception as error:
                error.args = (f"{error} ({self._where(i)})",)  # add_note needs Python 3.11
                raise
        return True

    def _method(self, i: Instruction) -> Callable[[Instruction], None]:
        run = getattr(self, f"_{i.name}", None)
        if run is None:
            raise NotImplementedError(f"{self._where(i)}: the emulator has no such instruction")
        return self.methods.setdefault(i.name, run)

    def _where(self, i: Instruction) -> str:
        return f"{self.program.name}, line {i.line}: {'.'.join((i.name, *i.modifiers))} {i.operands}"

    def _control(self, i: Instruction, index: int, lanes: Array) -> bool:
        if i.name.startswith("bar") and "warp" in i.modifiers:
            return True
        self.at[lanes] = index + 1
        if i.name == "bra":
            self.at[self.mask] = self.program.labels[str(i.operands[-1])]
        elif i.name.startswith("bar"):
            assert "sync" in i.modifiers, "a barrier at which some arrive and do not wait"
            which, *threads = (int(str(n)) for n in i.operands)
            self.waiting[self.mask], self.barrier[self.mask] = True, which
            self.expected[self.mask] = threads[0] if threads and threads[0] != self.threads else 0
        else:
            self.at[self.mask] = len(self.program.instructions)
        return False

    def _of_the_mask(self, what: str, find: Callable[[], T]) -> T:
        """``find``, once for a mask."""
        if self.found_of[0] is not self.mask:  # masks are made, never changed
            self.found_of = self.mask, {}
        found = self.found_of[1]
        if what not in found:
            found[what] = find()
        return found[what]  # type: ignore[no-any-return]

    def taking_part(self) -> Array | slice:
        """The lanes that the mask covers, to index with: all of them are not picked one by one."""
        if self.count == len(self.at):
            return slice(None)
        return self._of_the_mask("lanes", lambda: np.flatnonzero(self.mask))

    def blocks_and_warps(self) -> tuple[Array, Array]:
        """Of the lanes that take part."""
        lanes = self.taking_part()
        return self._of_the_mask("places", lambda: (self.block[lanes], self.warp[lanes]))

    def whole_warps(self) -> Array:
        """[warps, 32] lanes of the warps that take part."""
        return self.warps if self.count == len(self.at) else self._of_the_mask("warps", self._whole_warps)

    def _whole_warps(self) -> Array:
        per_warp = self.mask.reshape(-1, 32)
        whole = per_warp.all(1)
        if (per_warp.any(1) != whole).any():
            raise Divergent("only a part of a warp")
        return self.warps[whole]

    # ------------------------------------------------------------------------------------------------ operands
    def value(self, operand: Operand, kind: str) -> Array:
        """An operand as numbers: those of the lanes of the window, or one number that all lanes share.

        Blocks with more or less work than others soon run apart from them, and are few of the lanes.
        """
        value = self.whole_value(operand, kind)
        return value[self.window] if value.ndim else value

    def whole_value(self, operand: Operand, kind: str) -> Array:
        """An operand as numbers: those of all lanes, or one number that they share."""
        # Literals, and registers of the same width, which are these numbers themselves and stay where they are, are
        # looked up once.
        view = self.views.get((operand, kind))
        if view is not None:
            return view
        if isinstance(operand, int):
            return self.views.setdefault((operand, kind), _literal(operand, kind))
        want = DTYPES[kind]
        if isinstance(operand, tuple):
            return self._joined(operand, want)
        name = str(operand)
        if name in self.symbols:
            return _literal(self.symbols[name], kind)
        bits = self.registers[name]
        if bits.dtype.kind == "b":
            return self.views.setdefault((operand, kind), bits)
        if bits.dtype.itemsize == want.itemsize:
            return self.views.setdefault((operand, kind), bits.view(want))
        if bits.dtype.itemsize > want.itemsize:
            return bits.astype(UNSIGNED[want.itemsize]).view(want)
        return bits.astype(want)

    def _joined(self, parts: tuple[str | int, ...], want: np.dtype[Any]) -> Array:
        """``{low, ..., high}`` as one word."""
        width = want.itemsize * 8 // len(parts)
        word: Array = np.zeros((), np.uint64)
        for n, part in enumerate(parts):
            word = word | self.whole_value(part, f"u{width}").astype(np.uint64) << np.uint64(n * width)
        return word.astype(UNSIGNED[want.itemsize])

    def lanes_of(self, operand: Operand, kind: str) -> Array:
        """`whole_value`, one number per lane."""
        value = self.whole_value(operand, kind)
        return value if value.shape == self.at.shape else np.broadcast_to(value, self.at.shape)

    def assign(self, operand: Operand, values: Array) -> None:
        """``values`` of the window to a register, where the mask is set; narrower integers are extended, signed ones
        by their sign."""
        if operand == "_":
            return
        register = self.registers[str(operand)][self.window]
        values = _extended(values, register.dtype)
        if self.count == len(register):
            register[...] = values
        else:
            np.copyto(register, values, "unsafe", where=self.mask[self.window])

    def assign_some(self, operand: Operand, lanes: Array | slice, values: Array) -> None:
        """To a register of some of the lanes that the mask covers."""
        if operand != "_":
            register = self.registers[str(operand)]
            register[lanes] = _extended(values, register.dtype)

    def address(self, operand: Operand, kind: str) -> Array:
        assert isinstance(operand, Address)
        base = self.lanes_of(int(operand.base) if operand.base.isdigit() else operand.base, kind)
        return base + base.dtype.type(operand.offset % (1 << 8 * base.dtype.itemsize))
