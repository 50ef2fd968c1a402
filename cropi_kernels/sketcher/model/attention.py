"""Which of torch's attentions a pass may use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

TILE, HALF = 128, 64  # keys that cuDNN's backward kernel takes at once; what is left over where it goes wrong


@contextlib.contextmanager
def right_backward(device: torch.device, length: int) -> Iterator[None]:
    """Inside, torch does not choose cuDNN's attention for rows of ``length`` tokens whose backward pass may be NaN.

    With a mask, and rows of 64 tokens beyond a multiple of 128, cuDNN's backward kernel for Hopper GPUs takes the keys
    that fill up the last tile for keys with a score of 0. Where all scores of a token are below -88, as in some heads
    of Qwen2.5, the gradient of its query is NaN (pytorch issue 196678; torch prefers cuDNN on these GPUs since 2.11).
    A model may make a mask of its own, so that what the pass was given does not tell. Flash attention and the
    memory-efficient one serve instead.
    """
    if device.type != "cuda" or length % TILE != HALF or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
