"""Reader of chat completions in OpenAI's form, as servers answer and as batch output files hold them.

A row is an answer (``choices``, each with ``message`` and ``logprobs``), an answer under ``response`` (of a batch:
``response.body``), with the prompt beside it: ``messages`` or ``prompt`` of the row, of its ``request`` or ``body``. A
batch output file holds no prompts: the input file of the batch (``--dataset``) has them, by ``custom_id``.

Tokens are exact where the server says their ids: ``token_ids`` (in SGLang's chats ``response_token_ids``) and
``prompt_token_ids`` (``return_token_ids``), tokens written ``token_id:123`` (``return_tokens_as_token_ids``), or ``id``
beside each log-prob (llama.cpp).
Elsewhere ``logprobs.content`` holds the bytes of each sampled token, which name one token of the model's vocabulary:
with the tokenizer they become ids. Without either, responses are text, and their log-probs are left out, and a message
says so.

Rewards are ``reward`` of each choice, or ``rewards`` (``reward`` of a single choice) beside the choices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cropi.data.chat import last_text
from cropi.data.keys import RENDERED, was_cut
from cropi.data.scan import LossyTokens
from cropi.errors import CropiError, warn
from cropi.form import nested
from cropi.trainers.dumps.fields import (
    BadSample,
    Left,
    Unused,
    check_keys,
    listed,
    log_probs,
    names,
    shown,
    token_ids,
)
from cropi.trainers.dumps.reading import Reading
from cropi.trainers.dumps.rollout import Rollout, checked
from cropi.trainers.dumps.rows import id_of, reward_of, rows_of_dump
from cropi.trainers.dumps.text_rows import step_of
from cropi.trainers.dumps.vocabulary import Vocabulary

MARK = "token_id:"


def read_dump(path: Path, reading: Reading, left: Left) -> Iterator[Rollout]:
    """The rollouts in one file. Requests that failed are left out.

    Prompt ids: ``reading.id_key``, a key of the row (``custom_id``), or a hash of the prompt. ``reading.temperature``
    goes before the request's.
    """
    asked = {} if reading.requests is None else _asked(Path(reading.requests))
    step, vocabulary, lost = step_of(path), Vocabulary(reading.tokenizer), [0, 0]

    def choices(pair: tuple[str, dict[str, Any]]) -> list[tuple[str, _Row, Any, int]]:
        where, row = pair
        made = _row(row, where, asked)
        return [
            (f"{where}, choice {k}", made, one, k)
            for k, one in enumerate(listed(made.choices, "choices", where))
        ]

    rows = left.flat(rows_of_dump(path, left), choices)
    yield from left.each(rows, lambda one: _rollout(one, step, reading, vocabulary, lost))
    if lost[0]:
        warn(
            f"{path}: {lost[0]} responses hold their tokens as text, so they are tokenised again, which may give other "
            f"tokens than were sampled, and the log-probs of {lost[1]} are left out; give --model, whose tokenizer "
            "finds the ids by the tokens' bytes, or have the server write them (return_token_ids)",
            LossyTokens,
        )


class _Row:
    """What a row says: its answer's choices, its request, and itself."""

    def __init__(self, row: dict[str, Any], answer: Mapping[str, Any], request: Mapping[str, Any]) -> None:
        self.row, self.answer, self.request = row, answer, request
        self.choices = answer.get("choices")
        messages = request.get("messages", row.get("messages"))
        self.prompt = messages if messages is not None else request.get("prompt", row.get("prompt"))

    @property
    def columns(self) -> dict[str, Any]:
        """What a reward function may ask for: the row's own keys, and the request's metadata."""
        about = self.request.get("metadata")
        own = {
            key: value
            for key, value in self.row.items()
            if key not in ("response", "choices", "request", "body")
        }
        return {**(about if isinstance(about, Mapping) else {}), **own}


def _asked(path: Path) -> dict[str, Mapping[str, Any]]:
    """The requests of a batch's input file by their ``custom_id``."""
    requests: dict[str, Mapping[str, Any]] = {}
    for where, row in rows_of_dump(path, Left()):
        body = row.get("body")
        if not isinstance(row.get("custom_id"), str) or not isinstance(body, Mapping):
            raise CropiError(
                f"{where}: a batch's input has 'custom_id' and 'body', but this row has {names(row)}"
            )
        if row["custom_id"] in requests:
            raise CropiError(
                f"{where}: the custom_id {shown(row['custom_id'])} was used before; give each request an "
                "id of its own"
            )
        requests[row["custom_id"]] = body
    return requests


def _row(row: dict[str, Any], where: str, asked: Mapping[str, Mapping[str, Any]]) -> _Row:
    held: Mapping[str, Any] = row
    for key in ("response", "body"):
        if "choices" not in held and isinstance(held.get(key), Mapping):
            held = held[key]
    code = nested(row, "response.status_code")
    if row.get("error") or (isinstance(code, int) and code != 200):
        raise Unused(where, "error", f"the request failed ({shown(row.get('error') or code)})")
    check_keys(held, ("choices",), where, "a chat completion")
    request: Any = row.get("request") if isinstance(row.get("request"), Mapping) else {}
    if isinstance(request.get("body"), Mapping):
        request = request["body"]
    if not request and isinstance(row.get("custom_id"), str):
        request = asked.get(row["custom_id"], {})
    return _Row(row, held, request)


