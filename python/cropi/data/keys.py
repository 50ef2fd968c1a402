"""The keys of a trajectory record: which are used, by which other names they are known, and which are refused.

A key that changes what the policy saw, or which tokens count, and that is not supported must not be kept beside the
record unread: the gradient would be another one than the user means.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi.errors import RecordError

FIELDS = (
    "id",
    "prompt",
    "answer",
    "responses",
    "rewards",
    "prompt_ids",
    "response_ids",
    "logprobs",
    "loss_mask",
    "temperature",
    "truncated",
    "tools",
    "chat_template_kwargs",
    "policy",
    "set",
    "task",
)

# A further key, true where the prompt is the text that the policy read: no chat template is applied to it. Readers of
# dumps set it, because trainers and engines write prompts rendered, or as they were tokenised.
RENDERED = "rendered"

# Why each response ended, as engines say it: `truncated` in words.
REASONS = ("finish_reason", "finish_reasons")
# Whether a response that ended so was cut by a limit; engines without a reason to name say nothing.
ENDS: dict[str | None, bool] = {
    **dict.fromkeys(("length", "max_tokens"), True),
    **dict.fromkeys(
        ("stop", "eos_token", "stop_sequence", "end_turn", "tool_calls", "tool_use", None), False
    ),
}


def was_cut(reason: Any) -> bool | None:
    """Whether a response was cut by a limit, by the engine's reason for its end; None: the reason does not say."""
    return ENDS.get(reason) if isinstance(reason, str) else None


# Other names of fields, as trainers and engines write them.
ALIASES = {
    **dict.fromkeys(REASONS, "truncated"),
    "response_mask": "loss_mask",
    "loss_masks": "loss_mask",
    "assistant_masks": "loss_mask",
    "completion_mask": "loss_mask",
    "completions": "responses",
    "completion_ids": "response_ids",
    "response_token_ids": "response_ids",
    "prompt_token_ids": "prompt_ids",
    "messages": "prompt",
}

_IMAGES = "the model's inputs besides tokens are not supported; leave such prompts out"
_REWARDS = "give one number per response as 'rewards', and remove the key"
_ADVANTAGES = "advantages are made from 'rewards' by --estimator; remove the key"
_TEMPLATE = "put it into the messages of 'prompt' or into 'chat_template_kwargs', or store 'prompt_ids'"
_LOGPROBS = (
    "log-probs of the policy that sampled the responses belong under 'logprobs'; remove the key or rename it"
)
_PADDED = "store the tokens without padding, with 'loss_mask' for those of a response that are not scored"

# Known keys that are not supported, with what to do about them.
REFUSED = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _IMAGES),
    **dict.fromkeys(("pixel_values", "image_grid_thw", "multi_modal_data", "multi_modal_inputs"), _IMAGES),
    **dict.fromkeys(("token_rewards", "token_level_rewards", "token_level_scores", "rm_scores"), _REWARDS),
    **dict.fromkeys(("step_rewards", "process_rewards"), _REWARDS),
    **dict.fromkeys(("advantages", "advantage", "returns", "token_weights"), _ADVANTAGES),
    **dict.fromkeys(("log_probs", "rollout_log_probs", "old_log_probs", "old_logprobs"), _LOGPROBS),
    **dict.fromkeys(("response_logprobs", "completion_logprobs", "behaviour_logprobs"), _LOGPROBS),
    **dict.fromkeys(("sampling_logprobs", "sampling_per_token_logps", "old_per_token_logps"), _LOGPROBS),
    **dict.fromkeys(("attention_mask", "position_ids", "input_ids"), _PADDED),
    **dict.fromkeys(("system", "system_prompt", "documents", "functions"), _TEMPLATE),
    "chat_template": "pass the template as --chat-template, for all records",
}
# These change how text becomes tokens, and nothing where the record holds the prompt's token ids.
OF_TEXT = {"system", "system_prompt", "documents", "functions", "chat_template"}


def _says_nothing(reasons: Any, record: Mapping[str, Any]) -> bool:
    """Whether reasons are not of single responses, or not needed: 'truncated' says the same, or token ids are there and
    the reasons are of another kind."""
    if not isinstance(reasons, list) or record.get("truncated") is not None:
        return True
    exact = (
        record.get("response_ids", record.get("completion_ids", record.get("response_token_ids"))) is not None
    )
    return exact and not all(one is None or isinstance(one, str) and one in ENDS for one in reasons)


def named(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A record with every field under its own name.

    Raises:
        RecordError: a key is known but not supported, or a field is there under two names.
    """
    if ALIASES.keys().isdisjoint(record) and REFUSED.keys().isdisjoint(record):
        return dict(record)
    made: dict[str, Any] = {}
    for key, value in record.items():
        name = ALIASES.get(key, key)
        if key in REASONS and _says_nothing(value, record):
            name = key
        if key in REFUSED and value is not None:
            if not (key in OF_TEXT and record.get("prompt_ids", record.get("prompt_token_ids"))):
                raise RecordError(where, f"the key {key!r} is known, but not supported", REFUSED[key])
        if name != key and value is None:
            continue
        if name in made and made[name] is not None and value is not None:
            raise RecordError(
                where, f"{name!r} is there under two names ({key!r} is another one of it)", "keep one of them"
            )
        made[name] = value
    return made
