"""What the values of a record must be, each by itself and against each other."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from cropi.data.chat import plain_messages
from cropi.data.keys import ENDS
from cropi.data.rewards import LARGEST_REWARD
from cropi.errors import RecordError, shown

# A log-prob slightly above zero is rounding in the engine that wrote it, not a mistake in the file.
LOGPROB_SLACK = 1e-3
# Nobody's records nest lists and objects deeper, and writing such a record again would end in a recursion error.
DEEPEST = 64
LONGEST_ID = 4096
LARGEST_TOKEN = 2**31 - 1
# Long lists of numbers, whose every entry is checked to be one.
FLAT = ("rewards", "prompt_ids", "response_ids", "logprobs", "loss_mask", "truncated")
ID_REMEDY = (
    "give every prompt an id that no other one has and that stays the same from run to run, the one of your dataset, "
    "or pass --skip-bad"
)
REWARDS_REMEDY = (
    "score the responses and write one number for each as 'rewards' (`cropi rollout` samples and scores), or pass "
    "--skip-bad; demonstrations have none, and go with --estimator sft"
)
TOP_REMEDY = (
    "give the log-prob of the sampled token alone; `cropi convert --source vllm` takes it out of a table of the "
    "likeliest tokens; or pass --skip-bad"
)
MASK_REMEDY = "give one 0 or 1 per token of response_ids, or pass --skip-bad"


def check_id(value: Any, where: str) -> str:
    """A prompt id as a string.

    Raises:
        RecordError: it is neither a string nor an integer, empty, or longer than :data:`LONGEST_ID`.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise RecordError(where, f"'id' must be a string or an integer, got {shown(value)}", ID_REMEDY)
    if isinstance(value, int) and value.bit_length() > 4000:
        raise RecordError(where, f"'id' must be a string or an integer, got {shown(value)}", ID_REMEDY)
    if not (name := str(value)).strip():
        raise RecordError(where, f"'id' is {name!r}, which is empty", ID_REMEDY)
    if len(name) > LONGEST_ID:
        raise RecordError(where, f"'id' has {len(name)} characters, more than {LONGEST_ID}", ID_REMEDY)
    return name


def check_depth(record: Mapping[str, Any], where: str) -> None:
    """Check that nothing in a record is nested deeper than :data:`DEEPEST`.

    Raises:
        RecordError: names the key.
    """
    for key, value in record.items():
        level, depth = [value] if key not in FLAT and isinstance(value, (list, dict)) else [], 1
        while level:
            if depth > DEEPEST:
                raise RecordError(where, f"{shown(key)} is nested deeper than {DEEPEST} lists and objects")
            level = [
                inner
                for outer in level
                for inner in (outer.values() if isinstance(outer, dict) else outer)
                if isinstance(inner, (list, dict))
            ]
            depth += 1


