"""One self-contained HTML page for a selection: what was chosen, why, and whether to believe it.

Everything is in the file: no request leaves it (a content policy forbids them). Text of prompts and responses enters
the page as data that a script writes with ``textContent``, or escaped by the template; nothing in it is markup.
"""

from __future__ import annotations

import base64
import gzip
import heapq
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cropi.data.records import PromptGroup
from cropi.data.rewards import no_gradient_reason
from cropi.errors import CropiError
from cropi.files import write_atomic
from cropi.ranking.contributions import mean_contributions
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection, select
from cropi.ranking.table_rows import values_of
from cropi.ranking.uncertainty import Uncertainty
from cropi.report.charts import bars, density, signed
from cropi.report.policy import is_close, policy_text
from cropi.report.rendering import markup, part, rendered, shown

if TYPE_CHECKING:
    from cropi.ranking.pairwise import Neighbour

FULL = 120  # prompts of each kind (best, at the cut, worst, without a score, largest norm) whose responses are shown
SNIPPET = 70  # characters of the other prompts
LONG = 6000  # characters of one text at most, and at least; fewer are shown where the page would be too large
SHORT = 200
MOST_BYTES = 1_900_000  # of the data, packed: with base64 and the rest a page is below 3 MB
MOST_VALUES = 2_000_000  # of the browser's table, in which 100,000 prompts have 20 columns: a page of 8 MB
MOST_TASKS = 500  # that can be filtered by
STATUSES = ("ok", "skipped", "failed")


