"""Small charts as SVG text: densities with a cut and its band, and bars of two shares. They hold numbers only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM = 360, 150, 6, 18


def density(
    pool: np.ndarray,
    chosen: np.ndarray,
    *,
    cut: float | None = None,
    noise: float | None = None,
    bins: int = 40,
    ends: tuple[float, float] | None = None,
) -> str:
    """Histograms of all scores and of the chosen ones on one axis, as shares of each; the cut, and ``cut +- noise``.

    The axis has the given ends, or those of the scores.
    """
    pool, chosen = pool[np.isfinite(pool)], chosen[np.isfinite(chosen)]
    if not len(pool):
        return _drawn(['<text x="8" y="20">no finite value</text>'], "no finite value")
    low, high = ends or _apart(float(pool.min()), float(pool.max()))
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(x, edges)[0] / max(len(x), 1) for x in (pool, chosen)]
    top = max(float(s.max()) for s in shares) or 1.0
    plot = HEIGHT - BOTTOM - 8

    def x(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - 2 * LEFT)

    step = (WIDTH - 2 * LEFT) / bins
    parts = []
    if cut is not None and noise is not None and np.isfinite(noise):
        a, b = max(low, cut - noise), min(high, cut + noise)
        parts.append(
            f'<rect class="band" x="{x(a):.1f}" y="4" width="{max(x(b) - x(a), 1):.1f}" height="{plot + 4}"/>'
        )
    for share, name, inset in ((shares[0], "pool", 0.0), (shares[1], "chosen", 0.3)):
        for i, value in enumerate(share):
            if value > 0:
                size = max(value / top * plot, 0.8)
                parts.append(
                    f'<rect class="{name}" x="{LEFT + (i + inset / 2) * step:.1f}" y="{8 + plot - size:.1f}" '
                    f'width="{step * (1 - inset) - 0.5:.1f}" height="{size:.1f}"/>'
                )
    if cut is not None:
        parts.append(f'<line class="cut" x1="{x(cut):.1f}" x2="{x(cut):.1f}" y1="4" y2="{8 + plot}"/>')
    base = 8 + plot
    spans = [
        f"{len(held)} {name}, {held.min():.3g} to {held.max():.3g}, median {np.median(held):.3g}"
        for name, held in (("in all", pool), ("chosen", chosen)) if len(held)
    ]  # fmt: skip
    words = "; ".join(spans) + ("" if cut is None else f"; cut at {cut:.3g}")
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{base}" y2="{base}"/>')
    for value, anchor in ((low, "start"), ((low + high) / 2, "middle"), (high, "end")):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - 4}" text-anchor="{anchor}">{value:.3g}</text>')
    return _drawn(parts, f"histogram: {words}")


def bars(pool: Sequence[float], chosen: Sequence[float]) -> list[str]:
    """For each line of a table: two bars, the share of the pool and the share of the choice."""
    top = max([*pool, *chosen, 1e-9])
    return [
        f'<svg viewBox="0 0 160 18" width="160" height="18" aria-hidden="true">'
        f'<rect class="pool" x="0" y="1" width="{160 * a / top:.1f}" height="7"/>'
        f'<rect class="chosen" x="0" y="10" width="{160 * b / top:.1f}" height="7"/></svg>'
        for a, b in zip(pool, chosen, strict=True)
    ]


def signed(values: Sequence[float]) -> list[str]:
    """For each line of a table: a bar to the right of the middle for a positive number, to the left for a negative."""
    top = max([*map(abs, values), 1e-9])
    ends = [80 * value / top for value in values]
    return [
        f'<svg viewBox="0 0 160 18" width="160" height="18" aria-hidden="true">'
        f'<line class="axis" x1="80" x2="80" y1="0" y2="18"/>'
        f'<rect class="chosen" x="{80 + min(end, 0.0):.1f}" y="4" width="{abs(end):.1f}" height="10"/></svg>'
        for end in ends
    ]


def _apart(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis, which are not equal in the digits that are written at it."""
    if f"{low:.3g}" != f"{high:.3g}":
        return low, high
    half = abs(high) / 100 if high > low else max(0.5, abs(high) / 100)
    return low - half, high + half


def line(values: Sequence[float | None], *, low: float | None = None, high: float | None = None) -> str:
    """One value a stage, from stage 0 on, as a line with a dot for each; None leaves a gap."""
    known = [float(v) for v in values if v is not None and np.isfinite(v)]
    if not known:
        return _drawn(['<text x="8" y="20">not known</text>'], "not known")
    bottom = min(known) if low is None else low
    top = max(known) if high is None else high
    bottom, top = _apart(bottom, top)
    plot, left, wide = HEIGHT - BOTTOM - 16, 44, WIDTH - 60

    def place(i: int, value: float) -> tuple[float, float]:
        across = left + wide * (i / (len(values) - 1) if len(values) > 1 else 0.5)
        return across, 8 + plot * (1 - (value - bottom) / (top - bottom))

    parts = [f'<line class="axis" x1="{left}" x2="{left + wide}" y1="{8 + plot}" y2="{8 + plot}"/>']
    last: tuple[float, float] | None = None
    for i, value in enumerate(values):
        here = None if value is None or not np.isfinite(value) else place(i, float(value))
        if here is not None and last is not None:
            parts.append(
                f'<line class="trend" x1="{last[0]:.1f}" y1="{last[1]:.1f}" x2="{here[0]:.1f}" y2="{here[1]:.1f}"/>'
            )
        if here is not None:
            parts.append(f'<circle class="chosen" cx="{here[0]:.1f}" cy="{here[1]:.1f}" r="3"/>')
        last = here
    for value in (bottom, top):
        parts.append(
            f'<text x="{left - 4}" y="{place(0, value)[1] + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for i in sorted({0, len(values) - 1}):
        parts.append(f'<text x="{place(i, bottom)[0]:.1f}" y="{HEIGHT - 4}" text-anchor="middle">{i}</text>')
    stages = (f"stage {i}: {v:.3g}" for i, v in enumerate(values) if v is not None and np.isfinite(v))
    return _drawn(parts, ", ".join(stages))


def _drawn(parts: Sequence[str], words: str) -> str:
    """The chart, with what a screen reader says of it: a picture without words is silence there."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'
