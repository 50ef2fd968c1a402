"""TRL's fused head: from 1.16 on its models multiply by the head's weight themselves and give log-probs, no logits."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from cropi_kernels import LiveSketcher

NAME = "_ChunkedLogProbFunction"
# Of its `apply`, in their order.
ARGUMENTS = ("hidden", "weight", "bias", "labels", "temperature", "chunk_size", "softcap", "scale", "outputs")


class _Heard:
    """Stands in the function's place: calls it, and tells the sketcher of what went in and came out."""

    def __init__(self, function: Any, live: LiveSketcher) -> None:
        self.function = function
        # A compiled model's graph ends there and goes on behind.
        self.tell: Any = torch.compiler.disable(live.fused_head)
        self.mask: torch.Tensor | None = None  # of the call: which tokens are scored

    def apply(self, *args: Any) -> Any:
        out = self.function.apply(*args)
        given = dict(zip(ARGUMENTS, args))
        hidden = given["hidden"]
        self.tell(
            hidden, given["labels"], self._rows(hidden.shape[0]), out[0], out[1], temperature=given["temperature"],
            softcap=given["softcap"], scale=given["scale"], dtype=_dtype(hidden),
        )  # fmt: skip
        return out

    def _rows(self, n: int) -> torch.Tensor:
        """The row of each token that the head is given: of all tokens, or of those that are scored."""
        assert self.mask is not None
        if n == self.mask.numel():
            rows = torch.arange(self.mask.shape[0], device=self.mask.device)
            return rows[:, None].expand_as(self.mask).reshape(-1)
        return self.mask.nonzero()[:, 0]

    def see(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if kwargs.get("fused_lm_head") and isinstance(labels, torch.Tensor):
            self.mask = labels[:, 1:] != -100


def _dtype(hidden: torch.Tensor) -> torch.dtype:
    """In which the function multiplies."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


@contextlib.contextmanager
def fused_heads(live: LiveSketcher) -> Iterator[None]:
    """Inside, calls of TRL's fused head are told to the sketcher. Nothing is done where TRL has none."""
    utils = importlib.import_module("trl.trainer.utils")
    function = getattr(utils, NAME, None)
    if function is None:
        yield
        return
    heard = _Heard(function, live)
    handle = live.model.register_forward_pre_hook(heard.see, with_kwargs=True)
    setattr(utils, NAME, heard)
    try:
        yield
    finally:
        setattr(utils, NAME, function)
        handle.remove()
