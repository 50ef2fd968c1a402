"""What the smaller files and folders hold that these commands write; each is recognised by its content."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cropi.amounts import counted
from cropi.bulk import check_bulk
from cropi.errors import CropiError, printable
from cropi.files import entries, is_file, is_there, reading, size_of
from cropi.form import check_form, is_number
from cropi.model.sources import ADAPTER, named_base
from cropi.sealed import SUMS, check_sums

# Keys by which a JSON object is what `cropi check --out` wrote.
CHECK = {"error", "theory", "findings", "method"}
# The same of `cropi bench --out`.
BENCH = {"machine", "versions", "table"}
STAGES = "stages.jsonl"  # of the curriculum inside TRL
ANEW = {"for", "tokens", "spent", "ids", "drift"}


def told(lines: Iterable[str], kind: str, **figures: Any) -> dict[str, Any]:
    """Print the lines, and return the same for ``--json``."""
    for line in lines:
        print(printable(line))
    return {"kind": kind, **figures}


def describe_folder(path: Path) -> dict[str, Any] | None:
    """What ``cropi run`` or a curriculum wrote, or a folder of dumps; None: a store."""
    from cropi.curriculum.state import NAME
    from cropi.ranking.selection_files import SELECTED
    from cropi.ranking.table import SCORES
    from cropi.store.manifest import MANIFEST

    if is_file(path / MANIFEST):
        return None
    # datasets' save_to_disk has a file of that name, too, and describes itself in another one.
    if is_file(path / NAME) and not is_there(path / "dataset_info.json"):
        return _curriculum(path, path / NAME)
    if any(is_there(path / name) for name in (SCORES, SELECTED, "sketches")):
        return _run(path)
    for stages in (path / STAGES, path / "cropi" / STAGES):
        if is_file(stages) and (described := describe_rows(stages)) is not None:
            return described
    return (
        None
        if any(entries(path, of_dumps) for of_dumps in ("*.jsonl", "*.parquet", "completions*"))
        else _model(path)
    )


def _model(path: Path) -> dict[str, Any] | None:
    """A model's or an adapter's folder, or that of a training with its checkpoints; None: neither."""
    saved = [
        one.name
        for one in entries(path, "checkpoint-*")
        if any(is_file(one / name) for name in ("config.json", ADAPTER))
    ]
    step = " saved by a trainer," if is_file(path / "trainer_state.json") else ""
    more = f"; beside it {', '.join(saved)}" if saved else ""
    if not is_file(path / "config.json"):
        if base := named_base(path):
            return told(
                [f"adapter       {path}: of {printable(base)},{step} for --model{more}"], "adapter", base=base
            )
        if not saved:
            return None
        text = f"training      {path}: no rollouts, the models {', '.join(saved)}"
        return told([text], "training", models=saved)
    try:
        with reading(path):
            held = json.loads((path / "config.json").read_text("utf-8", "replace"))
    except (ValueError, RecursionError):
        held = None
    if not isinstance(held, dict) or not isinstance(held.get("model_type"), str):
        return None
    kind = ", ".join(map(str, held.get("architectures") or [held["model_type"]]))
    return told([f"model         {path}: {kind},{step} for --model{more}"], "model", architecture=kind)


def describe_file(path: Path) -> dict[str, Any] | None:
    """A file that holds no trajectories; None: it may."""
    if not os.path.isfile(path):
        return None
    check_sums(path)
    with reading(path, missing=True):
        return _file(path)


def _file(path: Path) -> dict[str, Any] | None:
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith(b"\x89PNG"):
        return told([f"picture       {path} (PNG)"], "picture")
    if head.startswith(b"\x93NUMPY"):
        return _matrix(path)
    if b"<!doctype html" in head[:200].lower():
        return _page(path, head)
    if path.suffix == SUMS:
        lines = path.read_text("utf-8", "replace").splitlines()
        return told(
            [f"checksums     {path}: of {len(lines)} files; `sha256sum -c` compares them"], "checksums"
        )
    if path.suffix in (".yaml", ".yml", ".toml"):
        return _config(path)
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start in (b"{", b"[") and size_of(path) < 2**26:
        return _json(path)
    if path.suffix == ".txt" or (
        start and start not in (b"{", b"[") and b"\x00" not in head and path.suffix == ""
    ):
        return _ids(path)
    return None


def describe_rows(path: str | Path) -> dict[str, Any] | None:
    """Rows that are not trajectories: a selection, prompts alone, exported sketches; None: they may be trajectories."""
    from cropi.data.forms import is_prompt
    from cropi.data.readers import first_row, rows_without_checks
    from cropi.errors import RecordError

    try:
        _, row = first_row(path)
    except (RecordError, CropiError):
        return None
    keys = {key for key, value in row.items() if value is not None}
    if {"id", "rank"} <= keys and keys & {"fused", "value"}:
        return _selection(path, row, rows_without_checks(path))
    if {"stage", "step", "dataset", "selected"} <= keys:
        return _stages(path, list(rows_without_checks(path)))
    if {"id", "row", "norm"} <= keys and not keys & {"prompt", "responses"}:
        count = sum(1 for _ in rows_without_checks(path))
        return told([f"rows          {path}: the prompts of {count} rows of a matrix"], "rows", prompts=count)
    if {"id", "helpful", "harmful"} <= keys:
        count = sum(1 for _ in rows_without_checks(path))
        return told(
            [f"neighbours    {path}: of {counted(count, 'validation prompt')}"], "neighbours", prompts=count
        )
    if "sketch" in keys and "id" in keys:
        count = sum(1 for _ in rows_without_checks(path))
        size = len(row["sketch"])
        return told(
            [f"sketches      {path}: {count} rows of {size} numbers"], "sketches", prompts=count, dim=size
        )
    if {"prompt", "reward_model"} <= keys and not keys & {"responses", "rewards", "response_ids"}:
        return _prompts(path, row, "prompts of verl", rows_without_checks(path))
    if {"custom_id", "body"} <= keys:
        return _prompts(path, row, "requests of a batch", rows_without_checks(path))
    if is_prompt(row):
        return _prompts(path, row, "prompts", rows_without_checks(path))
    return None


def _prompts(path: Any, row: Mapping[str, Any], what: str, rows: Iterable[Any]) -> dict[str, Any]:
    from cropi.data.forms import dotted_names

    count = sum(1 for _ in rows)
    remedy = f"`cropi rollout` samples and scores them{dotted_names(row)}"
    return told(
        [f"prompts       {path}: {count} {what}, without responses; {remedy}",
         f"columns       {', '.join(map(str, row))}"],
        "prompts", prompts=count, columns=list(map(str, row)),
    )  # fmt: skip


def _selection(path: Any, first: Mapping[str, Any], rows: Iterable[Any]) -> dict[str, Any]:
    best, count = list[str](), 0
    for count, row in enumerate(rows, 1):
        check_form(row, {"id": (str, int), "scores?": dict}, str(path), "make it again", f"row {count}")
        if count <= 5:
            best.append(str(row["id"]))
    sets = list(first.get("scores") or [key for key in first if key.startswith("score[")])
    how = f" by {first['method']}" if "method" in first else ""
    return told(
        [f"selection     {path}: {counted(count, 'prompt')}{how}, best first: {', '.join(best)}"
         + (", ..." if count > 5 else ""), f"sets          {', '.join(map(str, sets))}"],
        "selection", selected=count, method=first.get("method"), stage=first.get("stage"),
    )  # fmt: skip


def _run(path: Path) -> dict[str, Any]:
    from cropi.ranking.selection_files import SELECTED, selected_rows
    from cropi.ranking.table import SCORES, read_scores
    from cropi.store.store import SketchStore

    lines, facts = [f"run           {path}"], dict[str, Any]()
    for folder in filter(Path.is_dir, entries(path / "sketches")):
        store = SketchStore.open(folder)
        part = (
            ""
            if len(store) >= store.expected
            else f" of {store.expected} (unfinished; the same command goes on)"
        )
        lines.append(f"sketches      {folder.name}: {len(store)} prompts{part}")
        facts.setdefault("stores", {})[folder.name] = {"prompts": len(store), "expected": store.expected}
    if is_file(path / SCORES):
        scores = read_scores(path / SCORES)
        facts |= {"prompts": len(scores.rows), "usable": int(scores.usable.sum()), "sets": scores.sets}
        lines.append(
            f"scores        {int(scores.usable.sum())} of {len(scores.rows)} prompts against "
            f"{', '.join(map(repr, scores.sets))}"
        )
    if is_file(path / SELECTED):
        facts["selected"] = sum(1 for _ in selected_rows(path / SELECTED))
        lines.append(f"selected      {counted(facts['selected'], 'prompt')}")
    else:
        lines.append("unfinished    nothing is selected yet; the same command goes on")
    rest = [
        name for name in ("config.yaml", "check.json", "report.html", "scores.png") if is_there(path / name)
    ]
    if rest:
        lines.append(f"beside        {', '.join(rest)}")
    return told(lines, "run", **facts)


def _curriculum(path: Path, state: Path) -> dict[str, Any]:
    from cropi.curriculum.state import read_state

    data = read_state(state)
    done = [(entry["stage"], entry["step"], entry["seconds"]) for entry in data["done"]]
    started = data.get("started")
    lines = [f"curriculum    {path}: {len({stage for stage, *_ in done})} stages begun"]
    lines += [f"  stage {stage:<5} {step}: {seconds:.1f} s" for stage, step, seconds in done]
    if started:
        lines.append(
            f"unfinished    stage {started['stage']}, {started['step']}; the same command goes on with it"
        )
    return told(
        lines, "curriculum", done=[{"stage": a, "step": b, "seconds": c} for a, b, c in done], started=started
    )


def _stages(path: str | Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    lines = [f"curriculum    {path}: {len(rows)} stages begun, inside TRL"]
    for row in rows:
        # With `live`, the prompts that a step's backward pass has shown until then.
        known = f"{row['seen']} seen before" if "seen" in row else f"{row.get('usable')} with a gradient"
        pool = f" of {row['pool']}, {known}" if "pool" in row else ", all of the dataset"
        number = str(row.get("stage"))
        lines.append(f"  stage {number:<5} from step {row.get('step')}: {row.get('selected')} prompts{pool}")
    return told(lines, "curriculum", stages=rows)


def _matrix(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        held = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise CropiError(f"{path} is a damaged NumPy file, or holds objects ({str(error)[:200]})") from error
    shape = list(held.shape)
    return told(
        [f"matrix        {path}: {shape} {held.dtype} (NumPy)"], "matrix", shape=shape, dtype=str(held.dtype)
    )


def _page(path: Path, head: bytes) -> dict[str, Any]:
    title = re.search(rb"<title>(.*?)</title>", head, re.S | re.I)
    words = title[1].decode("utf-8", "replace").strip() if title else "a page"
    return told([f"page          {path}: {words}"], "page", title=words)


def _config(path: Path) -> dict[str, Any]:
    from cropi.cli.config import read_config

    held = read_config(path)
    return told(
        [f"config        {path}", *(f"{name:<22} {value}" for name, value in held.items())],
        "config",
        options=held,
    )


def _json(path: Path) -> dict[str, Any] | None:
    data = path.read_bytes()
    check_bulk(data, path)
    try:
        held = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None  # lines, or damaged: whoever reads records says how
    if isinstance(held, dict) and held.keys() >= CHECK:
        from cropi.report.forms import CHECKED
        from cropi.sealed import read_sealed

        held = read_sealed(path, CHECKED, "make it again with `cropi check`")
        lines = [
            f"check         {path}: error {held['error']:.4f}, theory {held['theory']:.4f} ({held['method']})"
        ]
        lines += [
            f"{one.get('level', ''):<8}  {one.get('name')}  {one.get('text')}" for one in held["findings"]
        ]
        return told(lines, "check", error=held["error"], theory=held["theory"], findings=held["findings"])
    if isinstance(held, dict) and held.keys() >= BENCH:
        from cropi.bench.table import FORM, Table
        from cropi.sealed import read_sealed

        held = read_sealed(path, FORM, "measure again with `cropi bench`")
        lines = [
            f"figures       {path}: {held['machine']['processor']}",
            *Table.of_dict(held["table"]).lines(),
        ]
        return told(lines, "bench", machine=held["machine"], versions=held["versions"], table=held["table"])
    if isinstance(held, dict) and held.keys() >= ANEW:
        from cropi.pipeline.rescoring import read_plan

        held = read_plan(path)
        pays = "all" if held["tokens"] is None else f"{held['tokens']:,.0f} tokens"
        text = f"stage {held['for']['stage']} sketches {len(held['ids'])} prompts anew, {held['spent']:,.0f} tokens"
        return told(
            [f"anew          {path}: {text}; the budget pays for {pays}"],
            "anew", prompts=len(held["ids"]), spent=held["spent"], tokens=held["tokens"],
        )  # fmt: skip
    if isinstance(held, list) and held and all(type(one) is int for one in held):
        return told(
            [f"indices       {path}: {len(held)} row numbers of a dataset, best first"],
            "indices",
            rows=len(held),
        )
    if isinstance(held, list) and held and all(map(is_number, held)):
        some = sum(one > 0 for one in held)
        return told(
            [f"weights       {path}: {len(held)} rows of a dataset, {some} above 0, sum {sum(held):.4g}"],
            "weights", rows=len(held), above_zero=some, sum=sum(held),
        )  # fmt: skip
    return None


def _ids(path: Path) -> dict[str, Any] | None:
    from cropi.ranking.selection_files import selected_rows

    rows = selected_rows(path)
    first = [row["id"] for row in itertools.islice(rows, 5)]
    count = len(first) + sum(1 for _ in rows)
    return told([f"ids           {path}: {count} prompts: {', '.join(first)}"], "ids", ids=count)
