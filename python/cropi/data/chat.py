"""Messages of a conversation, in the one form that templates for text render."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi.errors import RecordError, shown

# Kinds of content parts that hold text, with the key it stands under.
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
# What a message may hold in the place of content.
WITHOUT_TEXT = ("tool_calls", "function_call", "reasoning_content")
IMAGE_REMEDY = "a policy that reads more than text is not supported; leave the prompt out, or pass --skip-bad"


def plain_messages(messages: Any, name: str, where: str) -> list[dict[str, Any]]:
    """The messages with their text parts joined, and without keys that hold nothing.

    Raises:
        RecordError: not a list of messages, or one holds an image, a video or a sound.
    """
    if not isinstance(messages, list):
        raise RecordError(where, f"{name} must be a string or a list of messages, got {shown(messages)}")
    return [_plain(message, f"{name}[{i}]", where) for i, message in enumerate(messages)]


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """A prompt as a conversation: a text is one user message."""
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def last_text(prompt: str | list[dict[str, Any]] | None) -> str:
    """A prompt's text, of a conversation that of the last message."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[-1].get("content") or "") if prompt else ""


def _plain(message: Any, name: str, where: str) -> dict[str, Any]:
    held = message.items() if isinstance(message, Mapping) else ()
    # Columns of a table hold an empty value for every key that another row has.
    made = {str(key): value for key, value in held if value is not None}
    content = made.get("content")
    if not isinstance(made.get("role"), str) or (content is None and not any(map(made.get, WITHOUT_TEXT))):
        raise RecordError(
            where, f"a message of {name.split('[')[0]!r} needs 'role' and 'content', got {shown(message)}"
        )
    if content is None:
        return made
    if isinstance(content, list):
        made["content"] = "".join(
            _part(part, f"{name}.content[{i}]", where) for i, part in enumerate(content)
        )
    elif not isinstance(content, str):
        raise RecordError(
            where,
            f"{name}.content must be a string or a list of text parts, got {shown(content)}",
            "write the text itself, or pass --skip-bad",
        )
    return made


def _part(part: Any, name: str, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text" if "text" in part else None) if isinstance(part, Mapping) else None
    text = part.get(TEXT_PARTS[kind]) if kind in TEXT_PARTS else None
    if isinstance(text, str):
        return text
    if isinstance(kind, str) and kind not in TEXT_PARTS:
        raise RecordError(
            where, f"{name} holds a part of the type {shown(kind)}, which is not text", IMAGE_REMEDY
        )
    raise RecordError(where, f'{name} must be {{"type": "text", "text": ...}}, got {shown(part)}')
