"""Instructions that reach beyond a lane's registers: memory, other lanes, tensor cores."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ptx_emulator import numbers
from ptx_emulator import tensor_core as cores
from ptx_emulator.arithmetic import Arithmetic
from ptx_emulator.memory import TENSOR_CORES, GlobalMemory
from ptx_emulator.numbers import KINDS, Array
from ptx_emulator.phases import Phases
from ptx_emulator.text import Instruction, Operand, Program

LANES = 8192  # run at once: enough to hide the cost of Python, few enough to stay in the cache
ATOMICS = ("add", "max", "min", "or", "and", "xor", "exch")


def _size(i: Instruction) -> int:
    return int(i.modifiers[-1][1:]) // 8


def _several(operand: Operand) -> tuple[str | int, ...]:
    return operand if isinstance(operand, tuple) else (operand,)  # type: ignore[return-value]


@dataclasses.dataclass(eq=False)
class Use:
    """Shared memory that a product reads; ``age`` counts the commits of its warps since it began."""

    lane: int
    places: Array
    age: int = 0


class Machine(Arithmetic):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.uses: list[Use] = []
        self.phases = Phases()
        # Lanes, the mbarriers at which they arrive, and the copies that must end before.
        self.arriving: list[tuple[Array, Array, list[tuple[Array, Array, Array]]]] = []

    # ------------------------------------------------------------------------------------------------ memory
    def _ld(self, i: Instruction) -> None:
        targets, place = i.operands
        kind, size = i.modifiers[-1].replace("b", "u"), _size(i)
        whole = size * len(_several(targets))
        lanes = self.taking_part()
        if "param" in i.modifiers:
            address = self.address(place, "u64")[lanes].astype(np.int64)
            got = self.parameters[address[:, None] + np.arange(whole)]
        elif "shared" in i.modifiers:
            address = self.address(place, "u32")[lanes]
            got = self.shared.load(*self.blocks_and_warps(), address, whole)
        else:
            got = self.memory.load(self.address(place, "u64")[lanes], whole)
        for target, part in zip(_several(targets), got.view(KINDS[kind]).T, strict=True):
            self.assign_some(target, lanes, part)

    def _st(self, i: Instruction) -> None:
        place, sources = i.operands
        lanes = self.taking_part()
        parts = [self.lanes_of(s, f"u{_size(i) * 8}")[lanes] for s in _several(sources)]
        values = np.stack(parts, 1).view(np.uint8)
        if "shared" in i.modifiers:
            self.shared.store(*self.blocks_and_warps(), self.address(place, "u32")[lanes], values)
        else:
            self.memory.store(self.address(place, "u64")[lanes], values)

    def _atom(self, i: Instruction) -> None:
        """Lane after lane: some order of arrival."""
        kind = i.modifiers[-1].replace("b", "u")
        how = next(m for m in i.modifiers if m in ATOMICS)
        d, place, source = i.operands if i.name == "atom" else ("_", *i.operands)
        address, operand = self.address(place, "u64"), self.lanes_of(source, kind)
        for lane in np.flatnonzero(self.mask):
            here, mine = address[lane : lane + 1], operand[lane : lane + 1]
            before = self.memory.load(here, mine.itemsize).view(KINDS[kind])[:, 0]
            after = mine if how == "exch" else numbers.BINARY[how](before, mine)
            self.memory.store(here, np.ascontiguousarray(after)[:, None].view(np.uint8))
            if d != "_":
                self.registers[str(d)][lane] = numbers.words(before)[0]

    _red = _atom

    def _cp(self, i: Instruction) -> None:
        """cp.async: delivered as late as its wait allows, so that a read that comes too early shows."""
        copies = self.shared.copies
        if "mbarrier" in i.modifiers:
            lanes = np.flatnonzero(self.mask)
            at = self.address(i.operands[0], "u32")[lanes]
            return self.arriving.append((lanes, at, copies.taken(self.mask)))
        if "commit_group" in i.modifiers:
            return copies.commit(self.mask)
        if "wait_group" in i.modifiers or "wait_all" in i.modifiers:
            pending = int(str(i.operands[0])) if i.operands else -1
            return copies.wait(self.mask, pending, self.block, self.warp)
        to, source, size, *present = i.operands
        n, lanes = int(str(size)), np.flatnonzero(self.mask)
        count = self.lanes_of(present[0], "u32")[lanes] if present else np.full(len(lanes), n)
        assert np.isin(count, (0, n)).all(), "a copy of a part"
        values = np.zeros((len(lanes), n), np.uint8)
        values[count > 0] = self.memory.load(self.address(source, "u64")[lanes][count > 0], n)
        copies.begin(lanes, self.block[lanes], self.warp[lanes], self.address(to, "u32")[lanes], values)

    def _fence(self, i: Instruction) -> None:
        """What orders memory between units: the order here is the program's."""

    _membar = _fence

    # ------------------------------------------------------------------------------------------------ phases
    def _mbarrier(self, i: Instruction) -> None:
        lanes = np.flatnonzero(self.mask)
        if i.modifiers[0] == "init":
            place, count = i.operands
            at, n = self.address(place, "u32")[lanes], self.lanes_of(count, "u32")[lanes]
            return self.phases.begin(self.block[lanes], at, n)
        if i.modifiers[0] != "arrive" or len(i.operands) > 2:
            raise NotImplementedError(f"mbarrier.{'.'.join(i.modifiers)}")
        self._arrive(lanes, self.address(i.operands[1], "u32")[lanes])

    def _arrive(self, lanes: Array, address: Array) -> None:
        self.phases.arrive(self.block[lanes], address)
        self.blocked &= ~np.isin(self.block, self.block[lanes])  # they look again

    def _try_wait(self, i: Instruction, index: int, lanes: Array) -> bool:
        """As if it waited as long as it takes: who looks in vain goes on when somebody has arrived."""
        d, place, parity = i.operands
        who = np.flatnonzero(lanes)
        odd = self.lanes_of(parity, "u32")[who] & 1
        ended = self.phases.ended(self.block[who], self.address(place, "u32")[who], odd)
        self.at[who] = index + ended
        self.blocked[who] = ~ended
        self.assign_some(d, who[ended], np.ones(int(ended.sum()), np.bool_))
        return False

    def _deliver(self) -> bool:
        """As late as can be: copies end, and arrive, where nobody can go on without them."""
        if not self.arriving:
            return False
        lanes, address, copies = self.arriving.pop(0)
        self.shared.copies.deliver(copies, self.block, self.warp)
        self._arrive(lanes, address)
        return True

    def _setmaxnreg(self, i: Instruction) -> None:
        """How many registers a warp has changes no value."""

    # ------------------------------------------------------------------------------------------------ warps
    def _shfl(self, i: Instruction) -> None:
        d, *rest = i.operands
        source, by = rest[-4:-2]
        lane, warps = np.arange(32), self.whole_warps()
        n = self.lanes_of(by, "u32")[warps].astype(np.int64)
        at = {"bfly": lane ^ n, "up": lane - n, "down": lane + n, "idx": lane * 0 + n % 32}[i.modifiers[1]]
        at = np.where((at >= 0) & (at <= 31), at, lane)
        self.assign_some(d, warps, self.lanes_of(source, "u32")[np.take_along_axis(warps, at, 1)])

    def _elect(self, i: Instruction) -> None:
        """One lane of every warp: the first."""
        lane, chosen, _ = i.operands
        warps = self.whole_warps()
        self.assign_some(lane, warps, np.zeros(warps.shape, np.uint32))
        self.assign_some(chosen, warps, np.broadcast_to(np.arange(32) == 0, warps.shape))

    def _redux(self, i: Instruction) -> None:
        """The sum, or the largest or smallest, of whole warps, in every lane: integers of 32 bits."""
        d, source, _ = i.operands
        how, kind = i.modifiers[1:]
        if how not in ("add", "max", "min"):
            raise NotImplementedError(f"redux.{how}")
        warps = self.whole_warps()
        values = self.lanes_of(source, kind)[warps]
        operation = {"add": np.add, "max": np.maximum, "min": np.minimum}[how]
        result = operation.reduce(values, axis=1, dtype=values.dtype, keepdims=True)
        self.assign_some(d, warps, np.broadcast_to(result, warps.shape))

    def _ldmatrix(self, i: Instruction) -> None:
        """Lanes 8 m to 8 m + 7 point at the rows of matrix m."""
        targets, place = i.operands
        address, warps = self.address(place, "u32"), self.whole_warps()
        for m, target in enumerate(_several(targets)):
            rows = warps[:, 8 * m : 8 * m + 8].ravel()
            got = self.shared.load(self.block[rows], self.warp[rows], address[rows], 16)
            tile = got.view(np.uint16).reshape(-1, 8, 8)
            tile = tile.transpose(0, 2, 1) if "trans" in i.modifiers else tile
            pair = numbers.pack(tile[:, cores.ROW, cores.PAIR], tile[:, cores.ROW, cores.PAIR + 1])
            self.assign_some(target, warps, pair)

    def _stmatrix(self, i: Instruction) -> None:
        place, sources = i.operands
        address, warps = self.address(place, "u32"), self.whole_warps()
        for m, source in enumerate(_several(sources)):
            tile = np.zeros((len(warps), 8, 8), np.uint16)
            for half, bits in enumerate(numbers.halves(self.lanes_of(source, "u32")[warps])):
                tile[:, cores.ROW, cores.PAIR + half] = bits
            tile = tile.transpose(0, 2, 1) if "trans" in i.modifiers else tile
            rows = warps[:, 8 * m : 8 * m + 8].ravel()
            values = np.ascontiguousarray(tile).reshape(-1, 8).view(np.uint8)
            self.shared.store(self.block[rows], self.warp[rows], address[rows], values)

    def _fragments(self, registers: Operand, warps: Array) -> list[Array]:
        return [self.lanes_of(r, "u32")[warps] for r in _several(registers)]

    def _mma(self, i: Instruction) -> None:
        assert "m16n8k16" in i.modifiers and i.modifiers[-1] == "f32"
        d, a, b, c = i.operands
        warps = self.whole_warps()
        result = cores.mma(*(self._fragments(x, warps) for x in (a, b, c)), i.modifiers[-3])
        for target, values in zip(_several(d), result, strict=True):
            self.assign_some(target, warps, values)

    def _wgmma(self, i: Instruction) -> None:
        """``d = scale d + A B``, A in registers or, as B, in shared memory: computed when begun, what it reads there in
        use until waited for."""
        if i.modifiers[0] == "mma_async":
            self._warpgroup_product(i)
        elif i.modifiers[0] == "commit_group":
            for use in self.uses:
                use.age += int(self.mask[use.lane])
        elif i.modifiers[0] == "wait_group":
            for use in [
                use for use in self.uses if self.mask[use.lane] and use.age > int(str(i.operands[0]))
            ]:
                self.shared.leave(use.places)
                self.uses.remove(use)

    def _warpgroup_product(self, i: Instruction) -> None:
        d, a, b, scale, *flags = i.operands
        kind, columns = i.modifiers[-1], int(i.modifiers[3].split("n")[1].split("k")[0])
        assert flags[:2] == [1, 1], "nothing negated"
        warps = self.whole_warps()
        in_registers = isinstance(a, tuple)
        if in_registers:
            left = cores.fragment(self._fragments(a, warps), cores.A_PLACES, (16, 16), kind)
        total = cores.accumulator(self._fragments(d, warps))
        keep = self.lanes_of(scale, "pred")[warps[:, 0]]
        for w in range(0, len(warps), 4):
            group = warps[w : w + 4]
            if in_registers:
                rows = left[w : w + 4]
            else:  # a warp's share are 16 rows
                rows = self._described(a, group, 64, bool(flags[2]), kind).reshape(4, 16, 16)
            right = self._described(b, group, columns, bool(flags[-1]), kind)
            total[w : w + 4] = np.where(keep[w], total[w : w + 4], 0) + rows @ right.T
        for target, values in zip(_several(d), cores.registers(total, len(_several(d))), strict=True):
            self.assign_some(target, warps, values)

    def _described(self, descriptor: Any, warps: Array, n: int, transposed: bool, kind: str) -> Array:
        """Numbers [n, 16 k] of the operand in shared memory that a group of four warps multiplies."""
        where = set(self.lanes_of(descriptor, "u64")[warps[:, 0]])
        assert len(where) == 1, "the warps of a group differ about the operand"
        first = cores.descriptor_lines(int(where.pop()), n, transposed)
        numbers = cores.numbers_of(self._operand_of_cores(first, warps[0, 0]), kind)
        return numbers.reshape(16, n).T if transposed else numbers.reshape(n, 16)

    def _operand_of_cores(self, first: Array, lane: int) -> Array:
        """16-bit words of shared memory, in use from now on: eight neighbours from each ``first`` on."""
        block = np.full(first.shape, self.block[lane])
        raw = self.shared.load(block, np.full(first.shape, TENSOR_CORES), first, 16)
        places = self.shared.places(block, first, 16, "an operand").ravel()  # every place once
        self.shared.use(places)
        self.uses.append(Use(lane, places))
        return np.ascontiguousarray(raw).view(np.uint16).ravel()


def launch(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    parameters: dict[str, bytes],
    memory: GlobalMemory,
    shared_size: int | None = None,
) -> None:
    """All blocks of a grid, some at a time. Shared memory is what the program declares, or what the launch gives."""
    x, y, z = (np.arange(n) for n in grid)
    blocks = np.stack([a.ravel() for a in np.meshgrid(z, y, x, indexing="ij")][::-1], 1)
    step = max(1, LANES // threads)
    size = program.shared_size if shared_size is None else shared_size
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), step):
            some = blocks[first : first + step]
            Machine(program, some, grid, threads, parameters, memory, size).run()
