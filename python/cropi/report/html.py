"""One self-contained HTML page for a selection: what was chosen, why, and whether to believe it.

Everything is in the file: no request leaves it (a content policy forbids them). Text of prompts and responses enters
the page as data that a script writes with ``textContent``, or escaped by the template; nothing in it is markup.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cropi.atomic import write_atomic
from cropi.data.records import PromptGroup
from cropi.data.rewards import PASS_REWARD
from cropi.errors import CropiError
from cropi.ranking.contributions import mean_contributions
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection, select
from cropi.ranking.table_rows import values_of
from cropi.ranking.uncertainty import Uncertainty, sets_of
from cropi.ranking.values import BY_REWARDS
from cropi.report import browser
from cropi.report.charts import bars, density, signed
from cropi.report.policy import TAKEN, is_close, policy_text
from cropi.report.rendering import markup, part, rendered
from cropi.report.snippets import Snippets

if TYPE_CHECKING:
    from cropi.ranking.pairwise import Neighbour

MOST_TASKS = 500  # that can be filtered by
MOST_LINES = 30  # of a table of shares


@dataclass
class ReportInput:
    """What a report shows; everything but scores and selection may be missing.

    Attributes:
        groups: the training prompts' records, all of them or those of :func:`cropi.report.browser.shown_in_full`.
        uncertainty_missing: why there is no ``uncertainty``.
        neighbours: the nearest and the most opposed training prompts of some validation prompts, by their ids.
        check: :meth:`cropi.report.check_report.CheckReport.to_dict`.
        run: lines of configuration and cost.
        command: the command line that repeats the run.
        checked: the arguments of ``cropi check`` that name the run's model and training files.
        unfinished: what the run has not done yet, in words.
    """

    scores: Scores
    selection: Selection
    groups: Iterable[PromptGroup] = ()
    uncertainty: Uncertainty | None = None
    uncertainty_missing: str = "the stores of sketches are not beside the scores"
    neighbours: Mapping[str, tuple[list[Neighbour], list[Neighbour]]] = field(default_factory=dict)
    validation_texts: Mapping[str, str] = field(default_factory=dict)
    check: Mapping[str, Any] | None = None
    run: Sequence[tuple[str, str]] = ()
    command: str = ""
    checked: str = "--model MODEL --trajectories TRAIN"
    unfinished: str = ""
    title: str = "Selection report"


def write_report(path: str | Path, given: ReportInput) -> None:
    """Write the page.

    Args:
        path: the file; it should end in .html.
        given: what to show.

    Raises:
        CropiError: no prompt has a score, or the file cannot be written.
    """
    if not given.scores.usable.any():
        raise CropiError("there is nothing to report: no training prompt has a score")
    write_atomic(Path(path), render(given))


def render(given: ReportInput) -> str:
    """The page as text."""
    packed = base64.b64encode(browser.packed(given)).decode()
    return rendered("page.html", **_values(given), script=markup(part("page.js")), data=packed)


def _values(given: ReportInput) -> dict[str, Any]:
    scores, selection, sure = given.scores, given.selection, given.uncertainty
    usable, chosen = np.flatnonzero(scores.usable), np.array(selection.chosen)
    sets = []
    for v, name in enumerate(scores.sets):
        column = scores.table[usable, v]
        cut = float(np.sort(column)[::-1][min(len(chosen), len(column)) - 1])
        of_set = None if sure is None else next((s for s in sure.sets if s.name == name), None)
        noise = None if of_set is None else of_set.stderr_at_cut
        chart = density(column, scores.table[chosen, v], cut=cut, noise=noise)
        sets.append(
            {
                "name": name, "chart": markup(chart), "prompts": None if of_set is None else of_set.prompts,
                "stderr": noise if noise is not None and math.isfinite(noise) else None,
            }
        )  # fmt: skip
    origin = scores.meta.get("train") or {}
    model = origin.get("model")
    texts = Snippets()
    for name in given.neighbours:
        texts.add(name, None, given.validation_texts.get(name, ""))
    lines = texts.lines()
    return {
        "title": given.title, "prompts": len(scores.rows), "ranked": len(usable), "chosen": len(chosen),
        "method": selection.method, "sets": sets, "score": _score(scores.meta), "pass_reward": PASS_REWARD,
        "unfinished": given.unfinished,
        "model": str(model.get("weights", "unknown") if isinstance(model, dict) else model or "unknown")[:16],
        "model_name": dict(given.run).get("model given as"),
        "stage": str(origin.get("stage", "unknown")),
        "verdict": _verdict(given), "choice": _choice(sure),
        "choice_missing": given.uncertainty_missing,
        "and_responses": " and all responses" if sure is not None and sure.responses else "",
        "fixed": _fixed(selection.settings), "composition": _composition(scores, usable, chosen),
        "overlap": _overlap(scores, selection),
        "groups": _groups(scores, chosen),
        "tasks": sorted(task for task, _ in _tasks(scores).most_common(MOST_TASKS)),
        "listed": len(browser.listed(given)),
        "neighbours": [
            {"name": name, "text": lines[name], "helpful": pair[0], "harmful": pair[1]}
            for name, pair in given.neighbours.items()
        ],
        "policy": _policy(scores, chosen), "anatomy": _anatomy(given.check), "run": list(given.run),
        "command": given.command,
    }  # fmt: skip


def _score(meta: Mapping[str, Any]) -> str:
    """A sentence: what a score is. Empty for a table that does not say it, and for sums of several."""
    if "metric" not in meta or "weights" in meta:
        return ""
    metric = {"dot": "dot product"}.get(meta["metric"], meta["metric"])
    whose = "the set's mean gradient"
    if meta.get("mean") == "normalised":
        whose = "the mean direction of the set's gradients"
    if meta.get("aggregate") == "nearest":
        whose = "one of the set's, the largest"
    less = ""
    if "minus" in meta:
        less = f", less {meta['minus_weight']:g} times that with the set {meta['minus']!r}"
    return f"A score is the {metric} of a prompt's gradient with {whose}{less}. "


def _tasks(scores: Scores) -> Counter[str]:
    return Counter(task for task in values_of(scores.rows, "task") if task)


def _verdict(given: ReportInput) -> list[dict[str, str]]:
    """The lines of the strip: level (a finding's, or "open" for what was not measured), name, text."""
    scores, sure = given.scores, given.uncertainty
    lines = []

    def add(level: str, name: str, text: str) -> None:
        lines.append({"level": level, "name": name, "text": text})

    unscored = len(scores.rows) - int(scores.usable.sum())
    failed = values_of(scores.rows, "status").count("failed")
    add(
        "warning" if failed else "ok",
        "prompts",
        f"{len(scores.rows)} read, {int(scores.usable.sum())} with a gradient, {len(given.selection.chosen)} chosen, "
        f"{unscored - failed} without a gradient, {failed} failed",
    )
    for finding in (given.check or {}).get("findings", []):
        if finding["name"] in ("sketch error", "layout", "batch", "attention"):
            add(finding["level"], finding["name"], finding["text"])
    if given.check is None:
        add(
            "open",
            "sketch error",
            f"not measured on this model: run `cropi check {given.checked} --out FOLDER/check.json`, "
            "then `cropi report FOLDER`; FOLDER is where this page lies",
        )
    if sure is None:
        add("warning", "choice", f"not resampled: {given.uncertainty_missing}")
    else:
        drawn = ["validation prompts", "responses"][: 2 if sure.responses else 1]
        level = "ok" if sure.overlap >= 0.75 else "warning" if sure.overlap >= 0.5 else "failed"
        add(
            level,
            "choice",
            f"{sure.overlap:.0%} of the chosen prompts would stay with other {' and other '.join(drawn)}"
            + ("" if level == "ok" else f"; more {' and more '.join(drawn)} make the choice surer"),
        )
    # A set's signal is the same for every choice; standard errors at the cut are not.
    sets = sets_of(scores) if sure is None else sure.sets
    for one in sets:
        if one.signal <= 0.2 or (sure is not None and one.few):
            add("warning", "validation", one.advice(len(sets) == 1))
    median, sample = _median(scores, "ratio"), _median(scores, "ess")
    if _without_ratio(scores):
        add("ok", "policy", TAKEN)
    elif median is not None:
        add("ok" if is_close(median, sample) else "warning", "policy", policy_text(median, sample))
    return lines


def _choice(sure: Uncertainty | None) -> dict[str, Any] | None:
    if sure is None:
        return None
    lines = [
        {
            "name": one.name, "prompts": one.prompts, "overlap": sure.overlap_of_set[one.name],
            "signal": f"{max(one.signal, 0):.2f}" if math.isfinite(one.signal) else "–",
            # Name and number stand in the row's first cells.
            "advice": one.advice(len(sure.sets) == 1)
            .removeprefix(f"{one.name}: {one.prompts} prompts")
            .lstrip(",; "),
        }
        for one in sure.sets
    ]  # fmt: skip
    drawn = sure.p_selected[np.isfinite(sure.p_selected) & (sure.p_selected > 0)]
    chart = markup(density(drawn, np.array([]), bins=20, ends=(0.0, 1.0)))
    return {
        "overlap": sure.overlap,
        "responses": sure.responses,
        "halves": sure.halves,
        "draws": sure.draws,
        "lines": lines,
        "chart": chart,
    }


def _fixed(settings: Mapping[str, Any]) -> str:
    """The options that fixed shares of the choice: those are no finding."""
    parts = [f"--per {settings['per']}"] if settings.get("per", "pool") != "pool" else []
    quota = settings.get("quota")
    if isinstance(quota, (list, tuple)) and quota:
        parts += ["--quota", *map(str, quota)]
    return " ".join(parts)


def _composition(scores: Scores, usable: np.ndarray, chosen: np.ndarray) -> list[dict[str, Any]]:
    """Tables of shares: by task, by pass rate, by length, by where the prompt comes from."""
    lengths = np.array(values_of(scores.rows, "tokens", usable))
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]).round()) if len(lengths) else np.array([])

    def length(tokens: int) -> str:
        place = int(np.searchsorted(edges, tokens))
        low = "0" if place == 0 else f"{edges[place - 1]:.0f}"
        return f"over {low}" if place == len(edges) else f"{low} to {edges[place]:.0f}"

    def rate(value: float) -> str:
        # Four times a finite number need not be one.
        low = min(int(max(min(value, 1.0), -1e9) * 4), 3) / 4
        return f"{low:.2f} to {low + 0.25:.2f}"

    def named(places: np.ndarray, kind: str) -> list[str]:
        if kind == "task":
            return [task or "(none)" for task in values_of(scores.rows, "task", places)]
        if kind == "pass rate":
            return [rate(value) for value in values_of(scores.rows, "pass_rate", places)]
        if kind == "scored tokens":
            return [length(tokens) for tokens in values_of(scores.rows, "tokens", places)]
        sources = zip(values_of(scores.rows, "source", places), values_of(scores.rows, "set", places))
        return [str(source or of_set or "(none)") for source, of_set in sources]

    tables = []
    for name in ("task", "pass rate", "scored tokens", "source"):
        pool, some = (named(places, name) for places in (usable, chosen))
        everywhere, here = Counter(pool), Counter(some)
        if len(everywhere) < 2 and name != "task":
            continue
        counts = [(p, everywhere[p] / len(pool), here[p] / max(len(some), 1)) for p in sorted(everywhere)]
        if name in ("task", "source"):
            counts.sort(key=lambda line: -line[2])
        every, counts = len(counts), counts[:MOST_LINES]
        drawn = bars([c[1] for c in counts], [c[2] for c in counts])
        lines = [
            {"name": n, "pool": a, "chosen": b, "bars": markup(svg)}
            for (n, a, b), svg in zip(counts, drawn, strict=True)
        ]
        tables.append({"name": name, "lines": lines, "every": every})
    return tables


