"""What a folder of ``cropi run`` or of one stage of a curriculum holds, put together for the report page."""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cropi.amounts import setting
from cropi.data.chat import last_text
from cropi.data.readers import PromptGroups, read
from cropi.data.records import PromptGroup
from cropi.errors import CropiError, shown, warn
from cropi.files import entries, is_file, is_folder, is_there, meant
from cropi.locks import one_at_a_time
from cropi.ranking.scores import Scores
from cropi.ranking.selection import Selection
from cropi.ranking.selection_files import SELECTED, selected_rows
from cropi.ranking.table import SCORES, read_scores, written_with
from cropi.ranking.uncertainty import of_choice
from cropi.report.browser import shown_in_full
from cropi.report.curriculum import curriculum_page, is_curriculum
from cropi.report.forms import CHECK
from cropi.report.html import ReportInput, write_report
from cropi.sealed import read_sealed
from cropi.store.differences import first_difference
from cropi.store.manifest import FOLDER
from cropi.store.rows import OK

if TYPE_CHECKING:  # a table without its stores is shown without torch
    from cropi.store.store import SketchStore

SHOWN = 12  # validation prompts whose neighbours are shown
MOST_FILES = 10  # that the command which the page advises names


def report_folder(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    check: str | Path | None = None,
    every_text: bool = True,
    records: Callable[[SketchStore], Any] | None = None,
) -> Path:
    """Write the report page of a folder that holds ``scores.parquet`` and ``selected.jsonl``.

    What is not there any more is left out, and said so.

    Args:
        folder: what ``cropi run --out``, a curriculum or one of its stages wrote.
        out: the page; None: ``report.html`` in the folder.
        check: what ``cropi check --out`` wrote; None: ``check.json`` in the folder, if it is there.
        every_text: read the trajectories through, so that every prompt's text can be searched; else only the prompts
            that are shown in full are read, by their places in the files.
        records: the trajectories of a store, as :func:`cropi.data.readers.read` takes them, or None where they are not
            there; by default the files that the store notes (:func:`noted_files`).

    Returns:
        The page's path.

    Raises:
        CropiError: the folder holds no score table or selection, or these do not belong together; or ``check`` is of
            another model or sketch. In the folder, such a check is left out, with a warning.
    """
    root = Path(folder)
    if not os.path.isdir(root):
        raise CropiError(f"{root} is not a folder: give what `cropi run --out` or `cropi curriculum` wrote")
    if is_curriculum(root):
        return curriculum_page(root, out)
    stages = [*entries(root, "stage-*"), *entries(root / "cropi", "stage-*")]  # of a run inside TRL
    if not is_file(root / SCORES) and (scored := [stage for stage in stages if is_file(stage / SCORES)]):
        raise CropiError(f"{root} holds {len(scored)} stages: give the folder of one, such as {scored[-1]}")
    live = [one for one in (root, root / "cropi") if is_file(one / "stages.jsonl")]
    if live and not is_file(root / SCORES):
        raise CropiError(
            f"{root} holds a run inside TRL without a table of scores, which a live one never makes: there is nothing "
            f"to show; `cropi info {root}` lists its stages"
        )
    if not any(is_there(root / name) for name in (SCORES, SELECTED, "sketches")):
        raise CropiError(f"{root} holds no {SCORES}: give what `cropi run --out` or `cropi curriculum` wrote")
    page = root / "report.html" if out is None else Path(out)
    with one_at_a_time(page):  # of two processes, the one that read last writes last
        return _report(root, page, check, every_text, records or noted_files)


