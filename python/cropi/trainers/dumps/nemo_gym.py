"""Reader of the rollouts that NeMo-Gym collects (``gym eval run``, ``ng_collect_rollouts``): JSON lines.

A line has ``responses_create_params`` (the request in the form of OpenAI's Responses), ``response`` (its ``output``
is a list of messages, calls of tools and what tools said) and ``reward``. Where the model server gives tokens, what
the policy said in each turn holds ``prompt_token_ids``, ``generation_token_ids`` and ``generation_log_probs``, in its
last item. Where a turn between others has none, the row is an error: of what was sampled a part would be missing. What
stands behind the last turn with tokens (an agent's closing words, or an empty turn where the context was full) is left
out, as NeMo-RL leaves it out of training; a warning says so where it has text.
Without any tokens a response of one message is read as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.errors import warn
from cropi.form import nested
from cropi.trainers.dumps.fields import BadSample, Left, Unused, listed, names, shown
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump
from cropi.trainers.dumps.text_rows import step_of, warn_text
from cropi.trainers.dumps.verifiers import of_text, sequence

ASKED, SAID = "responses_create_params", "response.output"
TOKENS = "generation_token_ids"


class ClosingWords(UserWarning):
    """Rows end in text without token ids, behind turns that have them: it is left out."""


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file. Prompt ids: ``reading.id_key``, a key of the row, or a hash of the prompt.
    ``reading.temperature`` goes before the request's.
    """
    step, closing = step_of(path), list[str]()

    def read(pair: tuple[str, dict[str, Any]]) -> Rollout:
        where, row = pair
        asked, said = row.get(ASKED), nested(row, SAID)
        if not isinstance(asked, Mapping) or said is None:
            raise BadSample(
                where, ASKED, f"should be a request, with a response, but the row has {names(row)}"
            )
        if row.get("mask_sample") is True:
            raise Unused(where, "mask_sample", "is set")
        items = [item for item in listed(said, SAID, where) if isinstance(item, Mapping)]
        turns = [{"tokens": _turn(item)} for item in items if item.get(TOKENS) is not None]
        if turns:
            closing.extend([where] * _closing(items, where))
        held = sequence(turns, where)
        if held is None:
            warn_text(path, left)
        prompt = _prompt(asked, where)
        own = prompt if held is None else " ".join(map(str, held["prompt_ids"]))
        return checked(Rollout(
            id=id_of(row, reading.id_key, own, where), where=where, step=step, prompt=prompt,
            reward=reward_of(row.get("reward"), "reward", where),
            response=_text(items, where) if held is None else None,
            temperature=reading.warmth(asked.get("temperature"), f"{ASKED}.temperature", where),
            extra=of_text(asked) if held is None else {}, **(held or {}),
        ))  # fmt: skip

    yield from left.each(rows_of_dump(path, left), read)
    if closing:
        warn(
            f"{len(closing)} rollouts, for example {closing[0]}, end in text without {TOKENS}, which is left out, as "
            "NeMo-RL leaves it out of training",
            ClosingWords,
        )


def _turn(item: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt_ids": item.get("prompt_token_ids"), "completion_ids": item[TOKENS],
        "completion_logprobs": item.get("generation_log_probs"),
    }  # fmt: skip


def _closing(items: list[Mapping[str, Any]], where: str) -> bool:
    """Whether there is text behind the last turn with token ids.

    Raises:
        BadSample: a turn before it has none.
    """
    last = max(number for number, item in enumerate(items) if item.get(TOKENS) is not None)
    for number, item in enumerate(items[:last]):
        if _is_said(item) and not _is_said(items[number + 1]) and item.get(TOKENS) is None:
            raise BadSample(
                where, f"{SAID}[{number}]", f"has no {TOKENS}, and later items have: a call of the model would be left "
                "out", "collect the rollouts with the token ids of every call, or pass --skip-bad",
            )  # fmt: skip
    return any(_is_said(item) and _words(item.get("content")) != "" for item in items[last + 1 :])


def _is_said(item: Mapping[str, Any]) -> bool:
    """Whether an item is of the policy, not of a tool or a user."""
    kind = str(item.get("type", "message"))
    return item.get("role", "assistant") == "assistant" if kind == "message" else not kind.endswith("_output")


def _prompt(asked: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The request's messages as chat templates know them.

    Raises:
        BadSample: one of them is not a message of text.
    """
    given = asked.get("input")
    made = (
        [{"role": "user", "content": given}]
        if isinstance(given, str)
        else listed(given, f"{ASKED}.input", where)
    )
    if asked.get("instructions"):
        made = [{"role": "system", "content": asked["instructions"]}, *made]
    messages = []
    for number, message in enumerate(made):
        role, text = nested(message, "role"), _words(nested(message, "content"))
        if not isinstance(role, str) or text is None:
            raise BadSample(
                where, f"{ASKED}.input[{number}]", f"should be a message of text, got {shown(message)}"
            )
        messages.append({"role": role, "content": text})
    return messages


def _words(content: Any) -> str | None:
    """A message's text, also in parts; None where there is more than text."""
    parts = [{"text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not all(isinstance(nested(part, "text"), str) for part in parts):
        return None
    return "".join(part["text"] for part in parts)


def _text(items: list[Mapping[str, Any]], where: str) -> str:
    """The response of one message.

    Raises:
        BadSample: it is more: calls of tools, or thoughts apart from the message.
    """
    kinds = [item.get("type", "message") for item in items]
    text = _words(items[0].get("content")) if kinds == ["message"] else None
    if text is None:
        raise BadSample(
            where, SAID, f"is {', '.join(map(shown, kinds[:6])) or 'empty'}, without token ids: what was sampled is "
            "not one text",
            "collect the rollouts with token ids (return_token_id_information of the model server), or pass --skip-bad",
        )  # fmt: skip
    return text