def _groups(scores: Scores, chosen: np.ndarray) -> list[dict[str, Any]]:
    """For each set: the mean contributions of groups of parameters over the pool and over the choice."""
    if scores.contributions is None:
        return []
    tables = []
    for name, pool, some in zip(scores.sets, *mean_contributions(scores, chosen.tolist()), strict=True):
        drawn = map(markup, signed(some - pool))
        lines = [
            {"name": group, "pool": a, "chosen": b, "bar": bar}
            for group, a, b, bar in zip(scores.groups, pool, some, drawn, strict=True)
        ]
        tables.append({"name": name, "lines": lines, "pool": pool.sum(), "chosen": some.sum()})
    return tables


def _overlap(scores: Scores, selection: Selection) -> dict[str, Any]:
    """Choices of one size: this one, every set alone, and the baselines."""
    n = len(selection.chosen)
    choices = {"this choice": np.array(selection.chosen)}
    usable = np.flatnonzero(scores.usable)
    if len(scores.sets) > 1:
        for v, name in enumerate(scores.sets):
            best = usable[np.argsort(-scores.table[usable, v], kind="stable")[:n]]
            choices[f"{name} alone"] = best
    fraction = n / len(scores.rows)
    for method in ("max", "random", "learnability"):
        known = method not in BY_REWARDS or scores.estimator.get("centred", True)
        if known and method != selection.method:
            choices[method] = np.array(select(scores, fraction=fraction, method=method).chosen)
    masks = {name: np.zeros(len(scores.rows), dtype=bool) for name in choices}
    for name, chosen in choices.items():
        masks[name][chosen] = True
    table = [[np.count_nonzero(masks[a][chosen]) / n for chosen in choices.values()] for a in choices]
    return {"names": list(choices), "table": table}


