"""A table of rows of numbers in half precision or in four bits, of a size that is known beforehand."""

from __future__ import annotations

from typing import Any

import torch

from cropi.errors import CropiError

BITS = (16, 4)
BLOCK = 64  # numbers that share a scale in four bits: 4.5 bits a number with it


class PackedRows:
    """Rows [count, dim], zero at first.

    16 bits: float16 times a power of two for each row, so that no size is lost. 4 bits: whole numbers from -7 to 7
    times a half-precision scale for each block of 64 numbers and a power of two for each row; rounded up or down by
    chance, so that sums of many small rows stay right on average.

    Args:
        count, dim: of the table; ``dim`` a multiple of 64 in four bits.
        bits: 16 or 4.
        seed: of the rounding in four bits.
    """

    def __init__(self, count: int, dim: int, bits: int = 16, seed: int = 0) -> None:
        if bits not in BITS:
            raise CropiError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
        if bits == 4 and dim % BLOCK:
            raise CropiError(f"dim is {dim}: in 4 bits it must be a multiple of {BLOCK}")
        self.count, self.dim, self.bits = count, dim, int(bits)
        self._draws = torch.Generator().manual_seed(seed)
        self.exponent = torch.zeros(count, dtype=torch.int16, device="cpu")
        if bits == 16:
            self.values = torch.zeros(count, dim, dtype=torch.float16, device="cpu")
            self.scale = torch.zeros(count, 0, dtype=torch.float16, device="cpu")
        else:
            self.values = torch.zeros(count, dim // 2, dtype=torch.uint8, device="cpu")
            self.scale = torch.zeros(count, dim // BLOCK, dtype=torch.float16, device="cpu")

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.scale, self.exponent))

    def read(self, places: torch.Tensor | slice) -> torch.Tensor:
        """float32 [n, dim]."""
        values, powers = self.values[places], self.exponent[places].float()[:, None]
        if self.bits == 16:
            return torch.ldexp(values.float(), powers)
        low, high = (values & 15).to(torch.int8) - 8, (values >> 4).to(torch.int8) - 8
        whole = torch.stack((low, high), dim=2).view(len(values), self.dim // BLOCK, BLOCK).float()
        return torch.ldexp(
            (whole * self.scale[places].float()[..., None]).view(len(values), self.dim), powers
        )

    def write(self, places: torch.Tensor, rows: torch.Tensor) -> None:
        """Put float32 ``rows`` [n, dim], all finite, in these places."""
        rows = rows.to("cpu", torch.float32)
        largest = rows.abs().amax(dim=1)
        power = torch.where(largest > 0, torch.frexp(largest).exponent, 0)
        rows = torch.ldexp(rows, -power[:, None].float())  # the largest is in [1/2, 1)
        self.exponent[places] = power.to(torch.int16)
        if self.bits == 16:
            self.values[places] = rows.to(torch.float16)
            return
        blocks = rows.view(len(rows), self.dim // BLOCK, BLOCK)
        # Rounded up, so that no number of the block is more than 7 of it.
        scale = (blocks.abs().amax(dim=2) * (1.001 / 7)).to(torch.float16)
        shares = blocks / scale.float().clamp_min(torch.finfo(torch.float16).tiny)[..., None]
        whole = (
            shares + torch.rand(shares.shape, generator=self._draws, dtype=torch.float32, device="cpu")
        ).floor().clamp(-7, 7) + 8
        pairs = whole.to(torch.uint8).view(len(rows), self.dim // 2, 2)
        self.values[places] = pairs[..., 0] | (pairs[..., 1] << 4)
        self.scale[places] = scale

    def state_dict(self) -> dict[str, Any]:
        return {
            "values": self.values, "scale": self.scale, "exponent": self.exponent, "draws": self._draws.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], order: torch.Tensor) -> None:
        """Row i is row ``order[i]`` of the state."""
        try:
            self._draws.set_state(state["draws"])
        except RuntimeError as error:
            raise CropiError(
                f"the state is damaged: rows[draws] is no state of a generator ({error})"
            ) from error
        for name in ("values", "scale", "exponent"):
            getattr(self, name).copy_(state[name][order])
