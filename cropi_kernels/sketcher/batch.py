"""Which segment each token of a batch belongs to, seen from any module in the model."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Segments:
    """Tokens [batch, length] in flattened order; ``offsets`` [segments + 1] cuts them into segments."""

    batch: int
    length: int
    offsets: torch.Tensor

    @classmethod
    def of(cls, segments: torch.Tensor, batch: int, length: int, n_segments: int | None) -> Segments:
        """From segment ids per row [batch] or per token [batch, length], non-decreasing in flattened order.

        Raises:
            ValueError: wrong dtype or shape, ids that decrease or are out of range.
        """
        if segments.dtype not in (torch.int64, torch.int32) or segments.shape not in ((batch,), (batch, length)):
            raise ValueError(
                f"segments is {segments.dtype} {tuple(segments.shape)}: give int64 ids per row [{batch}] or per token "
                f"[{batch}, {length}]"
            )
        ids = segments.to("cpu", torch.int64).reshape(-1)
        if ids.numel() and (int(ids.min()) < 0 or bool((ids[1:] < ids[:-1]).any())):
            raise ValueError("segments must be >= 0 and must not decrease: sort the batch's rows by prompt")
        highest = int(ids[-1]) + 1 if ids.numel() else 0
        if n_segments is None:
            n_segments = highest
        if n_segments < highest:
            raise ValueError(f"num_segments={n_segments} but segments holds id {highest - 1}")
        offsets = torch.searchsorted(ids, torch.arange(n_segments + 1))
        if segments.ndim == 1:
            offsets = offsets * length
        return cls(batch, length, offsets)

    @property
    def count(self) -> int:
        return self.offsets.numel() - 1

    def tokens_first(self, x: torch.Tensor, where: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``x`` as [tokens * repeats, n] with its offsets; repeats > 1 where a module sees every head apart.

        Head norms get [batch, length, heads, n] or, after a transpose, [batch, heads, length, n].
        """
        tokens, n = self.batch * self.length, x.shape[-1]
        if x.ndim == 4 and x.shape[0] == self.batch and self.length in x.shape[1:3]:
            if x.shape[1] != self.length or (x.shape[2] == self.length and x.stride(1) < x.stride(2)):
                x = x.transpose(1, 2)
        elif x.shape[:-1].numel() != tokens:
            raise ValueError(
                f"{where} saw an input of shape {tuple(x.shape)} in a batch of {self.batch} x {self.length} tokens: "
                "it does not see every token once; exclude its parameters"
            )
        repeats = x.shape[:-1].numel() // tokens
        return x.reshape(-1, n), self.offsets * repeats if repeats != 1 else self.offsets
