"""Prompts for a GRPOTrainer that it reads as the tokens that they were scored by.

TRL applies the chat template to messages and reads text as it is; here a prompt of text is a user's message where the
tokenizer has a template. So a policy would be trained on other prompts than it was scored on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from cropi.data.prompt_ids import PromptIds
from cropi.data.records import PromptGroup
from cropi.errors import RecordError, warn

TRIED = 16  # prompts of a trainer's dataset


class OtherPrompts(UserWarning):
    """TRL reads prompts as other tokens than they were scored by."""


def prompts_as_scored(
    groups: Iterable[PromptGroup],
    tokenizer: Any,
    tokens: Callable[[PromptGroup], list[int]],
    variables: Mapping[str, Any] | None = None,
) -> list[Any]:
    """A prompt for TRL of every group: text as the template renders it, messages as they are. A warning says where
    TRL's tokens differ all the same.

    Args:
        groups: of the selected prompts.
        tokenizer: the policy's.
        tokens: the tokens by which a prompt was scored.
        variables: of the chat template, as TRL has them.
    """
    made, other, first = list[Any](), 0, ""
    for group in groups:
        try:
            ids = tokens(group)
        except RecordError:  # it was left out of the scores, too
            made.append(group.prompt)
            continue
        found = next(
            (one for one in _ways(group, ids, tokenizer) if _read(one, tokenizer, variables) == ids), None
        )
        if found is None:
            other, first = other + 1, first or group.id
            found = group.prompt if group.prompt is not None else tokenizer.decode(ids)
        made.append(found)
    if other:
        warn(
            f"trl: {other} of {len(made)} selected prompts, for example {first!r:.100}, are other tokens to TRL than "
            "those that they were scored by (another chat template, tools or variables, or stored prompt_ids), so that "
            "training sees other prompts; give TRL the same by trl.args (chat_template_kwargs), or train by a command "
            "of your own",
            OtherPrompts,
        )
    return made


def unlike_dataset(
    groups: Iterable[PromptGroup], trainer: Any, ids: PromptIds, tokens: Callable[[PromptGroup], list[int]]
) -> str:
    """What is wrong, in words, where a trainer makes other tokens of its dataset's prompts than those that the prompts
    of the same ids in files are scored by. The first :data:`TRIED` are looked at, but none that environments own.
    """
    if getattr(trainer, "environment_factories", None) is not None:
        return ""
    variables = {
        **(getattr(trainer, "chat_template_kwargs", None) or {}),
        "chat_template": getattr(trainer, "chat_template", None),
        "tools": getattr(trainer, "tools", None) or None,
    }
    other, tried = list[str](), 0
    for group in islice((group for group in groups if group.id in ids), TRIED):
        prompt = trainer.train_dataset[ids.place[group.id]].get("prompt")
        try:
            mine = tokens(group)
        except RecordError:
            continue
        tried += 1
        if isinstance(prompt, (str, list)) and _read(prompt, trainer._tokenizer, variables) != mine:
            other.append(group.id)
    if not other:
        return ""
    return (
        f"{len(other)} of the first {tried} prompts of the train files, for example {other[0]!r:.100}, are scored by "
        "other tokens than the trainer makes of them (text in one place and messages in the other, another template or "
        "other tools): the policy trains on other prompts than those that were chosen; make both alike"
    )


def _ways(group: PromptGroup, ids: list[int], tokenizer: Any) -> list[Any]:
    if isinstance(group.prompt, list):
        return [group.prompt]
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    # TRL's tokenizer puts the token of the beginning in front itself.
    rest = [text, text.removeprefix(tokenizer.bos_token or "")]
    return rest if group.prompt is None else [group.prompt, *rest]


def _read(prompt: Any, tokenizer: Any, variables: Mapping[str, Any] | None) -> list[int]:
    """The tokens that TRL makes of a prompt."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    if tokenizer.chat_template is None and not (variables or {}).get("chat_template"):
        return []
    made = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **(variables or {})
    )
    return list(made["input_ids"])
