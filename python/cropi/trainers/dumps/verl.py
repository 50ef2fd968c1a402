"""Readers of what verl writes while it trains.

==================================================  ======================================================  =======
option of verl                                      file                                                    tokens
==================================================  ======================================================  =======
``trainer.rollout_data_dir=DIR``                    ``DIR/{step}.jsonl``                                    text
``skip.rollout_tq.enable=True`` (0.8 and later)     ``.../{step}/{n}/tq_batch.pt``                          ids
``DataProto.save_to_disk`` (any)                    a pickle, ``gen_batch.dp``                              ids
==================================================  ======================================================  =======

The text is decoded without special tokens, prompt and response each on its own, so it **cannot be turned back into
the tokens that were sampled**: use it to look at, or for a first try; use token ids to select. Its ``score`` is the
reward that is trained on, unless the reward function returns a table: then the table's ``score`` stands in its place,
to which verl's penalty for long responses (``overlong_reward``) is not added. The two binary formats
are pickles, which are read without verl and without running their code (:mod:`cropi.trainers.dumps.unpickle`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.data.formats import ending_of
from cropi.errors import CropiError, optional
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    check_keys,
    finite,
    names,
    shown,
    whole,
)
from cropi.trainers.dumps.pickled import load_dump
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, named_reward, rows_of_dump
from cropi.trainers.dumps.text_rows import warn_text
from cropi.trainers.dumps.verl_batch import SEVERAL, rollouts_of_proto, rollouts_of_table

TEXT_KEYS = ("input", "output", "score", "step")


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file, by its ending: ``.jsonl``, ``.pt`` or ``.dp``.

    Prompt ids: ``reading.id_key``, or ``extra_info.index``, in text the hash of the prompt's text. ``reading.columns``
    may be, for text, ``{"reward": name}``, where that is not ``score``.
    """
    ending = ending_of(path)
    if ending == ".jsonl":
        yield from _text(path, reading, left)
        return
    if ending not in (".pt", ".dp"):
        raise CropiError(
            f"{path}: a dump of verl ends in .jsonl (text), .pt (transfer queue) or .dp (DataProto)"
        )
    if reading.allow_pickle:
        optional("tensordict" if ending == ".pt" else "verl")  # the file is a pickle of its classes
    what = "a batch of verl's transfer queue" if ending == ".pt" else "a DataProto of verl"
    if "reward" in reading.columns:
        raise CropiError(
            f"{path}: --columns: 'reward' has no effect on {what}, whose reward is the sum of its tokens'; leave it out"
        )
    saved = load_dump(path, what, allow_pickle=reading.allow_pickle, largest=reading.largest)
    rollouts = _table if ending == ".pt" else _proto
    yield from rollouts(path, saved, reading, left)


def _text(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    warn_text(path, left, "text without special tokens", "dump token ids to be exact (skip.rollout_tq)")

    def read(line: tuple[str, dict[str, Any]]) -> Rollout:
        where, row = line
        check_keys(row, TEXT_KEYS, where, "a rollout dump of verl")
        prompt, response = (_words(row[key], key, where) for key in ("input", "output"))
        if not response:
            raise Unused(where, "output", "is empty")
        if isinstance(row.get("uid"), str) and re.fullmatch(r".+_\d+_[1-9]\d*", row["uid"]):
            raise BadSample(where, "uid", f"{shown(row['uid'])}: {SEVERAL}")
        return checked(Rollout(
            id=id_of(row, reading.id_key, prompt, where), step=whole(row["step"], "step", where), where=where,
            reward=_score(row, reading.columns.get("reward"), where), prompt=prompt, response=response,
            answer=row.get("gts"), temperature=reading.temperature, extra={"lossy": True},
        ))  # fmt: skip

    yield from left.each(rows_of_dump(path, left), read)


def _score(row: Mapping[str, Any], named: str | None, where: str) -> float:
    if named is not None:
        return named_reward(row, named, where)
    penalty = row.get("overlong_reward")
    if penalty is not None and penalty != 0:
        raise BadSample(
            where, "score", f"may be with or without the penalty for long responses, {shown(penalty)} here: verl "
            "writes it without where the reward function returns a table",
            "say which it is: --columns reward=score (the function returns a number), or "
            "reward=score+overlong_reward (a table)",
        )  # fmt: skip
    return finite(row["score"], "score", where)


def _words(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise BadSample(where, field, f"should be text, got {shown(value)}")
    return value


def _table(path: Path, saved: Any, reading: Reading, left: Left) -> Iterator[Rollout]:
    parts = ("tensordict", "keys", "tags", "global_steps")
    if not isinstance(saved, Mapping) or any(name not in saved for name in parts):
        held = names(saved) if isinstance(saved, Mapping) else shown(saved)
        raise CropiError(
            f"{path} is not a batch of verl's transfer queue, which has {', '.join(parts)}, but holds {held}"
        )
    step = whole(saved["global_steps"], "global_steps", str(path))
    yield from rollouts_of_table(
        saved["tensordict"], saved["keys"], saved["tags"], step, reading, left, str(path)
    )


def _proto(path: Path, saved: Any, reading: Reading, left: Left) -> Iterator[Rollout]:
    # The step is the name of the folder, as in .../{step}/gen_batch.dp.
    step = re.fullmatch(r"\d{1,18}", path.parent.name)
    yield from rollouts_of_proto(saved, int(step[0]) if step else 0, reading, left, str(path))