def check_group(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Check the fields of a record against each other; ``rewards`` sets K. Messages come back in their plain form.

    Raises:
        RecordError: names the field, its value and what it should be.
    """
    count = len(values["rewards"]) if isinstance(values["rewards"], list) else 0
    if count == 0:
        raise RecordError(where, "'rewards' must be a list with one number per response")
    for k, reward in enumerate(values["rewards"]):
        if not finite(reward):
            raise RecordError(where, f"rewards[{k}] must be a finite number, got {shown(reward)}")
        if abs(reward) > LARGEST_REWARD:
            raise RecordError(
                where,
                f"rewards[{k}] is {shown(reward)}, beyond {LARGEST_REWARD:g}, so that advantages would overflow",
                "scale the rewards down, or pass --skip-bad",
            )
    for name in ("responses", "response_ids", "logprobs", "loss_mask", "truncated"):
        value = values[name]
        if isinstance(value, list):
            values[name] = list(value)  # entries are replaced below, and the record may be the caller's
        if value is not None and (not isinstance(value, list) or len(value) != count):
            got = len(value) if isinstance(value, list) else shown(value)
            raise RecordError(where, f"'{name}' must have one entry per reward ({count}), got {got}")
    values["prompt"] = _check_prompt(values, where)
    for k in range(count):
        _check_response(values, k, where)
    _check_mask(values, where)
    for k in range(count):
        if values["logprobs"] is not None:
            values["logprobs"][k] = _checked_logprobs(values, k, where)
    temperature = values["temperature"]
    if temperature is not None and (not finite(temperature) or temperature is True or not temperature > 0):
        raise RecordError(where, f"'temperature' must be a positive number, got {shown(temperature)}")
    _check_reasons(values, where)
    if values["truncated"] is not None and not all(isinstance(value, bool) for value in values["truncated"]):
        raise RecordError(where, "'truncated' must be a list of true and false")
    for name, kind, words in (
        ("policy", str, "a string"), ("set", str, "a string"), ("task", str, "a string"),
        ("tools", list, "a list of JSON schemas"), ("chat_template_kwargs", dict, "an object of template variables"),
    ):  # fmt: skip
        if values[name] is not None and not isinstance(values[name], kind):
            raise RecordError(where, f"{name!r} must be {words}, got {shown(values[name])}")
    return values


def _check_reasons(values: dict[str, Any], where: str) -> None:
    """Reasons for the end of each response as truth values: whether a limit cut it."""
    held = values["truncated"]
    if held is None or not any(isinstance(reason, str) for reason in held):
        return
    made = [ENDS.get(reason) if reason is None or isinstance(reason, str) else None for reason in held]
    if None in made:
        k = made.index(None)
        raise RecordError(
            where, f"the reason for the end of responses[{k}] is {shown(held[k])}, so that it may be only a part",
            "remove it and its reward, give 'truncated' (true where a limit cut it), or pass --skip-bad",
        )  # fmt: skip
    values["truncated"] = made


def finite(value: Any) -> bool:
    """Whether a value is a finite number; the comparison also turns down integers that no float holds."""
    return isinstance(value, (int, float)) and -sys.float_info.max <= value <= sys.float_info.max


def _check_prompt(values: dict[str, Any], where: str) -> Any:
    prompt, ids = values["prompt"], values["prompt_ids"]
    if ids is not None:
        check_ids(ids, "prompt_ids", where)
    if isinstance(prompt, list):
        prompt = plain_messages(prompt, "prompt", where)
    elif not isinstance(prompt, str) and not (prompt is None and ids is not None):
        raise RecordError(where, f"'prompt' must be a string or a list of messages, got {shown(prompt)}")
    if ids is None and not prompt:
        raise RecordError(where, "the prompt is empty")
    return prompt


def _check_response(values: dict[str, Any], k: int, where: str) -> None:
    responses, ids = values["responses"], values["response_ids"]
    if ids is not None:
        check_ids(ids[k], f"response_ids[{k}]", where)
    if responses is not None:
        response = responses[k]
        if isinstance(response, list):
            responses[k] = response = plain_messages(response, f"responses[{k}]", where)
        elif not isinstance(response, str) and ids is None:
            raise RecordError(where, f"responses[{k}] must be a string, got {shown(response)}")
        if not response and ids is None:
            raise RecordError(
                where, f"responses[{k}] is empty", "remove it and its reward, or pass --skip-bad"
            )


def _checked_logprobs(values: dict[str, Any], k: int, where: str) -> list[float]:
    """The log-probs of response k, with 0 at tokens that are not scored if no log-prob is there."""
    if values["response_ids"] is None:
        raise RecordError(
            where,
            "'logprobs' without 'response_ids' cannot be matched to tokens",
            "add the token ids, or remove 'logprobs'",
        )
    given, size = values["logprobs"][k], len(values["response_ids"][k])
    if not isinstance(given, list) or len(given) != size:
        got = len(given) if isinstance(given, list) else shown(given)
        raise RecordError(
            where, f"logprobs[{k}] must have one entry per token of response_ids[{k}] ({size}), got {got}"
        )
    if set(map(type, given)) <= {float, int} and _sums_up(given) and max(given) <= LOGPROB_SLACK:
        return list(map(float, given))
    scored, given = values["loss_mask"][k] if values["loss_mask"] else [1] * size, list(given)
    for t, value in enumerate(given):
        if finite(value) and value <= LOGPROB_SLACK:
            given[t] = float(value)
            continue
        if scored[t]:
            remedy = [TOP_REMEDY] if isinstance(value, (list, Mapping)) else []
            raise RecordError(
                where, f"logprobs[{k}][{t}] must be a finite number <= 0, got {shown(value)}", *remedy
            )
        given[t] = 0.0  # trainers write anything, or nothing, at the tokens of others
    return given


def _sums_up(values: list[float]) -> bool:
    """Whether no number is NaN, infinite or an integer that no float holds."""
    try:
        return math.isfinite(sum(values))
    except OverflowError:
        return False


def _check_mask(values: dict[str, Any], where: str) -> None:
    masks, ids = values["loss_mask"], values["response_ids"]
    if masks is None:
        return
    if ids is None:
        raise RecordError(
            where,
            "'loss_mask' without 'response_ids' cannot be matched to tokens",
            "add the token ids, or give the responses as messages, of which the template marks the assistant's",
        )
    for k, mask in enumerate(masks):
        size = len(ids[k])
        if not isinstance(mask, list) or len(mask) not in (size, size + len(values["prompt_ids"] or ())):
            got = len(mask) if isinstance(mask, list) else shown(mask)
            raise RecordError(
                where, f"loss_mask[{k}] must have one entry per token of response_ids[{k}] ({size}), got {got}",
                MASK_REMEDY,
            )  # fmt: skip
        for t, value in enumerate(mask):
            if not isinstance(value, (int, float)) or value not in (0, 1):
                raise RecordError(
                    where, f"loss_mask[{k}][{t}] must be 0 or 1, got {shown(value)}", MASK_REMEDY
                )
        before, mask = mask[: len(mask) - size], [int(value) for value in mask[len(mask) - size :]]
        if any(before):
            raise RecordError(
                where, f"loss_mask[{k}] covers the prompt too, and marks tokens of it as scored",
                "only tokens of the response can be scored: move them into response_ids, or mask them",
            )  # fmt: skip
        if not any(mask):
            raise RecordError(
                where, f"loss_mask[{k}] is 0 at every token, so that nothing of the response is scored",
                "remove the response and its reward, or pass --skip-bad",
            )  # fmt: skip
        masks[k] = mask


def check_ids(ids: Any, name: str, where: str) -> None:
    if not isinstance(ids, list) or not ids:
        raise RecordError(where, f"{name} must be a list of at least one token id")
    if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= LARGEST_TOKEN:
        return
    for t, value in enumerate(ids):
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST_TOKEN:
            raise RecordError(where, f"{name}[{t}] must be a token id (an integer >= 0), got {shown(value)}")
