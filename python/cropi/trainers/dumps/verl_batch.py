"""verl's token-level batches to rollouts: exact token ids, masks and log-probs.

Two kinds: ``DataProto`` (up to 0.7, and the older trainer of later releases) with padded tensors, and the table of the
transfer queue (0.8 and later) with ragged ones. Both are read by their names alone, without importing verl.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cropi.errors import CropiError
from cropi.trainers.dumps.rollout import Rollout, finite
from cropi.trainers.verl.selected import ID_KEY

# What the sampling engine reported comes first: it is the policy that the tokens were drawn from.
LOGPROBS = ("rollout_log_probs", "old_log_probs")
REWARDS = ("token_level_scores", "rm_scores", "token_level_rewards")


def rollouts_of_proto(
    proto: Any, step: int, *, id_key: str = ID_KEY, temperature: float | None = None, where: str = "DataProto"
) -> Iterator[Rollout]:
    """The rollouts of a ``DataProto``.

    Its tensors: ``prompts [B, P]`` padded on the left, ``responses [B, R]`` padded on the right, ``attention_mask
    [B, P + R]``, and, of the shape of ``responses``, ``response_mask``, log-probs and scores.

    Args:
        proto: has ``batch``, ``non_tensor_batch`` and ``meta_info``.
        step: the training step.
        id_key: where the prompt's id stands in ``non_tensor_batch``.
        temperature: of the sampling; None: ``meta_info["temperature"]``.
        where: named in messages.

    Raises:
        CropiError: a missing field or prompt id, no reward, or tokens between those of the policy.
    """
    batch, other = proto.batch, proto.non_tensor_batch
    if temperature is None:
        temperature = (getattr(proto, "meta_info", None) or {}).get("temperature")
    for name in ("prompts", "responses", "attention_mask"):
        _need(name, batch, where)
    width = batch["prompts"].shape[1]
    mask = batch["attention_mask"].bool()
    reward = next((name for name in REWARDS if name in batch), None)
    logprobs = next((name for name in LOGPROBS if name in batch), None)
    for i in range(len(mask)):
        size = int(mask[i, width:].sum())
        yield _rollout(
            f"{where}, row {i}",
            {name: other[name][i] for name in other},
            id_key,
            prompt=batch["prompts"][i][mask[i, :width]].tolist(),
            response=batch["responses"][i][:size].tolist(),
            mask=batch["response_mask"][i][:size].tolist() if "response_mask" in batch else None,
            logprobs=batch[logprobs][i][:size].tolist() if logprobs else None,
            reward=None if reward is None else float(batch[reward][i].sum()),
            step=step,
            temperature=temperature,
        )


def rollouts_of_table(
    table: Any, keys: Sequence[str], tags: Sequence[Mapping[str, Any]], step: int, *, id_key: str = ID_KEY,
    temperature: float | None = None, where: str = "transfer queue",
) -> Iterator[Rollout]:  # fmt: skip
    """The rollouts of a table of the transfer queue (a ``TensorDict`` with one row per trajectory).

    Args:
        table: ``prompts``, ``responses``, ``response_mask``, ``rm_scores`` and perhaps log-probs, ragged or of one
            length; other columns hold Python values.
        keys: ``{prompt}_{rollout}_{output}`` of every row.
        tags: of every row; rows that only pad a batch (``is_padding``) are left out.
        step, id_key, temperature, where: as in :func:`rollouts_of_proto`.

    Raises:
        CropiError: as there, and several outputs of one rollout.
    """
    names = set(table.keys())
    for name in ("prompts", "responses"):
        _need(name, names, where)
    tensors = {name: _rows(table[name]) for name in ("prompts", "responses", "response_mask", *LOGPROBS, *REWARDS)
               if name in names}  # fmt: skip
    first = id_key.split(".")[0]
    others = {
        name: list(table[name])
        for name in (first, "reward_model", "raw_prompt", "data_source")
        if name in names
    }
    reward = next((name for name in REWARDS if name in tensors), None)
    logprobs = next((name for name in LOGPROBS if name in tensors), None)
    for i, key in enumerate(keys):
        if i < len(tags) and tags[i].get("is_padding"):
            continue
        if key.rpartition("_")[2] not in ("0", key):
            raise CropiError(f"{where}, {key}: {_MULTI_TURN}")
        yield _rollout(
            f"{where}, {key}",
            {name: _plain(values[i]) for name, values in others.items()},
            id_key,
            prompt=tensors["prompts"][i].tolist(),
            response=tensors["responses"][i].tolist(),
            mask=tensors["response_mask"][i].tolist() if "response_mask" in tensors else None,
            logprobs=tensors[logprobs][i].tolist() if logprobs else None,
            reward=None if reward is None else float(tensors[reward][i].sum()),
            step=step,
            temperature=temperature,
        )


_MULTI_TURN = (
    "tokens of tools or of the user stand between those of the policy (several turns); a trajectory record holds a "
    "prompt and one uninterrupted response, so rollouts of several turns cannot be used"
)


def _rollout(
    where: str, other: Mapping[str, Any], id_key: str, *, prompt: list[int], response: list[int],
    mask: list[int] | None, logprobs: list[float] | None, reward: float | None, step: int, temperature: float | None,
) -> Rollout:  # fmt: skip
    name: Any = other
    for key in id_key.split("."):
        name = name.get(key) if isinstance(name, Mapping) else None
    if name is None:
        raise CropiError(
            f"{where}: no {id_key}, which is the only stable id that a prompt has in verl; put an index into every "
            "row's extra_info, or name another column"
        )
    if reward is None:
        raise CropiError(
            f"{where}: no rewards ({', '.join(REWARDS)}); dump the batch after its rewards were computed"
        )
    if mask is not None and not all(mask):
        raise CropiError(f"{where}: {_MULTI_TURN}")
    if logprobs is not None and len(logprobs) != len(response):
        raise CropiError(f"{where}: {len(logprobs)} log-probs for {len(response)} response tokens")
    model = other.get("reward_model")
    messages = other.get("raw_prompt")
    return Rollout(
        id=str(name), reward=finite(reward, "reward", where), step=step, where=where, prompt_ids=prompt,
        response_ids=response, logprobs=logprobs, prompt=_messages(messages),
        answer=model.get("ground_truth") if isinstance(model, Mapping) else None,
        temperature=None if temperature is None else float(temperature),
        extra={"task": str(other["data_source"])} if other.get("data_source") is not None else {},
    )  # fmt: skip


def _messages(value: Any) -> Any:
    """The prompt as text messages, for people and exports; the token ids are what counts."""
    messages = list(value) if value is not None and not isinstance(value, str) else value
    if isinstance(messages, list) and not all(
        isinstance(m, Mapping) and isinstance(m.get("content"), str) for m in messages
    ):
        return None
    return [dict(m) for m in messages] if isinstance(messages, list) else messages


def _rows(value: Any) -> Any:
    """A ragged tensor's rows as a list; a plain one as it is."""
    return value.unbind() if getattr(value, "is_nested", False) else value


def _plain(value: Any) -> Any:
    """Out of tensordict's wrapper for Python values."""
    return value.data if type(value).__name__ in ("NonTensorData", "NonTensorStack") else value


def _need(name: str, holder: Any, where: str) -> None:
    if name not in holder:
        raise CropiError(f"{where}: no {name!r}, so this is not a batch of rollouts")
