"""Checks that every op makes before a kernel sees an address."""

from __future__ import annotations

import torch


def check_out(out: torch.Tensor, n_segments: int, dim: int) -> None:
    """``out`` must be a contiguous float32 or float64 [n_segments, dim] accumulator."""
    if out.ndim != 2 or tuple(out.shape) != (n_segments, dim):
        raise ValueError(
            f"out has shape {tuple(out.shape)}: it must be [segments, sketch numbers] = [{n_segments}, {dim}]"
        )
    if out.dtype not in (torch.float32, torch.float64) or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype}, contiguous={out.is_contiguous()}: give a contiguous float32 tensor"
        )


def check_offsets(offsets: torch.Tensor, n_tokens: int) -> int:
    """Returns the number of segments; token range s is offsets[s] .. offsets[s + 1].

    Their values are checked on the CPU only.
    """
    if (
        offsets.dtype != torch.int64
        or offsets.ndim != 1
        or offsets.numel() < 1
        or not offsets.is_contiguous()
    ):
        raise ValueError(
            f"offsets is {offsets.dtype} {tuple(offsets.shape)}: give a contiguous 1-D int64 tensor"
        )
    if offsets.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"offsets is on {offsets.device}: give offsets.cpu(), or the offsets on the tokens' CUDA device"
        )
    if (
        offsets.device.type != "cpu"
    ):  # reading them would make the host wait; the kernels clamp them to the tokens
        return offsets.numel() - 1
    values = offsets.tolist()
    if values[0] < 0 or values[-1] > n_tokens:
        raise ValueError(f"offsets run from {values[0]} to {values[-1]} but there are {n_tokens} tokens")
    for s, (a, b) in enumerate(zip(values, values[1:])):
        if b < a:
            raise ValueError(
                f"offsets[{s + 1}]={b} is below offsets[{s}]={a}: segments must not run backwards"
            )
    return offsets.numel() - 1


def on_host(offsets: torch.Tensor, n_tokens: int) -> torch.Tensor:
    """``offsets`` for a CPU kernel, which trusts them: those that came from a device are checked now."""
    if offsets.device.type != "cpu":
        offsets = offsets.cpu()
        check_offsets(offsets, n_tokens)
    return offsets


def check_matrix(name: str, x: torch.Tensor, cols: int, what: str) -> None:
    if x.ndim != 2 or x.shape[1] != cols:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [tokens, {cols}] ({what})")