def _rollout(
    one: tuple[str, _Row, Any, int], step: int, reading: Reading, vocabulary: Vocabulary, lost: list[int]
) -> Rollout:
    where, row, choice, number = one
    if not isinstance(choice, Mapping):
        raise BadSample(where, "choices", f"should hold tables of fields, got {shown(choice)}")
    prompt_ids = next(
        (part["prompt_token_ids"] for part in (choice, row.answer, row.row) if part.get("prompt_token_ids")),
        None,
    )
    if prompt_ids is not None:
        prompt_ids = token_ids(prompt_ids, "prompt_token_ids", where)
    if row.prompt is None and prompt_ids is None:
        raise BadSample(
            where, "messages", "the row holds an answer and no prompt",
            "give the input file of the batch as --dataset, or write 'messages' beside every answer, or pass "
            "--skip-bad",
        )  # fmt: skip
    message, text = choice.get("message"), _text(choice)
    ids, probs, held = _tokens(choice, vocabulary, where)
    if ids is None:
        lost[0] += 1
        lost[1] += held
    if not ids and not text:
        raise Unused(where, "message", "is empty")
    warm = row.request.get("temperature", row.row.get("temperature"))
    tools = row.request.get("tools", row.row.get("tools"))
    extra: dict[str, Any] = {} if ids else {"lossy": True}
    if isinstance(message, Mapping) and isinstance(row.prompt, str):
        extra[RENDERED] = False  # the server made a user's message of it
    if tools:
        extra["tools"] = tools
    prompt = prompt_ids if row.prompt is None else row.prompt
    if reading.scorer is None:
        reward = _reward(row, choice, number, where)
    else:
        reward = reading.scorer(where, row.prompt, last_text(text), ids, row.columns)
    return checked(Rollout(
        id=id_of(row.row, reading.id_key, prompt, where), reward=reward, step=step, where=where,
        prompt_ids=prompt_ids, response_ids=ids, logprobs=probs, prompt=row.prompt, response=text or None,
        answer=row.row.get("answer"), temperature=reading.warmth(warm, "temperature", where),
        truncated=was_cut(choice.get("finish_reason")), extra=extra,
    ))  # fmt: skip


def _text(choice: Mapping[str, Any]) -> Any:
    """The response: a text, or a list of one message where it holds more than text."""
    message = choice.get("message")
    if not isinstance(message, Mapping):
        message = choice.get("text")
    if not isinstance(message, Mapping):
        return message
    kept = {key: value for key, value in message.items() if value is not None and value != []}
    plain = set(kept) <= {"role", "content"} and isinstance(kept.get("content"), str)
    return kept["content"] if plain else [kept]


def _reward(row: _Row, choice: Mapping[str, Any], number: int, where: str) -> float:
    for key in ("reward", "score"):
        if choice.get(key) is not None:
            return reward_of(choice[key], key, where)
    for key in ("rewards", "scores"):
        if (held := row.row.get(key)) is not None:
            values = listed(held, key, where)
            if number < len(values):
                return reward_of(values[number], f"{key}[{number}]", where)
    for key in ("reward", "score"):
        if row.row.get(key) is not None and len(row.choices or ()) == 1:
            return reward_of(row.row[key], key, where)
    return reward_of(None, "reward", where)


def _tokens(
    choice: Mapping[str, Any], vocabulary: Vocabulary, where: str
) -> tuple[list[int] | None, list[float] | None, bool]:
    """The ids of a choice and their log-probs, None where the file does not tell; and whether it has log-probs."""
    name = "token_ids" if choice.get("token_ids") else "response_token_ids"
    ids = token_ids(choice[name], name, where) if choice.get(name) else None
    held = choice.get("logprobs")
    if not isinstance(held, Mapping):
        return ids, None, False
    if isinstance(held.get("content"), list):
        entries = held["content"]
        if not all(isinstance(entry, Mapping) and "token" in entry for entry in entries):
            raise BadSample(where, "logprobs.content", "should hold a token and a logprob each")
        words = [(entry["token"], _bytes(entry.get("bytes"), t, where)) for t, entry in enumerate(entries)]
        numbers = [entry.get("logprob") for entry in entries]
        if ids is None and entries and all(type(entry.get("id")) is int for entry in entries):
            ids = token_ids([entry["id"] for entry in entries], "logprobs.content.id", where)
    elif isinstance(held.get("tokens"), list):
        words = [(word, None) for word in held["tokens"]]
        numbers = listed(held.get("token_logprobs"), "logprobs.token_logprobs", where)
    else:
        return ids, None, False
    if ids is None and words:
        ids = _named(words) or vocabulary.ids(words)
    if not ids:
        return None, None, bool(words)
    return ids, log_probs(numbers, len(ids), None, "logprobs", where), True


def _bytes(value: Any, t: int, where: str) -> Any:
    """A token's bytes as a server writes them: integers from 0 to 255, or nothing.

    Raises:
        BadSample: a list of something else.
    """
    if isinstance(value, list) and not all(type(one) is int and 0 <= one < 256 for one in value):
        raise BadSample(
            where, f"logprobs.content[{t}].bytes", f"should be integers from 0 to 255, got {shown(value)}"
        )
    return value


def _named(words: list[tuple[Any, Any]]) -> list[int] | None:
    """The ids of tokens that are written ``token_id:123``; None where one is not."""
    numbers = []
    for word, _ in words:
        number = word.removeprefix(MARK) if isinstance(word, str) and word.startswith(MARK) else ""
        if not number.isascii() or not number.isdigit():
            return None
        numbers.append(int(number))
    return numbers
