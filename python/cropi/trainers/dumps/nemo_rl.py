"""Reader of NeMo-RL's ``train_data_step{N}.jsonl``.

Every line is a JSON object whose values are lists over some of the step's rollouts (one, as a rule): ``token_ids`` and,
of the same lengths, ``token_loss_mask`` (1 on response tokens), ``generation_logprobs`` and ``prev_logprobs``;
``rewards``, ``input_lengths``, ``sample_loss_mask``, ``content``. Where ``rewards`` is a number, the line is one
rollout. Rows that belong to one prompt are found by their prompt tokens. With dynamic sampling ``rewards`` are those of
all rollouts that were sampled, also of the prompts that were dropped, and do not belong to the tokens beside them:
``filtered_rewards`` do. NeMo-RL writes no such file where NeMo-Gym does the logging.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    check_keys,
    finite,
    is_bit,
    listed,
    log_probs,
    loss_mask,
    shown,
    token_ids,
    whole,
)
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, rows_of_dump, without_id

COLUMNS = ("token_ids", "token_loss_mask", "rewards", "input_lengths")
LOGPROBS = ("generation_logprobs", "prev_logprobs")
SAMPLE_MASK = "sample_loss_mask"


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file, ``train_data_step{N}.jsonl``; N is the step. Those that NeMo-RL's loss leaves out are
    left out: without a token of the policy, or masked as a whole (``sample_loss_mask``: overlong filtering).

    Prompt ids: ``reading.id_key``, a column, or a hash of the prompt's tokens.
    """
    match = re.search(r"step(\d{1,18})", path.name)
    step = int(match[1]) if match else 0
    rows = left.flat(rows_of_dump(path, left), lambda line: _rows(*line, reading.id_key))
    yield from left.each(rows, lambda row: _rollout(*row, step, reading.id_key, reading.temperature))


def _rows(where: str, line: dict[str, Any], id_key: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The rollouts of a line, each as its own object. What is not a list (``idx``) describes the line."""
    check_keys(line, COLUMNS, where, "training data of NeMo-RL")
    if "filtered_rewards" in line:
        line = line | {"rewards": line["filtered_rewards"]}
    # Of a key with dots, the column that it leads into.
    held = id_key if id_key is None or id_key in line else id_key.partition(".")[0]
    if id_key is not None and held not in line:
        raise without_id(line, id_key, where)
    if not isinstance(line["rewards"], list):
        return [(where, line)]
    columns = {name: values for name, values in line.items() if isinstance(values, list)}
    count = len(line["rewards"])
    others = [name for name in (SAMPLE_MASK, *LOGPROBS, held) if name in columns]
    for name in (*COLUMNS, *others):
        values = columns.get(name)
        if values is None or len(values) != count:
            got = shown(line[name]) if values is None else f"{len(values)} values"
            raise BadSample(
                where, shown(name), f"should have one value for each of {count} rollouts, got {got}"
            )
    single = {held: line[held]} if held in line and held not in columns else {}
    return [
        (f"{where}, rollout {i}", {name: columns[name][i] for name in (*COLUMNS, *others)} | single)
        for i in range(count)
    ]


def _rollout(
    where: str, row: dict[str, Any], step: int, id_key: str | None, temperature: float | None
) -> Rollout:
    length = whole(row["input_lengths"], "input_lengths", where)
    tokens = listed(row["token_ids"], "token_ids", where)
    marks = listed(row["token_loss_mask"], "token_loss_mask", where)
    if not 0 < length <= len(tokens) or len(marks) < length:
        raise BadSample(
            where,
            "input_lengths",
            f"is {shown(length)} for {len(tokens)} token_ids and {len(marks)} of token_loss_mask",
        )
    if row.get(SAMPLE_MASK) is not None and finite(row[SAMPLE_MASK], SAMPLE_MASK, where) == 0:
        raise Unused(where, SAMPLE_MASK, "is 0")
    tokens = token_ids(tokens[:length], "token_ids", where)
    marked = [t for t, value in enumerate(marks[:length]) if _mark(value, t, where)]
    if not marked:
        raise Unused(where, "token_loss_mask", "marks no token of the policy")
    source = next((name for name in LOGPROBS if row.get(name) is not None), None)
    start, end = _first_sampled(marked, row[source] if source == LOGPROBS[0] else None), marked[-1] + 1
    if start == 0:
        raise BadSample(where, "token_loss_mask", "marks the first token, so there is no prompt")
    mask = loss_mask(marks[start:end], end - start, "token_loss_mask", where)
    # The value beside a token is that token's own log-prob; the prompt's are zero.
    values = None if source is None else listed(row[source], source, where)
    if values is not None and len(values) < end:
        raise BadSample(where, str(source), f"has {len(values)} entries for {length} tokens")
    probs = None if values is None else log_probs(values[start:end], end - start, mask, str(source), where)
    return checked(Rollout(
        id=id_of(row, id_key, " ".join(map(str, tokens[:start])), where),
        reward=finite(row["rewards"], "rewards", where), step=step, where=where, prompt_ids=tokens[:start],
        response_ids=tokens[start:end], logprobs=probs, loss_mask=mask, temperature=temperature,
    ))  # fmt: skip


def _first_sampled(marked: list[int], generated: Any) -> int:
    """Where the policy's first turn begins. The assistant's turns in a prompt (examples) are marked too: all of their
    tokens have a log-prob of exactly 0, because nobody generated them."""
    runs = [i for i, t in enumerate(marked) if i == 0 or marked[i - 1] != t - 1]
    for begin, after in zip(runs, [*runs[1:], len(marked)]):
        places = marked[begin:after]
        if not isinstance(generated, list) or len(generated) <= places[-1] or len(places) < 2:
            return places[0]
        if any(generated[t] != 0 for t in places):
            return places[0]
    return marked[0]


def _mark(value: Any, t: int, where: str) -> bool:
    if not is_bit(value):
        raise BadSample(where, f"token_loss_mask[{t}]", f"should be 0 or 1, got {shown(value)}")
    return bool(value)
