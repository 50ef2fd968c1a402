"""The prompts in the browser of a report page: which are listed, which are shown whole, and the data of its script."""

from __future__ import annotations

import gzip
import heapq
import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cropi.data.chat import last_text
from cropi.data.records import PromptGroup
from cropi.data.rewards import no_gradient_reason
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection
from cropi.ranking.table_rows import values_of
from cropi.report.rendering import shown
from cropi.report.snippets import Snippets

if TYPE_CHECKING:
    from cropi.report.html import ReportInput

FULL = 120  # prompts of each kind (best, at the cut, worst, without a score, largest norm) whose responses are shown
LONG, SHORT = 6000, 200  # characters of one text at most; as few as these where the page would be too large
MOST_BYTES = 1_900_000  # of the data, packed: with base64 and the rest a page is below 3 MB
MOST_VALUES = 2_000_000  # of the browser's table, in which 100,000 prompts have 20 columns: a page of 8 MB
STATUSES = ("ok", "skipped", "failed")


def packed(given: ReportInput) -> bytes:
    """The browser's data as compressed JSON. Texts are cut to half, and half again, until they fit beside the table, or
    into half of the room where that takes more."""
    data = _data(given)
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


def _data(given: ReportInput) -> dict[str, Any]:
    """What the script shows: columns over the prompts that are listed, and the full text of some."""
    scores, selection, sure = given.scores, given.selection, given.uncertainty
    # They are of the scores, whatever was chosen by these.
    stderr = scores.stderr if sure is None else sure.stderr
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
        "norm": [_digits(row.norm, 3) if row.status == "ok" else None for row in rows],
        "tokens": [row.tokens for row in rows],
    }
    for v in range(len(scores.sets)):
        columns[f"score{v}"] = [_digits(x, 4) for x in scores.table[places, v]]
        if stderr is not None and stderr.shape == scores.table.shape:
            columns[f"se{v}"] = [_digits(x, 4) for x in stderr[places, v]]
    if sure is not None and len(sure.p_selected) == len(scores.rows):
        columns["p"] = [_digits(x, 2) for x in sure.p_selected[places]]
    for key, decimals in (("ratio", 3), ("ess", 2)):
        if any(key in row.extra for row in rows):
            columns[key] = [_digits(row.extra.get(key), decimals) for row in rows]
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
    states = enumerate(zip(values_of(scores.rows, "status"), values_of(scores.rows, "reason")))
    unscored = [i for i, (status, reason) in states if status != "ok" and reason != equal]
    norms = values_of(scores.rows, "norm")
    largest = heapq.nsmallest(20, range(len(norms)), key=lambda i: -norms[i])
    return some | set(unscored[:FULL]) | set(largest)


def near_the_cut(selection: Selection) -> int:
    """How many places on either side of the last chosen prompt count as "at the cut"."""
    return max(5, len(selection.chosen) // 10)


def _texts(
    groups: Iterable[PromptGroup], full: set[str], some: set[str]
) -> tuple[dict[str, str], dict[str, Any]]:
    snippets, details = Snippets(), {}
    for group in groups:
        if group.id not in some:
            continue
        prompt = _conversation(group.prompt) or "(token ids)"
        # The beginning of a conversation is a system message or a solved example, the same for all prompts.
        snippets.add(group.id, group.task, last_text(group.prompt) or prompt)
        if group.id in full:
            rewards = group.rewards
            advantages = rewards if group.demonstrations else _advantages(rewards)
            responses = group.responses or ["(token ids)"] * len(rewards)
            details[group.id] = _long(prompt) | {
                "responses": [
                    _long(_conversation(text)) | {"reward": reward, "advantage": round(a, 4)}
                    for text, reward, a in zip(responses, rewards, advantages, strict=True)
                ]
            }
    return snippets.lines(), details


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


def _digits(x: Any, places: int) -> float | None:
    """Five digits, and more where the script would write another number to ``places`` decimals than the table of
    `cropi run` does: 0.123449996 is 0.1234, and its five digits 0.12345 are 0.1235. None for what is not finite."""
    if x is None or not math.isfinite(x):
        return None
    written = f"{x:.{places}f}"
    shorter = (float(f"{x:.{digits}g}") for digits in (5, 7, 9))
    return next((value for value in shorter if f"{value:.{places}f}" == written), float(x))