def _report(
    root: Path,
    page: Path,
    check: str | Path | None,
    every_text: bool,
    records: Callable[[SketchStore], Any],
) -> Path:
    if not is_file(root / SCORES):
        raise CropiError(
            f"{root} holds no {SCORES} yet: run the same command again, which goes on, or score its sketches by "
            f"`cropi influence --out {root / SCORES}`"
        )
    scores = read_scores(root / SCORES)
    if not os.path.isfile(root / SELECTED):
        raise CropiError(
            f"{root} holds no {SELECTED}: choose first, by `cropi select --out {root}/{SELECTED}`"
        )
    selection = selection_of(scores, root / SELECTED)
    train, valid, unfinished = _stores(root, scores)
    same = written_with(root / SCORES, selection.chosen)
    if same:
        selection = replace(selection, settings=dict(scores.meta.get("selection") or {}))
    sure, missing = of_choice(scores, len(selection), same, selection.method)
    given = ReportInput(
        scores, selection, _shown(None if train is None else _records(train, records), scores, selection, every_text),
        uncertainty=sure, unfinished=unfinished, uncertainty_missing=missing,
        check=_check(root, check, scores), run=_run(scores, selection, train), command=_note(train, "command"),
        checked=_checked(train),
        title=f"Selection: {root.name}",
    )  # fmt: skip
    if train is not None and valid and not unfinished:
        from cropi.options import Influence
        from cropi.pipeline.lost import usable_stores
        from cropi.ranking.pairwise import neighbours

        # A later stage of a curriculum was scored without the sets that had lost their gradients. Of the others every
        # prompt may be a neighbour, whatever their mean.
        valid, _, _ = usable_stores(valid, Influence(aggregate="nearest"))
        some = [row.id for store in valid for row in store.rows() if row.status == OK][:SHOWN]
        given.neighbours = neighbours(train, valid, ids=some)
        given.validation_texts = _texts(valid, some, records)
    write_report(page, given)
    return page


def selection_of(scores: Scores, path: Path) -> Selection:
    """The selection that a file names, with its place in a score table.

    Raises:
        CropiError: a chosen prompt has no score in the table, or was chosen by other scores.
    """
    place = {name: i for i, name in enumerate(scores.ids)}
    lines, usable = list(selected_rows(path)), scores.usable  # the property is computed anew each time
    ids = [str(line["id"]) for line in lines]
    unknown = [name for name in ids if name not in place or not usable[place[name]]]
    if unknown:
        raise CropiError(
            f"{path} holds {unknown[0]!r}, which has no score in the table beside it; select again"
        )
    chosen = [place[name] for name in ids]
    for i, line in zip(chosen, lines, strict=True):
        held = {name: float(value) for name, value in zip(scores.sets, scores.table[i], strict=True)}
        if line.get("scores", held) != held:
            raise CropiError(
                f"{path} was chosen from another score table than the one beside it ({line['id']!r} has other scores); "
                "select again"
            )
    picked = set(chosen)
    best = np.where(usable, scores.table.max(axis=1), -np.inf)
    rest = [i for i in np.argsort(-best, kind="stable").tolist() if usable[i] and i not in picked]
    fused = np.full(len(scores.rows), np.nan)
    method = "rrf"
    for i, line in zip(chosen, lines, strict=True):
        fused[i], method = line.get("fused", np.nan), line.get("method", method)
    return Selection(chosen, chosen + rest, fused, method, scores)


def _stores(root: Path, scores: Scores) -> tuple[SketchStore | None, list[SketchStore], str]:
    """The training store, the validation stores that the scores were made from (others may be left of an earlier run),
    and what is missing of them in words."""
    folder = root / "sketches"
    made_from = scores.meta.get("valid") or ()
    named = {Path(path).name for one in made_from for path in one.get("paths") or [one["path"]]}
    if not is_folder(folder):
        return None, [], ""
    from cropi.store.earlier import EARLIER, open_together
    from cropi.store.store import SketchStore

    try:
        train = open_together([folder / "train", folder / EARLIER])
        held = [path for path in entries(folder, "valid*") if is_folder(path)]
        valid = [SketchStore.open(path) for path in held if path.name in named or not named]
        for store in ([train] if train is not None else []) + valid:
            store.check_finished()
    except CropiError as error:
        return None, [], str(error)
    return train, valid, ""