@dataclass
class ReportInput:
    """What a report shows; everything but scores and selection may be missing.

    Attributes:
        groups: the training prompts' records, all of them or those that :func:`shown_in_full` names.
        uncertainty_missing: why there is no ``uncertainty``.
        neighbours: the nearest and the most opposed training prompts of some validation prompts, by their ids.
        check: :meth:`cropi.report.check_report.CheckReport.to_dict`.
        run: lines of configuration and cost.
        command: the command line that repeats the run.
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
    packed = base64.b64encode(_packed(_data(given))).decode()
    return rendered("page.html", **_values(given), script=markup(part("page.js")), data=packed)


def _packed(data: dict[str, Any]) -> bytes:
    """The data as compressed JSON. Texts are cut to half, and half again, until they fit beside the table, or into half
    of the room where that takes more."""
    size, details = LONG, data["details"]
    room = max(MOST_BYTES - len(_compressed(data | {"details": {}})), MOST_BYTES // 2)
    while len(_compressed(details)) > room and size > SHORT:
        size //= 2
        for detail in details.values():
            for one in (detail, *detail["responses"]):
                one["text"] = one["text"][:size]
    return _compressed(data)


def _compressed(data: Any) -> bytes:
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return gzip.compress(text, 6, mtime=0)


# ------------------------------------------------------------------------------------------------ the page
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
    texts = given.validation_texts
    return {
        "title": given.title, "prompts": len(scores.rows), "ranked": len(usable), "chosen": len(chosen),
        "method": selection.method, "sets": sets, "unfinished": given.unfinished,
        "model": str(model.get("weights", "unknown") if isinstance(model, dict) else model or "unknown")[:16],
        "stage": str(origin.get("stage", "unknown")),
        "verdict": _verdict(given), "choice": _choice(sure),
        "choice_missing": given.uncertainty_missing,
        "composition": _composition(scores, usable, chosen), "overlap": _overlap(scores, selection),
        "groups": _groups(scores, chosen),
        "tasks": sorted(task for task, _ in _tasks(scores).most_common(MOST_TASKS)),
        "listed": len(listed(given)),
        "neighbours": [
            {"name": name, "text": _cut(texts.get(name, ""), SNIPPET), "helpful": pair[0], "harmful": pair[1]}
            for name, pair in given.neighbours.items()
        ],
        "policy": _policy(scores, chosen), "anatomy": _anatomy(given.check), "run": list(given.run),
        "command": given.command,
    }  # fmt: skip


def _tasks(scores: Scores) -> Counter[str]:
    return Counter(task for task in _column(scores, "task") if task)


def _column(scores: Scores, key: str, places: np.ndarray | None = None) -> list[Any]:
    """One attribute of the prompts, or their entry in ``extra``; rows that a file holds by columns are not made."""
    return values_of(scores.rows, key, np.arange(len(scores.rows)) if places is None else places)


def _verdict(given: ReportInput) -> list[dict[str, str]]:
    """The lines of the strip: level, name, text."""
    scores, sure = given.scores, given.uncertainty
    lines = []

    def add(level: str, name: str, text: str) -> None:
        lines.append({"level": level, "name": name, "text": text})

    unscored = len(scores.rows) - int(scores.usable.sum())
    failed = _column(scores, "status").count("failed")
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
        add("warning", "sketch error", "not measured on this model: run `cropi check`")
    if sure is None:
        add("warning", "choice", f"not resampled: {given.uncertainty_missing}")
    else:
        level = "ok" if sure.overlap >= 0.75 else "warning" if sure.overlap >= 0.5 else "failed"
        add(
            level,
            "choice",
            f"{sure.overlap:.0%} of the chosen prompts would stay with other validation prompts",
        )
        weak = [s for s in sure.sets if s.prompts < 2 or s.signal <= 0.2]
        for one in weak:
            add("warning", "validation", one.advice())
    median, sample = _median(scores, "ratio"), _median(scores, "ess")
    if median is not None:
        add("ok" if is_close(median, sample) else "warning", "policy", policy_text(median, sample))
    return lines


def _choice(sure: Uncertainty | None) -> dict[str, Any] | None:
    if sure is None:
        return None
    lines = [
        {
            "name": one.name, "prompts": one.prompts, "overlap": sure.overlap_of_set[one.name],
            "signal": f"{one.signal:.2f}" if math.isfinite(one.signal) else "–", "advice": one.advice(),
        }
        for one in sure.sets
    ]  # fmt: skip
    drawn = sure.p_selected[np.isfinite(sure.p_selected) & (sure.p_selected > 0)]
    chart = markup(density(drawn, np.array([]), bins=20))
    return {
        "overlap": sure.overlap,
        "responses": sure.responses,
        "halves": sure.halves,
        "draws": sure.draws,
        "lines": lines,
        "chart": chart,
    }


def _composition(scores: Scores, usable: np.ndarray, chosen: np.ndarray) -> list[dict[str, Any]]:
    """Tables of shares: by task, by pass rate, by length, by where the prompt comes from."""
    lengths = np.array(_column(scores, "tokens", usable))
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
            return [task or "(none)" for task in _column(scores, "task", places)]
        if kind == "pass rate":
            return [rate(value) for value in _column(scores, "pass_rate", places)]
        if kind == "scored tokens":
            return [length(tokens) for tokens in _column(scores, "tokens", places)]
        sources = zip(_column(scores, "source", places), _column(scores, "set", places))
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
        counts = counts[:30]
        drawn = bars([c[1] for c in counts], [c[2] for c in counts])
        lines = [
            {"name": n, "pool": a, "chosen": b, "bars": markup(svg)}
            for (n, a, b), svg in zip(counts, drawn, strict=True)
        ]
        tables.append({"name": name, "lines": lines})
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
        if method != selection.method:
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
    pairs = zip(_column(scores, "status"), _column(scores, key))
    return [value if status == "ok" else None for status, value in pairs]


def _policy(scores: Scores, chosen: np.ndarray) -> dict[str, Any]:
    median, sample = _median(scores, "ratio"), _median(scores, "ess")
    if median is None:
        return {
            "text": "Not known: the score table holds no ratio (it comes from an earlier release).",
            "charts": [],
        }
    charts = []
    for key, name in (("ratio", "mean ratio of a prompt's tokens"), ("ess", "effective sample size, share of tokens"),
                      ("clipped", "share of clipped tokens")):  # fmt: skip
        values = np.array([np.nan if value is None else value for value in _of_ok(scores, key)])
        if np.isfinite(values).any():
            charts.append({"name": name, "chart": markup(density(values, values[chosen]))})
    return {"text": policy_text(median, sample) + ".", "charts": charts}


def _anatomy(check: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if not check or not check.get("by_type"):
        return []
    types = sorted(check["by_type"].items(), key=lambda pair: -pair[1])[:16]
    layers = sorted(check.get("by_layer", {}).items(), key=lambda pair: int(pair[0]))
    return [{"name": "type of parameter", "lines": types}, {"name": "layer", "lines": layers}]


# ------------------------------------------------------------------------------------------ the prompt browser
def _data(given: ReportInput) -> dict[str, Any]:
    """What the script shows: columns over the prompts that are listed, and the full text of some."""
    scores, selection, sure = given.scores, given.selection, given.uncertainty
    rank = {i: place for place, i in enumerate(selection.order, 1)}
    places, near = listed(given), near_the_cut(selection)
    rows = [scores.rows[i] for i in places]
    full = {scores.rows[i].id for i in shown_in_full(scores, selection)}
    snippets, details = _texts(given.groups, full, {row.id for row in rows})
    columns: dict[str, list[Any]] = {
        "rank": [rank.get(i) for i in places],
        "id": [shown(row.id) for row in rows],
        "task": [shown(row.task or "") for row in rows],
        "pass": [round(row.pass_rate, 4) for row in rows],
        "norm": [_digits(row.norm) if row.status == "ok" else None for row in rows],
        "tokens": [row.tokens for row in rows],
    }
    for v in range(len(scores.sets)):
        columns[f"score{v}"] = [_digits(x) for x in scores.table[places, v]]
        if sure is not None and sure.stderr.shape == scores.table.shape:
            columns[f"se{v}"] = [_digits(x) for x in sure.stderr[places, v]]
    if sure is not None and len(sure.p_selected) == len(scores.rows):
        columns["p"] = [_digits(x) for x in sure.p_selected[places]]
    for key in ("ratio", "ess"):
        if any(key in row.extra for row in rows):
            columns[key] = [_digits(row.extra.get(key)) for row in rows]
    reasons = [STATUSES[0], *sorted({f"{row.status}: {row.reason}" for row in rows if row.status != "ok"})]
    place = {reason: i for i, reason in enumerate(reasons)}
    columns["status"] = [0 if row.status == "ok" else place[f"{row.status}: {row.reason}"] for row in rows]
    if snippets:
        columns["text"] = [snippets.get(row.id, "") for row in rows]
    return {
        "columns": columns, "sets": [shown(name) for name in scores.sets], "statuses": reasons,
        "chosen": len(selection.chosen), "ranked": len(selection.order), "near": near,
        "details": {shown(name): detail for name, detail in details.items()},
        "nodetail": "(its responses are not in this page: they are kept for the best, the worst and those at the cut)"
        if snippets else "(the trajectory files were not given)",
    }  # fmt: skip


def listed(given: ReportInput) -> list[int]:
    """The prompts in the browser's table, as rows of the score table: all, or as many as :data:`MOST_VALUES` allows.

    These are the ones that are shown in full, the neighbours, and others in equal steps down the ranking and then
    through the prompts without a score.
    """
    scores, selection = given.scores, given.selection
    most = MOST_VALUES // (12 + 2 * len(scores.sets))
    if len(scores.rows) <= most:
        return list(range(len(scores.rows)))
    names = {one.id for pair in given.neighbours.values() for side in pair for one in side}
    some = shown_in_full(scores, selection) | {i for i, name in enumerate(scores.ids) if name in names}
    ranked = set(selection.order)
    others = [*selection.order, *(i for i in range(len(scores.rows)) if i not in ranked)]
    steps = np.linspace(0, len(others) - 1, max(most - len(some), 0)).round().astype(np.int64)
    return sorted(some | {others[i] for i in steps.tolist()})


def shown_in_full(scores: Scores, selection: Selection) -> set[int]:
    """The prompts whose text and responses are shown whole, as rows of the table.

    The best, the worst, those at the cut, those without a score for another reason than equal rewards, and those with
    the largest gradients.
    """
    near = near_the_cut(selection)
    order, cut = selection.order, len(selection.chosen)
    some = {*order[:FULL], *order[-FULL:], *order[max(0, cut - near) : cut + near][:FULL]}
    equal = no_gradient_reason([1.0, 1.0])
    states = enumerate(zip(_column(scores, "status"), _column(scores, "reason")))
    unscored = [i for i, (status, reason) in states if status != "ok" and reason != equal]
    norms = _column(scores, "norm")
    largest = heapq.nsmallest(20, range(len(norms)), key=lambda i: -norms[i])
    return some | set(unscored[:FULL]) | set(largest)


def near_the_cut(selection: Selection) -> int:
    """How many places on either side of the last chosen prompt count as "at the cut"."""
    return max(5, len(selection.chosen) // 10)


def _texts(
    groups: Iterable[PromptGroup], full: set[str], some: set[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    snippets, details = {}, {}
    for group in groups:
        if group.id not in some:
            continue
        prompt = _conversation(group.prompt) or "(token ids)"
        snippets[group.id] = _cut(" ".join(prompt.split()), SNIPPET)
        if group.id in full:
            rewards = group.rewards
            advantages = _advantages(rewards)
            responses = group.responses or ["(token ids)"] * len(rewards)
            details[group.id] = _long(prompt) | {
                "responses": [
                    _long(_conversation(text)) | {"reward": reward, "advantage": round(a, 4)}
                    for text, reward, a in zip(responses, rewards, advantages, strict=True)
                ]
            }
    return snippets, details


def _advantages(rewards: Sequence[float]) -> list[float]:
    if no_gradient_reason(rewards) is not None:
        return [0.0] * len(rewards)
    from cropi.gradient.estimators import group_advantages  # which imports torch: a table alone needs none

    advantages: list[float] = group_advantages(rewards).tolist()
    return advantages


def _conversation(text: Any) -> str:
    """A prompt or response as text; of messages, each with its role."""
    if isinstance(text, str):
        return text
    return "\n\n".join(f"[{m.get('role', '')}] {m.get('content', '')}" for m in text or [])


def _long(text: str) -> dict[str, Any]:
    """The beginning of a text, and how many characters it has."""
    return {"text": shown(text[:LONG])[:LONG], "size": len(text)}


def _cut(text: str, size: int) -> str:
    text = text if len(text) <= size else text[: size - 1] + "…"
    return shown(text)


def _digits(x: Any) -> float | None:
    """Five digits, None for what is not a finite number."""
    return float(f"{x:.5g}") if x is not None and math.isfinite(x) else None
