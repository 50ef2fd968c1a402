"""Medians of calls that take turns, so that a slow period of the machine affects all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

LEAST = 0.02  # seconds of one measurement: short calls are repeated


def once(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of a call, of ``repeats`` in a row."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begun) / repeats


def medians(calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int) -> list[float]:
    """The median seconds of each call, over rounds in which they take turns in a rotating order."""
    repeats = []
    for call in calls:
        once(call, device, 1)  # compiles, allocates
        repeats.append(max(1, min(1000, round(LEAST / max(once(call, device, 1), 1e-7)))))
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for i in range(len(calls)):
            place = (i + turn) % len(calls)
            times[place].append(once(calls[place], device, repeats[place]))
    return [median(values) for values in times]
