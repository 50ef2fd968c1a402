"""verl's token-level batches to rollouts: exact token ids, masks and log-probs.

Two kinds: ``DataProto`` (up to 0.7, and the older trainer of later releases) with padded tensors, and the table of the
transfer queue (0.8 and later) with ragged ones. Both are read by their names alone, without importing verl.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from cropi.form import nested
from cropi.trainers.dumps.fields import (
    MEDIA,
    BadSample,
    Left,
    Unused,
    check_keys,
    finite,
    listed,
    log_probs,
    loss_mask,
    only_tokens,
    prompt_id,
    shown,
    token_ids,
)
from cropi.trainers.dumps.reading import PLAIN, Reading
from cropi.trainers.dumps.rollout import Rollout, checked, messages, plain_answer
from cropi.trainers.dumps.rows import without_id
from cropi.trainers.dumps.verl_tables import columns_of, parts_of_proto, rows_of
from cropi.trainers.verl.selected import ID_KEY

# What the sampling engine reported comes first: it is the policy that the tokens were drawn from.
LOGPROBS = ("rollout_log_probs", "old_log_probs")
REWARDS = ("token_level_scores", "rm_scores", "token_level_rewards")
WHAT = "a batch of rollouts"
OTHERS = ("reward_model", "raw_prompt", "data_source", *MEDIA)


def rollouts_of_proto(
    proto: Any, step: int, reading: Reading = PLAIN, left: Left | None = None, where: str = "DataProto"
) -> Iterator[Rollout]:
    """The rollouts of a ``DataProto``.

    Its tensors: ``prompts [B, P]`` padded on the left, ``responses [B, R]`` padded on the right, ``attention_mask
    [B, P + R]``, and, of the shape of ``responses``, ``response_mask``, log-probs and scores.

    Args:
        proto: has ``batch``, ``non_tensor_batch`` and ``meta_info``.
        step: the training step.
        reading: its ``id_key`` is where the prompt's id stands in ``non_tensor_batch``; its temperature, if it has one,
            goes before ``meta_info["temperature"]``.
        left: takes the rows that are left out; None raises at the first bad one.
        where: named in messages.

    Raises:
        BadSample: a missing or misshapen field, no prompt id or no reward.
    """
    left = Left() if left is None else left
    batch, other, meta = parts_of_proto(proto, where)
    id_key = reading.id_key or ID_KEY
    temperature = reading.warmth(meta.get("temperature"), "meta_info.temperature", where)
    check_keys(batch, ("prompts", "responses", "attention_mask"), where, WHAT)
    prompts, responses, attention = (
        _matrix(batch[name], name, where) for name in ("prompts", "responses", "attention_mask")
    )
    count, width = len(prompts), prompts.shape[1] + responses.shape[1]
    if attention.shape != (count, width) or len(responses) != count:
        shapes = ", ".join(str(list(x.shape)) for x in (prompts, responses, attention))
        raise BadSample(
            where, "attention_mask", f"prompts, responses and attention_mask have the shapes {shapes}"
        )
    tensors = {
        name: _matrix(batch[name], name, where)
        for name in ("response_mask", *LOGPROBS, *REWARDS)
        if name in batch
    }
    for name, tensor in tensors.items():
        if tensor.shape != responses.shape:
            raise BadSample(
                where, name, f"has the shape {list(tensor.shape)}, responses {list(responses.shape)}"
            )
    wanted = (id_key.split(".")[0], *OTHERS)
    others = {name: rows_of(other[name], count, name, where) for name in wanted if name in other}
    seen = attention.bool()

    def read(i: int) -> Rollout:
        ones = seen[i, prompts.shape[1] :]
        size = int(ones.sum())
        if not bool(ones[:size].all()):
            raise BadSample(f"{where}, row {i}", "attention_mask", "has gaps in the response")
        row = {name: tensor[i, :size] for name, tensor in tensors.items()}
        row |= {"prompts": prompts[i][seen[i, : prompts.shape[1]]], "responses": responses[i, :size]}
        outside = {name: values[i] for name, values in others.items()}
        # Scores stand on the last token, or on each; what is padded carries none.
        full = {name: tensors[name][i] for name in REWARDS if name in tensors}
        return _rollout(f"{where}, row {i}", row | full, outside, id_key, step, temperature)

    yield from left.each(range(count), read)


def rollouts_of_table(
    table: Any, keys: Sequence[str], tags: Sequence[Mapping[str, Any]], step: int, reading: Reading = PLAIN,
    left: Left | None = None, where: str = "transfer queue",
) -> Iterator[Rollout]:  # fmt: skip
    """The rollouts of a table of the transfer queue (a ``TensorDict`` with one row per trajectory).

    Args:
        table: ``prompts``, ``responses``, ``response_mask``, ``rm_scores`` and perhaps log-probs, ragged or of one
            length; other columns hold Python values.
        keys: ``{prompt}_{rollout}_{output}`` of every row.
        tags: of every row; rows that only pad a batch (``is_padding``) are left out.
        step, reading, left, where: as in :func:`rollouts_of_proto`.

    Raises:
        BadSample: as there, and several outputs of one rollout.
    """
    left = Left() if left is None else left
    columns, id_key = columns_of(table, where), reading.id_key or ID_KEY
    check_keys(columns, ("prompts", "responses"), where, WHAT)
    keys, tags = listed(keys, "keys", where), listed(tags, "tags", where)
    wanted = ("prompts", "responses", "response_mask", *LOGPROBS, *REWARDS, id_key.split(".")[0], *OTHERS)
    rows = {name: rows_of(columns[name], len(keys), name, where) for name in wanted if name in columns}

    def read(i: int) -> Rollout | None:
        key, here = keys[i], f"{where}, row {i}"
        if not isinstance(key, str):
            raise BadSample(here, "keys", f"should be text, got {shown(key)}")
        here = f"{where}, {shown(key)[1:-1]}"
        if i < len(tags) and isinstance(tags[i], Mapping) and tags[i].get("is_padding"):
            return None
        if key.rpartition("_")[2] not in ("0", key):
            raise BadSample(here, "keys", SEVERAL)
        row = {name: values[i] for name, values in rows.items()}
        return _rollout(here, row, row, id_key, step, reading.temperature)

    yield from (rollout for rollout in left.each(range(len(keys)), read) if rollout is not None)


SEVERAL = "one of several outputs of a rollout; a trajectory record holds one prompt and one response"


def _matrix(value: Any, field: str, where: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor) or value.is_nested or value.ndim != 2 or value.is_complex():
        raise BadSample(where, field, f"should be a tensor [rows, tokens], got {shown(value)}")
    return value


def _rollout(
    where: str,
    row: Mapping[str, Any],
    other: Mapping[str, Any],
    id_key: str,
    step: int,
    temperature: float | None,
) -> Rollout:
    only_tokens(other, where)
    name = nested(other, id_key)
    if name is None and id_key != ID_KEY:
        raise without_id(other, id_key, where)
    if name is None:
        raise BadSample(
            where, id_key[:80], "is missing, which is the only stable id that a prompt has in verl",
            "put an index into every row's extra_info, name another column with --id-key, or pass --skip-bad",
        )  # fmt: skip
    reward = next((key for key in REWARDS if row.get(key) is not None), None)
    if reward is None:
        raise BadSample(
            where, "reward", f"is missing ({', '.join(REWARDS)})",
            "dump the batch after its rewards were computed, or pass --skip-bad",
        )  # fmt: skip
    prompt, response = (token_ids(row[key], key, where) for key in ("prompts", "responses"))
    if not response:
        raise Unused(where, "responses", "is empty")
    mask = loss_mask(row.get("response_mask"), len(response), "response_mask", where)
    probs = next((key for key in LOGPROBS if row.get(key) is not None), LOGPROBS[0])
    scores = listed(row[reward], reward, where)
    total = sum(finite(score, f"{reward}[{t}]", where) for t, score in enumerate(scores))
    model, source = other.get("reward_model"), other.get("data_source")
    task = prompt_id(source, "data_source", where) if source is not None else None
    return checked(Rollout(
        id=prompt_id(name, id_key[:80], where), reward=finite(total, reward, where), step=step, where=where,
        prompt_ids=prompt, response_ids=response, loss_mask=mask,
        logprobs=log_probs(row.get(probs), len(response), mask, probs, where), prompt=messages(other.get("raw_prompt")),
        answer=plain_answer(model.get("ground_truth"), "reward_model.ground_truth", where)
        if isinstance(model, Mapping) else None,
        temperature=temperature, extra={} if task is None else {"task": task},
    ))  # fmt: skip
