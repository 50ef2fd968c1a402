"""Reader of the groups that an environment of Atropos scores (``--env.data_path_to_save_groups FILE``).

A line is the group of one prompt: ``tokens`` (prompt and response), ``masks`` (-100 where a token is not trained on,
else the token), ``scores``, and perhaps ``inference_logprobs`` (of all tokens; what stands beside masked ones is no
log-prob). Lines name no step: of a prompt that occurs in several the last one counts. Where ``overrides`` set a
member's advantage to zero, its score still counts in the others' advantages, which a record cannot say: the group is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cropi.form import nested
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    check_keys,
    listed,
    log_probs,
    loss_mask,
    only_tokens,
    shown,
    token_ids,
)
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump

COLUMNS = ("tokens", "masks", "scores")
LOGPROBS = "inference_logprobs"
MASKED = -100


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file. Prompt ids: ``reading.id_key``, a key of a group, or a hash of the prompt's tokens."""
    for number, pair in enumerate(rows_of_dump(path, left)):
        read = partial(_rollout, reading=reading, step=number, group=pair[1])
        yield from left.each(left.flat([pair], _members), read)


def _members(pair: tuple[str, dict[str, Any]]) -> list[tuple[str, list[int], dict[str, Any]]]:
    """``(where, prompt, fields)`` of every member of a group.

    Raises:
        BadSample: columns of several lengths, or members that begin with different prompts.
    """
    where, group = pair
    only_tokens(group, where)
    if group.get("advantages"):
        raise BadSample(
            where, "advantages", "are the environment's own, which the scores do not say",
            "leave such groups out, or pass --skip-bad",
        )  # fmt: skip
    overrides = group.get("overrides")
    for k, override in enumerate(overrides if isinstance(overrides, list) else ()):
        if nested(override, "set_advantage_to_zero"):
            raise BadSample(
                f"{where}, member {k}", "overrides", "set its advantage to zero, while its score counts in those of "
                "the group's other members, which a record cannot say",
                "turn that off in the environment (mask_too_long_completions), or pass --skip-bad to leave such "
                "groups out",
            )  # fmt: skip
    held = {key: value for key, value in group.items() if value is not None}
    check_keys(held, COLUMNS, where, "a group of Atropos")
    columns = {key: listed(held[key], key, where) for key in (*COLUMNS, LOGPROBS) if key in held}
    sizes = {key: len(values) for key, values in columns.items()}
    if len(set(sizes.values())) > 1:
        raise BadSample(where, "tokens", f"the columns of the group have several lengths: {sizes}")
    members = []
    for k, values in enumerate(zip(*columns.values(), strict=True)):
        here, row = f"{where}, member {k}", dict(zip(columns, values))
        row["tokens"], row["masks"] = token_ids(row["tokens"], "tokens", here), _marks(row["masks"], here)
        if len(row["masks"]) != len(row["tokens"]):
            raise BadSample(here, "masks", f"has {len(row['masks'])} entries for {len(row['tokens'])} tokens")
        begin = row["masks"].index(1) if 1 in row["masks"] else len(row["tokens"])
        members.append((here, row["tokens"][:begin], row))
    for here, prompt, _ in members:
        if prompt != members[0][1]:
            raise BadSample(
                here, "tokens", "begins with another prompt than the group's first member, and a record has one",
                "score the responses to one prompt together, or pass --skip-bad to leave such groups out",
            )  # fmt: skip
    return members


def _marks(masks: Any, where: str) -> list[int]:
    """1 where a token is trained on."""
    marks = listed(masks, "masks", where)
    for t, mark in enumerate(marks):
        if type(mark) is not int:
            raise BadSample(where, f"masks[{t}]", f"should be {MASKED} or the token, got {shown(mark)}")
    return [int(mark != MASKED) for mark in marks]


def _rollout(
    one: tuple[str, list[int], dict[str, Any]], reading: Reading, step: int, group: dict[str, Any]
) -> Rollout:
    where, prompt, row = one
    ids, marks = (row[key][len(prompt) :] for key in COLUMNS[:2])
    if not ids:
        raise Unused(where, "masks", "no token of the policy")
    if not prompt:
        raise BadSample(where, "masks", "counts the first token, so there is no prompt")
    mask = loss_mask(marks, len(ids), "masks", where)
    probs = row.get(LOGPROBS)
    if probs is not None:
        probs = listed(probs, LOGPROBS, where)
        if len(probs) != len(row["tokens"]):
            raise BadSample(where, LOGPROBS, f"has {len(probs)} entries for {len(row['tokens'])} tokens")
        probs = probs[len(prompt) :]
    warm = "generation_params.temperature"
    return checked(Rollout(
        id=id_of(group, reading.id_key, " ".join(map(str, prompt)), where),
        reward=reward_of(row["scores"], "scores", where), step=step, where=where, prompt_ids=prompt, response_ids=ids,
        loss_mask=mask, logprobs=log_probs(probs, len(ids), mask, LOGPROBS, where),
        temperature=reading.warmth(nested(group, warm), warm, where),
    ))  # fmt: skip
