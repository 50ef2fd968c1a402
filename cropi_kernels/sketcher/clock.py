"""Time spent on a device, without making the host wait for it in between."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Marks on the host's clock, or for a CUDA device on its current stream; `seconds` waits for the marks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def mark(self) -> float | torch.cuda.Event:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = self.mark()
        try:
            yield
        finally:
            self._spans.append((start, self.mark()))

    @staticmethod
    def between(start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        if isinstance(start, float) or isinstance(end, float):
            assert isinstance(start, float) and isinstance(end, float)
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1000.0

    def seconds(self) -> float:
        """The sum of all timed spans."""
        return sum(self.between(start, end) for start, end in self._spans)
