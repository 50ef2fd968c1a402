"""A batch between the host and the device: its values for the checks in one copy, what the pass needs in another.

Every number that is read from a device makes the host wait, and every operator costs the host 20 to 60 us, in which the
device has nothing to do. So the checks of a batch are done on the host, on one copy of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

# Of copies that `sent` made: the tensor of the host, and the versions of both, which rise when one is written to.
_SENT = WeakIdKeyDictionary()


def values(x: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor of the host, without a copy; numpy has no bfloat16."""
    x = x.float() if x.dtype == torch.bfloat16 else x
    return (x.detach() if x.requires_grad else x).numpy()


def on_host(*given: torch.Tensor | None) -> tuple[Any, ...]:
    """The tensors in the host's memory: equal values, shapes and dtypes. The integers of a device come in one copy, for
    which the host waits once; tensors of the host are given back as they are, and so are those that `sent` copied."""
    away = [x for x in given if x is not None and _away(x.device)]
    if not away:
        return given
    known = {id(x): here for x in away if (here := _before_sent(x)) is not None}
    away = [x for x in away if id(x) not in known]
    numbers = [x for x in away if x.is_floating_point() or x.is_complex()]
    copies = known | {id(x): x.cpu() for x in numbers}
    for device in dict.fromkeys(x.device for x in away):
        integers = [x for x in away if x.device == device and id(x) not in copies]
        if integers:
            flat = torch.cat([x.reshape(-1).long() for x in integers])
            here = _room(flat.numel(), device).copy_(flat).split([x.numel() for x in integers])
            copies |= {id(x): part.view(x.shape).to(x.dtype) for x, part in zip(integers, here, strict=True)}
    return tuple(copies.get(id(x), x) for x in given)


def waits(*given: torch.Tensor | None) -> bool:
    """Whether the host waits for a device in `on_host`."""
    return any(x is not None and not on_this_host(x) and _before_sent(x) is None for x in given)


def on_this_host(x: torch.Tensor) -> bool:
    return not _away(x.device)


def sent(device: torch.device, x: torch.Tensor) -> torch.Tensor:
    """A copy on a device of a tensor of the host, for which the host does not wait; nor does `on_host` for the values
    of this copy, as long as neither is written to."""
    if not _away(device) or x.device.type != "cpu":
        return x.to(device)
    copy = torch.empty_like(x, device=device)
    copy.copy_(x.pin_memory() if device.type == "cuda" else x, non_blocking=True)
    if not (x.is_inference() or copy.is_inference()):  # these have no version
        _SENT[copy] = x, x._version, copy._version
    return copy


def _before_sent(copy: torch.Tensor) -> torch.Tensor | None:
    """The tensor of the host that `sent` made a copy of, if both are as they were."""
    known = _SENT.get(copy)
    return None if known is None or known[1:] != (known[0]._version, copy._version) else known[0]


class Fetched:
    """Tensors of a device on their way to the host. Work that is launched later does not hold them up."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._tensors, self._there = tensors, None  # type: tuple[torch.Tensor, ...], torch.cuda.Event | None
        if tensors[0].device.type == "cuda":
            self._tensors = tuple(
                torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
                for x in tensors
            )
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> tuple[torch.Tensor, ...]:
        """They themselves, in the host's memory."""
        if self._there is not None:
            self._there.synchronize()
        return self._tensors


def on_device(device: torch.device, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Copies of int64 tensors [n] of the host on a device: parts of one copy, for which the host does not wait."""
    if not _away(device):
        return given
    # Each begins at a multiple of 16 bytes, which launches of kernels by address rely on.
    sizes = [n for x in given for n in (x.numel(), x.numel() % 2)]
    packed = _room(sum(sizes), device)
    for part, x in zip(packed.split(sizes)[::2], given, strict=True):
        part.copy_(x)
    return packed.to(device, non_blocking=True).split(sizes)[::2]


def _away(device: torch.device) -> bool:
    return device.type != "cpu"


def _room(size: int, device: torch.device) -> torch.Tensor:
    """Memory of the host that a CUDA device copies from and to without a copy between."""
    return torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
