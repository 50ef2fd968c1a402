"""The time that work takes on a device, measured without making the host wait for each piece of it.

Two events around each of several hundred pieces of work cost the host more than the launches of that work. So on a CUDA
device spans are measured in passes 1, 2, 4, 8, ...; in between, the latest share of the pass stands for them.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property

import torch

_NOTHING = contextlib.nullcontext()


class Clock:
    """Marks on the host's clock, or for a CUDA device on its current stream; `seconds` waits for the marks.

    ``number``: of this pass, from 1 on. ``measures``: whether spans are measured in it.
    """

    def __init__(self, device: torch.device, number: int = 1) -> None:
        self._device = device if device.type == "cuda" else None
        self.measures = self._device is None or number & (number - 1) == 0
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def mark(self) -> float | torch.cuda.Event:
        if self._device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def timed(self) -> contextlib.AbstractContextManager[None]:
        """``with clock.timed():`` adds a span, where spans are measured."""
        return _Span(self) if self.measures else _NOTHING

    def add(self, start: float | torch.cuda.Event) -> None:
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


class Seconds(Mapping[str, float]):
    """Spans by name. The first look at them waits until the device has done the work, and none before.

    >>> Seconds(lambda: {"forward": 0.5})
    {'forward': 0.5}
    """

    def __init__(self, measure: Callable[[], dict[str, float]]) -> None:
        self._measure = measure

    @cached_property
    def _measured(self) -> dict[str, float]:
        return self._measure()

    def __getitem__(self, name: str) -> float:
        return self._measured[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._measured)

    def __len__(self) -> int:
        return len(self._measured)

    def __repr__(self) -> str:
        return repr(self._measured)

    def __reduce__(self) -> tuple[type[dict[str, float]], tuple[dict[str, float]]]:
        """Pickled and deeply copied as a plain table: events of a device cannot leave the process."""
        return dict, (self._measured,)


class _Span:
    """A plain object: entered hundreds of times a batch, where a generator's context manager costs more."""

    __slots__ = ("_clock", "_start")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __enter__(self) -> None:
        self._start = self._clock.mark()

    def __exit__(self, *error: object) -> None:
        self._clock.add(self._start)
