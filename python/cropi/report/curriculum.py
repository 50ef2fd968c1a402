"""The page of a curriculum: what changed from stage to stage, and whether anything was learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi.atomic import write_atomic
from cropi.errors import CropiError
from cropi.files import is_file, is_there
from cropi.ranking.table import SCORES
from cropi.report.charts import line
from cropi.report.forms import REPORT
from cropi.report.rendering import markup, rendered
from cropi.sealed import read_sealed

SETTLED = 0.9  # a choice that keeps so much of the last one hardly depends on the stage


def is_curriculum(folder: Path) -> bool:
    """Whether a folder is one that ``cropi curriculum`` wrote."""
    return is_file(folder / "report.json") and not is_there(folder / SCORES)


def curriculum_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a curriculum's folder, from its ``report.json``; returns the page's path.

    Raises:
        CropiError: the file is damaged, or no stage has begun.
    """
    root = Path(folder)
    remedy = "run the same `cropi curriculum` again, which writes it"
    document = read_sealed(root / "report.json", REPORT, remedy, writer="`cropi curriculum`")
    if not document["stages"]:
        raise CropiError(f"{root}: no stage of the curriculum has begun, so there is nothing to report")
    page = root / "report.html" if out is None else Path(out)
    values = _values(root, document, document["stages"], document["settings"])
    write_atomic(page, rendered("curriculum.html", **values))
    return page


def _values(
    root: Path, document: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "title": f"Curriculum: {root.name}", "planned": document.get("planned", len(stages)),
        "steps": settings["train"]["steps"], "model": settings["sketch"]["model"],
        "fingerprint": document["fingerprint"], "stages": [_row(root, row) for row in stages],
        "verdict": _verdict(document, stages), "charts": _charts(stages),
    }  # fmt: skip


def _pair(row: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    before, after = (row.get("training") or {}).get(name) or (None, None)
    return before, after


def _row(root: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    def number(value: Any, form: str = "") -> str:
        return "-" if value is None else format(value, form)

    before, after = _pair(row, "reward")
    equal = _pair(row, "equal_rewards")[1]
    page = Path(f"stage-{row['stage']:02d}") / "report.html"
    cells = [
        str(row["stage"]), number(row.get("prompts")), number(row.get("usable")), number(row.get("selected")),
        number(row.get("overlap"), ".0%"), number(before, ".4g"), number(after, ".4g"), number(equal, ".0%"),
        number(row.get("select_seconds"), ".1f"), number(row["seconds"].get("train"), ".1f"),
    ]  # fmt: skip
    return {"stage": row["stage"], "cells": cells, "page": str(page) if is_file(root / page) else ""}


def _verdict(document: Mapping[str, Any], stages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    lines = [{"level": "warning", "name": "learning", "text": text} for text in document.get("warnings", ())]
    rewards = [value for row in stages for value in _pair(row, "reward") if value is not None]
    if not rewards:
        text = (
            "the trainer left no training.json in {out}, so that reward and learning are not known "
            "(docs/curriculum.md has its form)"
        )
        lines.append({"level": "warning", "name": "reward", "text": text})
    elif not lines:
        text = f"from {rewards[0]:.4g} at the first stage to {rewards[-1]:.4g} at the last"
        lines.append(
            {"level": "ok" if rewards[-1] > rewards[0] else "warning", "name": "reward", "text": text}
        )
    overlaps = [row["overlap"] for row in stages if row.get("overlap") is not None]
    if overlaps:
        mean = sum(overlaps) / len(overlaps)
        text = f"a stage keeps {mean:.0%} of the choice before it, on average"
        if mean > SETTLED:
            text += "; choosing less often would cost little"
        lines.append({"level": "ok", "name": "choice", "text": text})
    shares = [row["select_share"] for row in stages if "select_share" in row]
    if shares:
        text = f"choosing takes {sum(shares) / len(shares):.0%} of a stage's time"
        lines.append({"level": "ok", "name": "cost", "text": text})
    bounded = [row for row in stages if row.keys() >= {"anew", "left"}]
    if bounded:
        last = bounded[-1]
        text = f"{last['anew']} of {last['anew'] + last['left']} prompts were scored anew in stage {last['stage']}"
        lines.append({"level": "ok", "name": "budget", "text": text})
    for row in stages:
        if row.get("cut_short"):
            text = f"stage {row['stage']} was cut short and taken up again in {', '.join(row['cut_short'])}"
            lines.append({"level": "ok", "name": "restarts", "text": text})
    return lines


def _charts(stages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    charts = []

    def add(name: str, values: Sequence[float | None], text: str, **limits: float) -> None:
        if any(value is not None for value in values):
            charts.append({"name": name, "chart": markup(line(values, **limits)), "text": text})

    add("reward", [_pair(row, "reward")[1] for row in stages], "at the end of each stage's training")
    add("equal rewards", [_pair(row, "equal_rewards")[1] for row in stages],
        "share of prompts that taught nothing", low=0.0, high=1.0)  # fmt: skip
    rates = [(row.get("pass_rate") or {}).get("selected") for row in stages]
    add("pass rate of the chosen", rates, "of their stored responses", low=0.0, high=1.0)
    add(
        "kept from the last stage",
        [row.get("overlap") for row in stages],
        "share of the choice",
        low=0.0,
        high=1.0,
    )
    for name in sorted({name for row in stages for name in row.get("scores") or {}}):
        means = [(row.get("scores") or {}).get(name, {}).get("selected") for row in stages]
        add(f"score for {name}", means, "mean over the chosen prompts")
    add(
        "share of the time that choosing takes",
        [row.get("select_share") for row in stages],
        "",
        low=0.0,
        high=1.0,
    )
    return charts
