"""The files of a selection: the chosen ids (``selected.jsonl``), and the chosen prompts' trajectory records."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropi.atomic import replacing
from cropi.data.forms import content_id
from cropi.data.readers import read
from cropi.errors import CropiError, shown, warn
from cropi.files import reading
from cropi.form import check_form, is_number
from cropi.ranking.repeated import Hashes
from cropi.ranking.scores import Scores
from cropi.sealed import check_sums, summed

if TYPE_CHECKING:
    from cropi.ranking.selection import Selection


SELECTED, RECORDS = "selected.jsonl", "selected_trajectories.jsonl"  # their names in a folder of results
REMEDY = "make it again (lines that you write yourself need an id alone)"
_PART = 4096  # lines that are made at once
_LINE = {"id": (str, int), "fused?": is_number, "method?": str, "scores?": dict}  # of a selection file


def write_selection(path: str | Path, scores: Scores, selection: Selection) -> None:
    """Write ``selected.jsonl``: id, rank (from 1), fused value, method, scores per set, stage and model, best
    first."""
    origin = scores.meta.get("train") or {}
    model = origin.get("model")
    values: dict[str, Any] = {
        "id": _At(0), "rank": _At(1), "fused": _At(2), "method": selection.method,
        "scores": {name: _At(3 + v) for v, name in enumerate(scores.sets)},
        "stage": origin.get("stage"),
        "model": model.get("weights") if isinstance(model, dict) else model,
    }  # fmt: skip
    names, order, summed_order = selection.ids, list[int](), list[int]()
    line = _form(values, order, ensure_ascii=False)[:-1] + ', "check": "%08x"}\n'
    summed_line = _form(values, summed_order, sort_keys=True)
    with replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for begin in range(0, len(names), _PART):
            places = selection.chosen[begin : begin + _PART]
            columns = [
                _texts(names[begin : begin + _PART]),
                _texts(list(range(begin + 1, begin + 1 + len(places)))),
                _texts(selection.fused[places].tolist()),
                *(_texts(scores.table[places, v].tolist()) for v in range(len(scores.sets))),
            ]
            sums = [
                zlib.crc32((summed_line % row).encode()) for row in zip(*(columns[i] for i in summed_order))
            ]
            columns[0] = _texts(names[begin : begin + _PART], ensure_ascii=False)
            file.writelines(line % row for row in zip(*(columns[i] for i in order), sums))


class _At(int):
    """The place of a value that is another one in every line."""


def _form(value: Any, order: list[int], **options: Any) -> str:
    """``json.dumps(value, **options)`` with ``%s`` for what is another value in every line; the places of these values
    are added to ``order``. A ``json.dumps`` for each line and one for its checksum took half of the time of
    `cropi select`."""
    if isinstance(value, _At):
        order.append(value)
        return "%s"
    if isinstance(value, dict):
        items = sorted(value.items()) if options.get("sort_keys") else value.items()
        texts = (f"{_form(key, order, **options)}: {_form(one, order, **options)}" for key, one in items)
        return f"{{{', '.join(texts)}}}"
    return json.dumps(value, **options).replace("%", "%%")


def _texts(values: list[Any], **options: Any) -> list[str]:
    """What ``json.dumps`` gives of each, by one call: no line ends stand within texts of JSON."""
    return json.dumps(values, separators=("\n", ":"), **options)[1:-1].split("\n")


def _check(row: dict[str, Any]) -> str:
    """The CRC-32 of a line's values: a damaged id would be another prompt, or none."""
    return f"{zlib.crc32(json.dumps(row, sort_keys=True).encode()):08x}"


def read_selection(path: str | Path) -> list[str]:
    """The prompt ids in a selection file, best first: what :func:`write_selection` wrote, or one id a line.

    Raises:
        CropiError: the file is empty, a line is not an id, or an id stands there twice.
    """
    return [str(row["id"]) for row in selected_rows(path)]


def selected_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a selection file as objects with an ``id``, one at a time; at the end, what is wrong with all of
    them. Raises as :func:`read_selection` does."""
    check_sums(path)
    said = f"selection: {path} is not what `cropi select` writes"
    seen = Hashes()
    checked = without = 0  # lines that carry a checksum, and the number of the first that does not
    try:
        for number, row in enumerate(_rows(Path(path)), 1):
            check_form(row, _LINE, said, REMEDY, f"line {number}")
            check = row.pop("check", None)
            if check and check != _check(row):
                raise _damaged(path, number)
            checked, without = checked + bool(check), without or number * (not check)
            seen.add(str(row["id"]))
            yield row
    except (ValueError, RecursionError) as error:
        if isinstance(error, CropiError):
            raise
        raise CropiError(f"{said} ({error})") from error
    if not len(seen):
        raise CropiError(f"selection: {path} is empty; make it by `cropi select`")
    if checked and without:  # files of others have none at all
        raise _damaged(path, without)
    if (twice := seen.repeated(str(row["id"]) for row in _rows(Path(path)))) is not None:
        raise CropiError(
            f"selection: {path} names {shown(twice[0])} {twice[1]} times; leave all but one of the lines out"
        )


def _rows(path: Path) -> Iterator[Any]:
    """What stands in the lines that are not blank: JSON, if the first is an object, else an id each."""
    as_json: bool | None = None
    with reading(path, missing=True), open(path, encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            if text := line.strip():
                if as_json is None:
                    as_json = text.startswith("{")
                if not as_json and text.startswith("{"):
                    raise ValueError(f"{shown(text)} is an object, and the lines before it are ids")
                yield json.loads(text) if as_json else {"id": text}


def _damaged(path: str | Path, number: int) -> CropiError:
    return CropiError(
        f"selection: line {number} of {path} is damaged: its checksum does not match; make it again with "
        "`cropi select` (lines that you write yourself need an id alone)"
    )


class CopiedPrompts(UserWarning):
    """Chosen prompts have the same prompt and answer as another chosen one."""


def write_selected_records(path: str | Path, trajectories: Any, scores: Scores, selection: Selection) -> None:
    """Copy the chosen prompts' trajectory records, unchanged, best first. Copies of one prompt are warned of.

    ``trajectories`` is what :func:`cropi.data.readers.read` takes or gave; where a full pass has kept the places of its
    records, the chosen ones alone are read.

    Raises:
        CropiError: a chosen prompt is not in the trajectories.
    """
    groups, contents = read(trajectories, skip_bad=True, rewards=None), set[str]()
    chosen = len(selection.chosen)
    with summed(path), replacing(Path(path)) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for group in groups.take(scores.rows[i].id for i in selection.chosen):
            file.write(group.raw + "\n")
            contents.add(content_id(group.to_record()))
    if copies := chosen - len(contents):
        warn(
            f"{copies} of the {chosen} chosen prompts are exact copies of another chosen one, under other ids: leave "
            "one of each in the training file, or give them one id, and select again",
            CopiedPrompts,
        )
