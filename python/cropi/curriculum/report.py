"""The report of a curriculum: a row per stage, as Markdown for people and as JSON for programs."""

from __future__ import annotations

import json
from typing import Any

from cropi.atomic import write_atomic
from cropi.curriculum.learnt import nothing_learnt
from cropi.curriculum.plan import Plan
from cropi.curriculum.state import State
from cropi.errors import printable
from cropi.report.curriculum import curriculum_page
from cropi.sealed import sealed

CHOOSING = ("sketch", "influence", "select")


def rows(state: State) -> list[dict[str, Any]]:
    """One object per stage that has begun; what a stage has not reached is missing from its object."""
    table: list[dict[str, Any]] = []
    for number in sorted({entry["stage"] for entry in state.data["done"]}):
        done = {entry["step"]: entry for entry in state.data["done"] if entry["stage"] == number}
        row: dict[str, Any] = {"stage": number}
        if sketch := done.get("sketch"):
            row |= {key: sketch[key] for key in ("prompts", "usable", "without_gradient", "weights")}
            row |= {key: sketch[key] for key in ("anew", "left") if key in sketch}
            row["behaviour"] = {"train": sketch["train"]["behaviour"]} | {
                name: store["behaviour"] for name, store in sketch["valid"].items()
            }
        if select := done.get("select"):
            row |= {key: select[key] for key in ("selected", "scores", "pass_rate", "kept_from_last")}
            kept, last = select["kept_from_last"], select["last"]
            row["overlap"] = kept / last if last and kept is not None else None
        if "training" in (trained := done.get("train", {})):
            row["training"] = trained["training"]
        if collect := done.get("collect"):
            row["model"] = collect["model"]
        seconds = {step: entry["seconds"] for step, entry in done.items()}
        row["seconds"] = seconds
        row["select_seconds"] = sum(seconds.get(step, 0.0) for step in CHOOSING)
        if "collect" in done:
            row["select_share"] = row["select_seconds"] / max(sum(seconds.values()), 1e-9)
        row["cut_short"] = [step for step, entry in done.items() if entry["attempts"] > 1]
        table.append(row)
    return table


def write_report(plan: Plan, state: State) -> None:
    """Write ``report.json``, ``report.md`` and the page ``report.html``."""
    table = rows(state)
    document = {
        "settings": plan.settings(), "fingerprint": plan.fingerprint(), "planned": plan.stages, "stages": table,
        "warnings": nothing_learnt(table),
    }  # fmt: skip
    write_atomic(plan.out / "report.json", json.dumps(sealed(document), indent=1, ensure_ascii=False) + "\n")
    write_atomic(plan.out / "report.md", _markdown(plan, table))
    if table:
        curriculum_page(plan.out)


def _markdown(plan: Plan, table: list[dict[str, Any]]) -> str:
    sets = sorted({name for row in table for name in row.get("scores", {})})
    scores = [f"score on {_cell(name)}" for name in sets]
    bounded = any(row.keys() >= {"anew", "left"} for row in table)
    again = ["scored anew"] if bounded else []
    head = ["stage", "prompts", "usable", *again, "selected", *scores, "pass rate", "kept", "reward", "equal rewards",
            "rollouts s", "select s", "train s", "selection's share", "new policy"]  # fmt: skip
    lines = [
        f"# Curriculum {plan.out.name}", "",
        f"{plan.stages} stages of {plan.steps} steps from `{plan.model}`; settings `{plan.fingerprint()}`.", "",
        "| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |",
    ]  # fmt: skip
    lines += ["| " + " | ".join(_cells(row, sets, bounded)) + " |" for row in table]
    lines += [
        "",
        "Score and pass rate: mean over the selected prompts, and in brackets over all usable ones. Kept: prompts of "
        "the last selection that were selected again. Reward and equal rewards (the share of prompts whose "
        "responses have equal rewards, which teach nothing): from the first to the last quarter of what the training "
        "logged. Select: sketch, influence and selection; its share is of "
        "the whole stage. Seconds are of the attempt that finished a step.",
    ]
    for text in nothing_learnt(table):
        lines += ["", f"**Warning.** {text}"]
    for row in table:
        if row["cut_short"]:
            lines += [
                "",
                f"Stage {row['stage']} was cut short and taken up again in: {', '.join(row['cut_short'])}.",
            ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A name in a cell of a Markdown table."""
    return printable(text).replace("|", "\\|")


def _change(row: dict[str, Any], name: str, form: str) -> str:
    before, after = row.get("training", {}).get(name) or (None, None)
    return "-" if before is None or after is None else f"{before:{form}} to {after:{form}}"


def _cells(row: dict[str, Any], sets: list[str], bounded: bool) -> list[str]:
    def score(name: str) -> str:
        values = row.get("scores", {}).get(name)
        return f"{values['selected']:.4f} ({values['pool']:.4f})" if values else "-"

    def seconds(step: str) -> str:
        return f"{row['seconds'][step]:.1f}" if step in row["seconds"] else "-"

    again = f"{row['anew']} of {row['anew'] + row['left']}" if row.keys() >= {"anew", "left"} else "-"
    rate, kept = row.get("pass_rate"), row.get("kept_from_last")
    return [
        str(row["stage"]), str(row.get("prompts", "-")), str(row.get("usable", "-")),
        *([again] if bounded else []),
        str(row.get("selected", "-")),
        *map(score, sets), f"{rate['selected']:.2f} ({rate['pool']:.2f})" if rate else "-",
        "-" if kept is None or row["overlap"] is None else f"{kept} ({row['overlap']:.0%})",
        _change(row, "reward", ".4g"), _change(row, "equal_rewards", ".0%"), seconds("rollouts"),
        f"{row['select_seconds']:.1f}", seconds("train"),
        f"{row['select_share']:.1%}" if "select_share" in row else "-", row.get("model", "-"),
    ]  # fmt: skip


def line(entry: dict[str, Any]) -> str:
    """A finished step in one line, for the log."""
    step, took = entry["step"], f"{entry['seconds']:.1f} s"
    if step == "sketch":
        text = f"{entry['usable']} of {entry['prompts']} training prompts have a gradient; "
        text += f"behaviour: {entry['train']['behaviour']}"
        if "anew" in entry:
            text += f"; {entry['anew']} scored anew, {entry['left']} by earlier sketches or not yet"
    elif step == "influence":
        text = f"{entry['scored']} prompts against {', '.join(map(repr, entry['sets']))}"
    elif step == "select":
        kept = (
            "" if entry["kept_from_last"] is None else f", {entry['kept_from_last']} of them selected before"
        )
        scores = ", ".join(
            f"{name} {values['selected']:.4f} (all: {values['pool']:.4f})"
            for name, values in entry["scores"].items()
        )
        text = f"{entry['selected']} of {entry['prompts']} prompts{kept}; mean score: {scores}"
    elif step == "collect":
        text = f"the new policy is {entry['model']}"
        if "replaced" in entry:
            text += f"; {entry['replaced']} records replaced by newer ones"
    else:
        text = "done"
    return f"{step}: {text} ({took})"