def _median(scores: Scores, key: str) -> float | None:
    values = [value for value in _of_ok(scores, key) if value is not None]
    return float(np.median(values)) if values else None


def _of_ok(scores: Scores, key: str) -> list[Any]:
    """A figure of every prompt that was sketched, None of the others."""
    pairs = zip(values_of(scores.rows, "status"), values_of(scores.rows, key))
    return [value if status == "ok" else None for status, value in pairs]


def _without_ratio(scores: Scores) -> bool:
    """Whether the training store is of gradients without a ratio, or of one that was taken for 1."""
    origin = scores.meta.get("train")
    behaviour = origin.get("behaviour") if isinstance(origin, dict) else None
    taken = isinstance(behaviour, dict) and behaviour.get("source") == "current"
    return scores.estimator.get("ratio") is False or taken


def _policy(scores: Scores, chosen: np.ndarray) -> dict[str, Any]:
    median, sample = _median(scores, "ratio"), _median(scores, "ess")
    if _without_ratio(scores):
        return {"text": TAKEN + ".", "charts": []}
    if median is None:
        return {"text": "Not known: the score table holds no ratio.", "charts": []}
    charts = []
    for key, name in (("ratio", "mean ratio of a prompt's tokens"), ("ess", "effective sample size, share of tokens"),
                      ("clipped", "share of clipped tokens")):  # fmt: skip
        values = np.array([np.nan if value is None else value for value in _of_ok(scores, key)])
        if np.isfinite(values).any() and (key != "clipped" or np.nanmax(values) > 0):
            charts.append({"name": name, "chart": markup(density(values, values[chosen]))})
    return {"text": policy_text(median, sample) + ".", "charts": charts}


def _anatomy(check: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not check or not check.get("by_type"):
        return []
    types = sorted(check["by_type"].items(), key=lambda pair: -pair[1])[:16]
    layers = sorted(check.get("by_layer", {}).items(), key=lambda pair: int(pair[0]))
    return [{"name": "type of parameter", "lines": types}, {"name": "layer", "lines": layers}]
