"""A tokenizer's chat template: messages to token ids, and what the template itself says about prompts and turns.

Two things are learnt by rendering short conversations, not from a model's name: how a rendered prompt begins, and which
token closes the assistant's turn.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from cropi.errors import CropiError, RecordError, did_you_mean, shown
from cropi.files import meant, text_of

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATES = re.compile(r"""(["'])((?:(?!\1).)*%(?:(?!\1).)*)\1""")
_PROBE, _ANSWER = "cropi probe", "cropi answer"
# Where a message holds what a policy said, its thoughts among it.
SAID = ("content", "reasoning_content", "reasoning", "thinking")
# Arguments of apply_chat_template, and names that this module gives to the template.
_OURS = (
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize", "padding",
    "continue_final_message", "return_dict", "return_tensors", "return_assistant_tokens_mask", "truncation",
    "max_length", "tokenizer_kwargs", "sanitize_control_tokens", "cropi_dates",
)  # fmt: skip


def template_text(template: str) -> str:
    """A chat template as :class:`cropi.gradient.tokenize.Tokenize` takes it: a file's content in place of its path.

    Raises:
        CropiError: the file does not exist.
    """
    if template in ("auto", "none") or "{" in template:
        return template
    path = Path(template)
    if not os.path.isfile(path):
        raise CropiError(
            f"chat_template must be auto, none, a Jinja template or the path of one; there is no file {template!r}"
            f"; {meant(path)}".rstrip("; ")
        )
    return text_of(path)


def prints_date(tokenizer: Any, template: str) -> bool:
    """Whether the template in use prints the date of the day it is rendered on."""
    text = tokenizer.chat_template if template == "auto" else template
    return "strftime_now" in str(text) if template != "none" else False


def special_tokens(tokenizer: Any) -> list[str]:
    """The tokens that are not text, longest first: all special ones but those that a person may well write."""
    # A pad or unknown token may be set to any piece of text, "!" for example.
    spare = {tokenizer.pad_token, tokenizer.unk_token} - {tokenizer.eos_token, None}
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    named = {token for token in (*tokenizer.all_special_tokens, *added) if token}
    return sorted((t for t in named if t not in spare or len(t) > 2), key=lambda t: (-len(t), t))


def _left_out(messages: Sequence[Mapping[str, Any]], text: str) -> str | None:
    """A part of what the assistant says that is not in a rendered text, but for white space; None: there is none."""
    held = "".join(text.split())
    for number, message in enumerate(messages):
        if message.get("role") == "assistant":
            calls = message.get("tool_calls")
            named = (
                [call.get("function") for call in calls if isinstance(call, Mapping)]
                if isinstance(calls, list)
                else []
            )
            said = [(key, message.get(key)) for key in SAID]
            said += [
                ("tool_calls", function.get("name")) for function in named if isinstance(function, Mapping)
            ]
            for key, part in said:
                if isinstance(part, str) and "".join(part.split()) not in held:
                    return f"{key!r} of its message {number}, {shown(part)}"
    return None


class ChatTemplate:
    """The template of a tokenizer, or another one in its place.

    Args:
        tokenizer: a Hugging Face tokenizer.
        template: Jinja text; None takes the tokenizer's own.
        date: ``YYYY-MM-DD``, what a template that prints the date prints; None: today.

    Raises:
        CropiError: not a date.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, date: str | None = None) -> None:
        self.tokenizer, self._template = tokenizer, template
        try:
            self.date = datetime.date.fromisoformat(date) if date else datetime.date.today()
        except (ValueError, TypeError):
            raise CropiError(f"template_date must be a date as YYYY-MM-DD, got {date!r}") from None

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> str:
        """The rendered conversation. Raises whatever the template raises."""
        return str(self._apply(messages, tools, variables, tokenize=False, **options))

    def prompt_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        where: str,
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[str]]:
        """A prompt's token ids, and the special tokens that it quotes, which stay text.

        A prompt that ends with the assistant's words is continued; any other is followed by the assistant's header.

        Raises:
            RecordError: the template does not render it.
        """
        quotes, marked = _Quotes(self.special_tokens), list(messages)
        for i, message in enumerate(marked):
            if message.get("role") != "assistant" and isinstance(message.get("content"), str):
                marked[i] = {**message, "content": quotes.mark(message["content"])}
        ends = {"continue_final_message": True} if _is_answer(marked[-1]) else {"add_generation_prompt": True}
        try:
            text = self.text(marked, tools, variables, **ends)
        except Exception as error:  # a template may raise anything, jinja2's own errors included
            said = " ".join(str(error).split())
            raise RecordError(where, f"the chat template does not render this prompt: {said:.400}") from error
        if not quotes.found:
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]), []
        return self._ids_with_quotes(text, quotes), sorted(quotes.found)

    def turn_ids(
        self,
        prompt: Sequence[Mapping[str, Any]],
        answer: Sequence[Mapping[str, Any]],
        where: str,
        tools: list[Any] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Token ids and mask of a response of several messages, by the template's own marks of what the assistant said.

        Raises:
            RecordError: the template has no such marks, leaves out a part of what the assistant said, or renders the
                prompt in another way when an answer follows; the prompt quotes a special token.
        """
        if not _GENERATION.search(self.source(tools)):
            raise RecordError(
                where,
                "the response has several messages, and the chat template does not mark what the assistant said",
                "pass a --chat-template with {% generation %} around what the assistant says, or store 'response_ids' "
                "and 'loss_mask'",
            )
        begin, quoted = self.prompt_ids(prompt, where, tools, variables)
        try:
            whole = self._apply(
                [*prompt, *answer], tools, variables, tokenize=True, return_dict=True,
                return_assistant_tokens_mask=True,
            )  # fmt: skip
            text = self.text([*prompt, *answer], tools, variables)
        except Exception as error:
            said = " ".join(str(error).split())
            raise RecordError(
                where, f"the chat template does not render this response: {said:.400}"
            ) from error
        if missing := _left_out(answer, text):
            raise RecordError(
                where,
                f"the chat template leaves out what the policy said: {missing}",
                "pass a --chat-template that renders it, or store 'response_ids' and 'loss_mask'",
            )
        ids, mask = list(whole["input_ids"]), [int(value) for value in whole["assistant_masks"]]
        if ids[: len(begin)] != begin:
            # In the whole conversation a quoted token is the token, and in the prompt it is text.
            why = (
                f"the prompt quotes {', '.join(quoted)}, and the response has several messages"
                if quoted
                else "the chat template renders the prompt in another way when an answer follows"
            )
            raise RecordError(
                where,
                f"{why}, so that the tokens that the policy saw are not known",
                "store 'prompt_ids', 'response_ids' and 'loss_mask'",
            )
        ids, mask = ids[len(begin) :], mask[len(begin) :]
        if not any(mask):
            raise RecordError(where, "the chat template marks no token of the response as the assistant's")
        return ids, mask

    def source(self, tools: list[Any] | None = None) -> str:
        """The template's Jinja text."""
        if self._template is not None:
            return self._template
        own = self.tokenizer.chat_template
        if isinstance(own, dict):  # several by name: default, tool_use, ...
            own = own.get("tool_use" if tools and "tool_use" in own else "default", "")
        return str(own)

    def unread(self, tools: list[Any] | None, variables: Mapping[str, Any] | None) -> list[str]:
        """The names of what a prompt brings along and no word of the template stands for: it changes nothing."""
        text, given = self.source(tools), [*(["tools"] if tools else []), *(variables or {})]
        return [name for name in given if not re.search(rf"\b{re.escape(name)}\b", text)]

    @cached_property
    def special_tokens(self) -> list[str]:
        """See :func:`special_tokens`."""
        return special_tokens(self.tokenizer)

    @cached_property
    def openings(self) -> tuple[str, ...]:
        """The texts with which a prompt begins that was rendered before."""
        openings = [self.tokenizer.bos_token] if self.tokenizer.bos_token else []
        system = [{"role": "system", "content": _PROBE}]
        for messages in (
            [{"role": "user", "content": _PROBE}],
            [*system, {"role": "user", "content": _PROBE}],
        ):
            try:
                text = self.text(messages, add_generation_prompt=True).lstrip()
            except Exception:
                continue
            for token in [*self.special_tokens, *self.special_tokens]:  # a start token, then the turn's
                if text.startswith(token):
                    openings.append(token)
                    text = text.removeprefix(token).lstrip()
        return tuple(dict.fromkeys(openings))

    @cached_property
    def closing(self) -> int | None:
        """The token that closes the assistant's turn; None where the template writes none behind it."""
        messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = self.text(messages)
        except Exception:  # a template that renders no finished turn says nothing about its end
            return None
        rest = text.rpartition(_ANSWER)[2].lstrip()
        token = next((token for token in self.special_tokens if rest.startswith(token)), None)
        return None if token is None else int(self.tokenizer.convert_tokens_to_ids(token))

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None,
        variables: Mapping[str, Any] | None,
        **options: Any,
    ) -> Any:
        text, given = self.source(tools), dict(variables or {})
        if "strftime_now" in text:
            # A function cannot be handed to the template: its formats are looked up in a table instead.
            text = re.sub(r"strftime_now\s*\(", "cropi_dates.get(", text).replace(
                "strftime_now", "cropi_dates"
            )
            if not _DATES.search(text):
                raise ValueError("it prints the date in a form that it does not spell out; store prompt_ids")
            given["cropi_dates"] = {form: self.date.strftime(form) for _, form in _DATES.findall(text)}
        return self.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tools=tools, chat_template=text, **given, **options
        )

    def _ids_with_quotes(self, text: str, quotes: _Quotes) -> list[int]:
        """Token ids of a text in which special tokens count where the template wrote them, and nowhere else."""
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, self.special_tokens)) + ")", text):
            if part in quotes.tokens:
                ids.append(int(self.tokenizer.convert_tokens_to_ids(part)))
            elif part:
                plain = quotes.unmark(part)
                ids += self.tokenizer(plain, add_special_tokens=False, split_special_tokens=plain != part)[
                    "input_ids"
                ]
        return ids


class _Quotes:
    """Special tokens in what people wrote, as marks of the private-use area while the template is rendered."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.found = list(tokens), set[str]()
        self._pattern = re.compile("|".join(map(re.escape, self.tokens)) or r"(?!)")

    def mark(self, text: str) -> str:
        def replace(match: re.Match[str]) -> str:
            self.found.add(match[0])
            return f"\ue000{self.tokens.index(match[0])}\ue001"

        return self._pattern.sub(replace, text)

    def unmark(self, text: str) -> str:
        return re.sub("\ue000(\\d+)\ue001", lambda match: self.tokens[int(match[1])], text)


def _is_answer(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant" and isinstance(message.get("content"), str)


def check_variables(variables: Mapping[str, Any] | None, where: str) -> None:
    """Check that ``chat_template_kwargs`` holds variables of templates.

    Raises:
        RecordError: names the one that is an argument of another kind.
    """
    for name in variables or {}:
        if name in _OURS:
            raise RecordError(
                where,
                f"chat_template_kwargs holds {name!r}, which is not a variable of templates",
                f"{did_you_mean(name, ('enable_thinking', 'date_string'))}take it out, or pass --skip-bad",
            )
