"""How much memory of this process is resident, as Linux counts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def resident(field: str = "VmRSS") -> int:
    """Bytes that are resident now, or at the peak so far ("VmHWM")."""
    return int(Path("/proc/self/status").read_text(encoding="utf-8").split(f"{field}:")[1].split()[0]) * 1024


def peak(work: Callable[[], Any]) -> int:
    """Bytes that are resident at the peak of ``work``; an earlier peak does not count."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    work()
    return resident("VmHWM")
