"""What a sketching job did: counts, speed, where the time went, memory and coverage."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cropi.gradient.behaviour_check import Finding
from cropi.gradient.health import Health
from cropi.store.rows import FAILED, OK, RowInfo
from cropi.store.store import SketchStore


@dataclass
class Summary:
    """Counts and times of one job. ``seconds`` holds forward, backward and sketch (a part of the other two).

    ``cost``: of the prompts that were computed (:func:`cropi.sketching.rows.cost_of`).
    ``health``: ratios of all tokens of this run; ``finding``: of the few that were looked at before it.
    """

    out: Path
    read: int = 0
    resumed: int = 0
    sketched: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    failed: list[tuple[str, str]] = field(default_factory=list)
    bad_records: list[str] = field(default_factory=list)
    scored_tokens: int = 0
    model_tokens: int = 0
    cost: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    wall: float = 0.0
    coverage: str = ""
    peak_gib: float = 0.0
    interrupted: bool = False
    health: Health = field(default_factory=Health)
    behaviour: str = ""
    finding: Finding | None = None
    store: SketchStore | None = field(default=None, repr=False)

    def add(self, seconds: Mapping[str, float], wall: float, model_tokens: int, scored_tokens: int) -> None:
        """Add one micro-batch."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self.wall += wall
        self.model_tokens += model_tokens
        self.scored_tokens += scored_tokens

    def count(self, row: RowInfo) -> None:
        """Count a finished prompt."""
        if row.status == OK:
            self.sketched += 1
        elif row.status == FAILED:
            self.failed.append((row.id, row.reason))
        else:
            self.skipped[row.reason] += 1

    def to_dict(self) -> dict[str, Any]:
        """The same in JSON's types."""
        return {
            "store": str(self.out), "read": self.read, "stored_before": self.resumed, "sketched": self.sketched,
            "skipped": dict(self.skipped), "failed": dict(self.failed), "bad_records": self.bad_records,
            "model_tokens": self.model_tokens, "scored_tokens": self.scored_tokens, "seconds": dict(self.seconds),
            "wall_seconds": self.wall, "peak_gib": self.peak_gib, "behaviour": self.behaviour,
            "ratio": self.health.ratio if self.health.tokens else None,
            "ess": self.health.ess if self.health.tokens else None,
            "clipped": self.health.clipped if self.health.tokens else None, "interrupted": self.interrupted,
        }  # fmt: skip

    def text(self, coverage: bool = True) -> str:
        """A few lines for the terminal; ``coverage``: with what was sketched of the model."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        skipped = f"{sum(self.skipped.values())} skipped" + (f" ({reasons})" if reasons else "")
        lines = [
            f"prompts       {self.read} read, {self.sketched} sketched, {skipped}, {len(self.failed)} failed"
            + (f", {self.resumed} from before" if self.resumed else ""),
        ]
        lines += [f"  failed      {name}: {reason}" for name, reason in self.failed[:10]]
        if len(self.failed) > 10:
            lines.append(f"  ...         and {len(self.failed) - 10} more (see `cropi info {self.out}`)")
        if self.bad_records:
            lines.append(f"bad records   {len(self.bad_records)} left out; the first: {self.bad_records[0]}")
        if self.wall > 0 and self.model_tokens:
            forward, backward, sketch = (self.seconds[name] for name in ("forward", "backward", "sketch"))
            lines += [
                f"tokens        {self.model_tokens} through the model, {self.scored_tokens} scored, "
                f"{self.model_tokens / self.wall:.0f} tokens/s",
                f"time          {self.wall:.1f} s: forward {forward / self.wall:.0%}, backward "
                f"{backward / self.wall:.0%}, of which {sketch / self.wall:.0%} for sketching",
            ]
        if self.behaviour in ("file", "model") and self.health.tokens:
            lines.append(
                f"behaviour     {self.behaviour}; ratio {self.health.ratio:.3g}, effective sample size "
                f"{self.health.ess:.0%}, clipped {self.health.clipped:.0%}"
            )
        elif self.behaviour:
            lines.append(f"behaviour     {self.behaviour} (ratio 1)")
        lines.append(f"peak memory   {self.peak_gib:.2f} GiB")
        if coverage and self.coverage:
            lines.append(f"parameters    {self.coverage}")
        return "\n".join(lines)


def peak_memory_gib(device: torch.device) -> float:
    """The largest amount of memory held so far: of the process, or of torch on a CUDA device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
