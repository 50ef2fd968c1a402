"""Reader of NeMo-RL's ``train_data_step{N}.jsonl``.

Every line is a JSON object whose values are lists over some of the step's rollouts (one, as a rule): ``token_ids`` and,
of the same lengths, ``token_loss_mask`` (1 on response tokens), ``generation_logprobs`` and ``prev_logprobs``;
``rewards``, ``input_lengths``, ``content``. Rows that belong to one prompt are found by their prompt tokens. NeMo-RL
writes no such file where NeMo-Gym does the logging.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.errors import CropiError
from cropi.files import lines_of
from cropi.trainers.dumps.rollout import Rollout, finite, text_id

COLUMNS = ("token_ids", "token_loss_mask", "rewards", "input_lengths")
LOGPROBS = ("generation_logprobs", "prev_logprobs")


def read_dump(
    path: str | Path, *, id_key: str | None = None, temperature: float | None = None
) -> Iterator[Rollout]:
    """The rollouts in one file.

    Args:
        path: ``train_data_step{N}.jsonl``; N is the step.
        id_key: a column with the prompt's id; None: a hash of the prompt's tokens.
        temperature: of the sampling, which the file does not hold.

    Raises:
        CropiError: another layout, columns of different lengths, or rollouts of several turns.
    """
    path = Path(path)
    if not path.is_file():
        raise CropiError(f"there is no file {path}")
    columns = _columns(path)
    for name in (*COLUMNS, *([id_key] if id_key else [])):
        if name not in columns:
            raise CropiError(
                f"{path}: no column {name!r}, so this is not training data of NeMo-RL ({', '.join(columns)})"
            )
    count = len(columns["token_ids"])
    for name, values in columns.items():
        if len(values) != count:
            raise CropiError(f"{path}: {len(values)} values of {name!r} for {count} rollouts")
    step = re.search(r"step(\d+)", path.name)
    for i in range(count):
        yield _rollout(columns, i, f"{path}, rollout {i}", int(step[1]) if step else 0, id_key, temperature)


def _columns(path: Path) -> dict[str, list[Any]]:
    """Join the lines. What is no list (``idx``) describes the line, except where a line is a rollout."""
    columns: dict[str, list[Any]] = {}
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            rewards = found["rewards"]
        except (ValueError, KeyError, TypeError) as error:
            raise CropiError(f"{path}:{number}: not training data of NeMo-RL ({error!r})") from None
        for name, value in found.items():
            if not isinstance(rewards, list):
                columns.setdefault(name, []).append(value)
            elif isinstance(value, list):
                columns.setdefault(name, []).extend(value)
    if not columns:
        raise CropiError(f"{path} is empty")
    return columns


def _rollout(
    columns: dict[str, list[Any]],
    i: int,
    where: str,
    step: int,
    id_key: str | None,
    temperature: float | None,
) -> Rollout:
    length = int(columns["input_lengths"][i])
    tokens, mask = (list(columns[name][i])[:length] for name in ("token_ids", "token_loss_mask"))
    start = next((place for place, value in enumerate(mask) if value), length)
    end = max((place for place, value in enumerate(mask) if value), default=-1) + 1
    if not 0 < start < end:
        raise CropiError(f"{where}: its token_loss_mask marks no response after a prompt")
    if not all(mask[start:end]):
        raise CropiError(
            f"{where}: tokens of tools or of the user stand between those of the policy; a trajectory record holds one "
            "uninterrupted response"
        )
    source = next((name for name in LOGPROBS if name in columns), None)
    # The value beside a token is that token's own log-prob; the prompt's are zero.
    logprobs = [float(v) for v in columns[source][i][start:end]] if source else None
    name = columns[id_key][i] if id_key else text_id(" ".join(map(str, tokens[:start])))
    return Rollout(
        id=str(name), reward=finite(columns["rewards"][i], "reward", where), step=step, where=where,
        prompt_ids=tokens[:start], response_ids=tokens[start:end], logprobs=logprobs, temperature=temperature,
    )  # fmt: skip
