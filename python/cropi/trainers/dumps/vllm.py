"""Reader of vLLM's ``RequestOutput``, as people dump it: JSON lines, a JSON array, parquet, or a pickle.

An output has ``prompt``, ``prompt_token_ids`` and ``outputs``, of which each has ``token_ids``, ``text``,
``finish_reason`` and ``logprobs``: a token's entry is a number, or a table by token id whose value is a number or has a
``logprob``. The sampled token is in that table, beside the likeliest ones. By default vLLM's log-probs are those of
the model at temperature 1; for a ratio at another temperature, run it with ``--logprobs-mode processed_logprobs``.

vLLM scores nothing: the rewards have to be written into the file, as ``reward`` in every one of ``outputs``, or as a
list ``rewards`` beside them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.data.keys import was_cut
from cropi.errors import CropiError
from cropi.files import open_to_read
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    check_keys,
    listed,
    log_probs,
    only_tokens,
    shown,
    token_ids,
)
from cropi.trainers.dumps.pickled import contents, items_of, load_dump
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump
from cropi.trainers.dumps.text_rows import step_of

WHAT = "a dump of vLLM's outputs"
REWARDS = ("reward", "score")
TOP_ONLY = (
    "sample with logprobs=1 or more, which holds the sampled token's own beside the likeliest, or take 'logprobs' out "
    "of the dump; or pass --skip-bad"
)


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file. Outputs that were aborted are left out. Prompt ids: ``reading.id_key``, a key of the
    request, or a hash of the prompt's tokens.
    """
    step = step_of(path)
    outputs = left.flat(_requests(path, left, reading), _outputs)
    yield from left.each(outputs, lambda one: _rollout(*one, step, reading))


def _requests(path: Path, left: Left, reading: Reading) -> Iterator[tuple[str, Any]]:
    with open_to_read(path) as file:
        head = file.read(2)
    if head[:1] != b"\x80" and head != b"PK":
        yield from rows_of_dump(path, left)
        return
    saved = load_dump(path, WHAT, allow_pickle=reading.allow_pickle, largest=reading.largest, by_items=True)
    if not isinstance(saved, (list, tuple)):
        raise CropiError(f"{path} is not {WHAT}: a list of RequestOutput is expected, got {shown(saved)}")
    for number, one in enumerate(items_of(saved, path, WHAT)):
        yield f"{path}, request {number}", one


def _outputs(request: tuple[str, Any]) -> list[tuple[str, dict[str, Any], Any, int]]:
    """``(where, request, output, its number)`` of every output of a request."""
    where, held = request
    row = _table(held, where, "request")
    outputs = listed(row.get("outputs"), "outputs", where)
    return [(f"{where}, output {k}", row, output, k) for k, output in enumerate(outputs)]


def _table(value: Any, where: str, field: str) -> dict[str, Any]:
    value = contents(value)
    value = vars(value) if not isinstance(value, Mapping) and hasattr(value, "__dict__") else value
    if not isinstance(value, Mapping):
        raise BadSample(where, field, f"should be a table of fields, got {shown(value)}")
    return {str(key): inner for key, inner in value.items() if inner is not None}


def _held(table: Any, key: str, where: str, field: str) -> Any:
    """What a table of fields has for a key; None where it has nothing. No table is made of one whose keys are texts."""
    value = table.get(key) if type(table) is dict else None
    return _table(table, where, field).get(key) if value is None else value


def _rollout(
    where: str, request: dict[str, Any], held: Any, number: int, step: int, reading: Reading
) -> Rollout:
    only_tokens(request, where)
    output = _table(held, where, "output")
    if output.get("finish_reason") == "abort":
        raise Unused(where, "finish_reason", "is 'abort'")
    check_keys(request, ("prompt_token_ids",), where, WHAT)
    check_keys(output, ("token_ids",), where, WHAT)
    prompt = token_ids(request["prompt_token_ids"], "prompt_token_ids", where)
    ids = token_ids(output["token_ids"], "token_ids", where)
    if not ids:
        raise Unused(where, "token_ids", "is empty")
    name = id_of(request, reading.id_key, " ".join(map(str, prompt)), where)
    text = output.get("text")
    if reading.scorer is None:
        reward = _reward(request, output, number, where)
    else:
        row = {key: value for key, value in request.items() if key not in ("outputs", "messages")}
        asked = request.get("messages") or request.get("prompt")
        reward = reading.scorer(where, asked, text if isinstance(text, str) else "", ids, row)
    return checked(Rollout(
        id=name, reward=reward, step=step, where=where, prompt_ids=prompt,
        response_ids=ids, logprobs=sampled_logprobs(output.get("logprobs"), ids, where),
        prompt=request.get("messages") or request.get("prompt"), response=text if isinstance(text, str) else None,
        answer=request.get("answer"), temperature=reading.temperature,
        truncated=was_cut(output.get("finish_reason")),
    ))  # fmt: skip


def _reward(request: dict[str, Any], output: dict[str, Any], number: int, where: str) -> float:
    for key in REWARDS:
        if key in output:
            return reward_of(output[key], key, where)
    for key in ("rewards", "scores", *REWARDS):
        if key in request:
            value = request[key]
            if isinstance(value, (list, tuple)) and number < len(value):
                return reward_of(value[number], f"{key}[{number}]", where)
            if len(request.get("outputs", ())) == 1:
                return reward_of(value, key, where)
            raise BadSample(where, key, f"should have one number per output, got {shown(value)}")
    return reward_of(None, "reward", where)


def sampled_logprobs(value: Any, ids: list[int], where: str) -> list[float] | None:
    """The log-probs of the sampled tokens, from numbers or from tables of the likeliest tokens.

    Raises:
        BadSample: another length, or a table without the sampled token.
    """
    if value is None:
        return None
    flat = _table(value, where, "logprobs") if not isinstance(value, (list, tuple)) else {}
    if {
        "start_indices",
        "end_indices",
        "token_ids",
        "logprobs",
    } <= flat.keys():  # vLLM's flat form of the tables
        spans = zip(flat["start_indices"], flat["end_indices"])
        value = [dict(zip(flat["token_ids"][a:b], flat["logprobs"][a:b])) for a, b in spans]
    entries = listed(value, "logprobs", where)
    if len(entries) != len(ids):
        raise BadSample(where, "logprobs", f"has {len(entries)} entries for {len(ids)} tokens")
    logprobs = []
    for t, (entry, token) in enumerate(zip(entries, ids)):
        field = f"logprobs[{t}]"
        if not isinstance(entry, (int, float)):
            sampled = _held(entry, str(token), where, field)
            if sampled is None:
                raise BadSample(
                    where,
                    field,
                    f"holds the {len(_table(entry, where, field))} likeliest tokens, and not the sampled one ({token})",
                    TOP_ONLY,
                )
            entry = sampled if isinstance(sampled, (int, float)) else _held(sampled, "logprob", where, field)
        logprobs.append(entry)
    return log_probs(logprobs, len(ids), None, "logprobs", where)