def noted_files(store: SketchStore) -> list[str] | None:
    """The files that a store was made from, or None where they are not there any more.

    Relative paths start in the folder that the store's job ran in, or else, as where a project has moved, in this
    process's.
    """
    notes = _notes(store)
    paths = list(map(str, notes.get("trajectories") or []))
    for folder in (notes.get(FOLDER) or "", ""):
        found = [os.path.join(folder, path) for path in paths]
        if found and all(is_there(Path(path)) for path in found):
            return found
    return None


def _records(store: SketchStore, records: Callable[[SketchStore], Any]) -> PromptGroups | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        held = records(store)
        columns = (store.manifest.get("tokens") or {}).get("columns")
        return None if held is None else read(held, skip_bad=True, columns=columns, rewards=None)


def _shown(
    groups: PromptGroups | None, scores: Scores, selection: Selection, every_text: bool
) -> Iterable[PromptGroup]:
    """The records that the page needs."""
    if groups is None or every_text:
        return groups or ()
    return groups.take([scores.rows[i].id for i in sorted(shown_in_full(scores, selection))])


def _texts(
    valid: list[SketchStore], names: Sequence[str], records: Callable[[SketchStore], Any]
) -> dict[str, str]:
    texts: dict[str, str] = {}
    for store in valid:
        groups = _records(store, records)
        for group in groups.take([name for name in names if name in store]) if groups is not None else ():
            texts[group.id] = last_text(group.prompt)
    return texts


def _notes(store: SketchStore | None) -> dict[str, Any]:
    return {} if store is None else dict(store.manifest.get("notes") or {})


def _note(store: SketchStore | None, name: str) -> str:
    return str(_notes(store).get(name, ""))


def _checked(store: SketchStore | None) -> str:
    """See :class:`cropi.report.html.ReportInput`; with placeholders where names are not known, or are many."""

    def quoted(names: list[str], placeholder: str) -> str:
        # A mark of code in a name would end the command on the page.
        known = 0 < len(names) <= MOST_FILES and not any("`" in name for name in names)
        return shlex.join(names) if known else placeholder

    notes = _notes(store)
    model = [str(notes["model"])] if notes.get("model") else []
    files = list(map(str, notes.get("trajectories") or []))
    return f"--model {quoted(model, 'MODEL')} --trajectories {quoted(files, 'TRAIN')}"


def _check(root: Path, path: str | Path | None, scores: Scores) -> dict[str, Any] | None:
    file = root / "check.json" if path is None else Path(path)
    if not os.path.isfile(file):
        if path is None:
            return None
        raise CropiError(
            f"check: there is no file {file}; {meant(file)}make it with `cropi check --out {file}`"
        )
    held = read_sealed(file, CHECK, "make it again with `cropi check`", writer="`cropi check --out`")
    made = scores.meta.get("train") or {}
    known = [name for name in ("spec", "model") if held.get(name) and made.get(name)]
    differs = first_difference({name: held[name] for name in known}, {name: made[name] for name in known})
    if differs is None:
        return held
    other = (
        f"check: {file} is of {differs.field} = {shown(differs.left)}, and this run has {shown(differs.right)}; "
        "check this run's"
    )
    if path is not None:
        raise CropiError(other)
    warn(f"{other}; the page leaves it out")
    return None


def _run(scores: Scores, selection: Selection, train: SketchStore | None) -> list[tuple[str, str]]:
    """Lines of configuration: of what is set, each under a name of its own."""
    lines: dict[str, Any] = {"compared by": f"{scores.meta.get('metric')}, mean {scores.meta.get('mean')}"}
    lines |= {"chosen by": selection.settings} if selection.settings else {}
    lines |= {} if train is None else train.manifest
    names = {"model": "model given as", "trajectories": "files"}
    lines |= {names.get(key, key): value for key, value in _notes(train).items() if key != "command"}
    titles = {
        "spec": "sketch",
        "tokenizer": "tokenizer's hash",
        "trajectories": "trajectories' hash",
        "dtype": "stored as",
    }
    left_out = ("notes", "prompts", "spec_fingerprint")
    texts = [
        (titles.get(key, key.replace("_", " ")), setting(value))
        for key, value in lines.items()
        if key not in left_out
    ]
    return [(name, text) for name, text in texts if text]
