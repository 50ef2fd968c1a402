"""Prompt groups to token ids: chat template, end token and length limits, each by an explicit rule.

Token ids stored in a record always win. Text is tokenised here, which is *lossy*: a tokenizer maps several
token sequences to one text, so the ids may differ from those that were sampled (``scan.py`` says so once).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from cropi.data.chat import as_messages
from cropi.data.keys import RENDERED
from cropi.data.records import PromptGroup
from cropi.errors import CropiError, RecordError, warn
from cropi.gradient.equal import equal_responses
from cropi.gradient.template import ChatTemplate, check_variables, special_tokens, template_text

TOO_LONG = ("error", "skip", "truncate-right", "truncate-left")


class TooLong(RecordError):
    """A prompt group does not fit, under ``too_long="skip"``: the prompt is left out and reported."""


class QuotedToken(UserWarning):
    """A prompt quotes a special token, which is taken as text."""


class NotInTemplate(UserWarning):
    """A record holds tools or variables that the chat template does not read."""


class BehindEnd(UserWarning):
    """Tokens behind an end token are scored as the policy's."""


@dataclass(frozen=True)
class TokenGroup:
    """A prompt group as token ids; every response ends with the end token unless it was truncated.

    ``masks`` holds a 1 for every token of ``responses`` that is scored, and a 0 for those that are only read (what
    tools and users said in between); None: all are scored. The last token of a response is always scored.
    ``kept``: of a subset of the responses, the factor on the weights of each, by its number; None: all are sketched.
    ``places``: of a subset of their scored tokens, the places of those of each response; None: all are sketched.
    ``noise``: what stands in the place of every response's advantage (:mod:`cropi.gradient.noise`); None: nothing.
    """

    group: PromptGroup
    prompt: list[int]
    responses: list[list[int]]
    logprobs: list[list[float]] | None
    temperature: float
    masks: list[list[int]] | None = None
    kept: Mapping[int, float] | None = None
    places: Mapping[int, list[int]] | None = None
    noise: tuple[float, ...] | None = None

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.group.id

    @cached_property
    def equal(self) -> list[tuple[int, ...]]:
        """See :func:`cropi.gradient.equal.equal_responses`; of those that are kept."""
        equal = equal_responses(self.responses, self.masks)
        return equal if self.kept is None else [members for members in equal if members[0] in self.kept]

    @cached_property
    def equal_to(self) -> dict[int, tuple[int, ...]]:
        """The responses that are equal to one, by its number; of :attr:`equal`, by the first."""
        return {members[0]: members for members in self.equal}

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return sum(self.lengths)

    @property
    def lengths(self) -> list[int]:
        """The number of scored tokens of every response."""
        return list(map(len, self.responses)) if self.masks is None else list(map(sum, self.masks))


@dataclass(frozen=True)
class Tokenize:
    """How text becomes token ids.

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        vocabulary: number of rows of the model's embedding; ids from there on are errors.
        context: the model's context length, or None when it has no limit.
        chat_template: "auto" (messages go through the tokenizer's template; so does a string, as one user
            message, if the tokenizer has a template, the string does not begin as a rendered one does, and the record
            does not say ``rendered``),
            "none" (strings as they are), or a Jinja template, as text or as the path of a file.
        eos: append the end token to responses that are given as text and are not marked as truncated: the token
            that closes an assistant's turn in the template, or the tokenizer's own without one.
        max_length: limit on prompt + response in tokens; None: the context.
        too_long: what to do above the limit: "error", "skip" (leave the prompt out, with the reason),
            "truncate-right" (drop the last tokens of the response) or "truncate-left" (drop the first of the
            prompt).
        temperature: of the rollouts, for all records; None takes each record's own, and 1 where it has none.
        ends: further tokens that end a response (``generation_config.eos_token_id``): one that ends with any of
            them gets no other.
        template_date: what a template that prints the date prints, ``YYYY-MM-DD``; None: today.
        tools, chat_template_kwargs: what the template gets for records that have none of their own.
    """

    tokenizer: Any
    vocabulary: int
    context: int | None = None
    chat_template: str = "auto"
    eos: bool = True
    max_length: int | None = None
    too_long: str = "error"
    temperature: float | None = None
    ends: tuple[int, ...] = ()
    template_date: str | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    _warned: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.too_long not in TOO_LONG:
            raise CropiError(f"too_long must be one of {', '.join(TOO_LONG)}, got {self.too_long!r}")
        if self.max_length is not None and self.max_length < 2:
            raise CropiError(f"max_length must be at least 2, got {self.max_length}")
        if self.max_length is not None and self.context is not None and self.max_length > self.context:
            raise CropiError(
                f"max_length is {self.max_length}, but the model's context is {self.context}; give at most that"
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise CropiError(f"temperature must be a finite number above 0, got {self.temperature}")
        object.__setattr__(self, "chat_template", template_text(self.chat_template))
        if self.eos and self.tokenizer is not None and self.end is None:
            raise CropiError(
                "the tokenizer has no end token to append; set its eos_token, or pass --no-eos (eos=False)"
            )

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, or None where strings are taken as they are."""
        if self.tokenizer is None or self.chat_template == "none":
            return None
        if self.chat_template == "auto" and not self.tokenizer.chat_template:
            return None
        own = None if self.chat_template == "auto" else self.chat_template
        return ChatTemplate(self.tokenizer, own, self.template_date)

    @cached_property
    def end(self) -> int | None:
        """The token that is appended to a response that is given as text."""
        if self.tokenizer is None:
            return None
        closing = self.template.closing if self.template is not None else None
        return self.tokenizer.eos_token_id if closing is None else closing

    @cached_property
    def all_ends(self) -> frozenset[int]:
        """Every token that ends a response."""
        own = None if self.tokenizer is None else self.tokenizer.eos_token_id
        ends = {self.end, own, *self.ends}
        return frozenset(end for end in ends if end is not None)

    def __call__(self, group: PromptGroup) -> TokenGroup:
        """Tokenise one group.

        Raises:
            RecordError: a token id beyond the vocabulary, a prompt that leaves no room in the context, a
                response that does not fit (unless it is truncated) or goes on behind an end token, or messages that no
                template renders.
            TooLong: the same lengths, under ``too_long="skip"``.
        """
        where = f"{group.where} (prompt {group.id!r:.100})"
        self._check_tokenizer(where, group.prompt_ids, group.response_ids)
        prompt = list(group.prompt_ids) if group.prompt_ids is not None else self._prompt(group, where)
        masks = group.loss_mask
        if group.response_ids is not None:
            responses = [list(ids) for ids in group.response_ids]
            if masks is None:
                self._warn_of_turns(responses, where)
        else:
            responses, masks = self._responses(group, where)
        self._check_vocabulary(where, "prompt", prompt)
        for k, ids in enumerate(responses):
            self._check_vocabulary(where, f"responses[{k}]", ids)
            if not ids:
                raise RecordError(where, f"responses[{k}] has no token")
        logprobs = group.logprobs
        if masks is not None:
            responses = _without_rest(responses, masks)
        prompt, responses = self._fit(where, prompt, responses)
        if masks is not None:
            masks = [list(mask[: len(ids)]) for mask, ids in zip(masks, responses, strict=True)]
            for k, mask in enumerate(masks):
                if not any(mask):
                    raise RecordError(
                        where,
                        f"responses[{k}] has no scored token left where it is cut",
                        "pass a higher --max-length, --too-long skip, or --skip-bad",
                    )
            responses = _without_rest(responses, masks)
            masks = [mask[: len(ids)] for mask, ids in zip(masks, responses, strict=True)]
            if all(map(all, masks)):
                masks = None
        if logprobs is not None:
            logprobs = [values[: len(ids)] for values, ids in zip(logprobs, responses, strict=True)]
        temperature = self.temperature or group.temperature or 1.0
        return TokenGroup(group, prompt, responses, logprobs, temperature, masks)

    def prompt(self, group: PromptGroup) -> list[int]:
        """The token ids of a group's prompt alone; stored ones win.

        Raises:
            RecordError: a token id beyond the vocabulary, or messages that no template renders.
        """
        where = f"{group.where} (prompt {group.id!r:.100})"
        self._check_tokenizer(where, group.prompt_ids)
        ids = list(group.prompt_ids) if group.prompt_ids is not None else self._prompt(group, where)
        self._check_vocabulary(where, "prompt", ids)
        if not ids:
            raise RecordError(where, "the prompt has no token")
        return ids

    def _check_tokenizer(self, where: str, *ids: Any) -> None:
        """Check that there is a tokenizer, where some ids have to be made of text."""
        if self.tokenizer is None and any(one is None for one in ids):
            raise RecordError(
                where,
                "its text needs a tokenizer, and there is none",
                "give a --model whose folder holds a tokenizer (in Python tokenizer=), or store token ids",
            )

    def _template_values(self, group: PromptGroup) -> tuple[list[Any] | None, Mapping[str, Any] | None]:
        """The tools and the variables that the template gets for a group."""
        variables = group.chat_template_kwargs
        return (
            self.tools if group.tools is None else group.tools,
            self.chat_template_kwargs if variables is None else variables,
        )

    def _prompt(self, group: PromptGroup, where: str) -> list[int]:
        prompt, template = group.prompt, self.template
        tools, variables = self._template_values(group)
        check_variables(variables, where)
        if isinstance(prompt, str) and (template is None or self._is_rendered(group, prompt, template)):
            for name in ("tools", "chat_template_kwargs"):
                if getattr(group, name):
                    raise RecordError(
                        where,
                        f"the record has {name!r}, but its prompt is not rendered by a chat template",
                        "give the prompt as messages and a --chat-template, or store 'prompt_ids'",
                    )
            return self._plain(prompt)
        if template is None:
            raise RecordError(
                where,
                "the prompt is a list of messages, but there is no chat template",
                "pass --chat-template FILE, or store the prompt as text or prompt_ids",
            )
        messages = as_messages(prompt)
        if unread := template.unread(tools, variables):
            self._warn(
                "unread",
                f"{where}: the chat template does not read {', '.join(unread)}, so that the prompt is rendered "
                "without; if the rollouts had another template, give it (--chat-template), or store prompt_ids",
                NotInTemplate,
            )
        ids, quoted = template.prompt_ids(messages, where, tools, variables)
        if quoted:
            self._warn(
                "quoted",
                f"{where}: the prompt quotes {', '.join(quoted)}, which is taken as text and not as the token; an "
                "engine that tokenised the rendered text may have read the token: store prompt_ids to be exact",
                QuotedToken,
            )
        return ids

    def _is_rendered(self, group: PromptGroup, prompt: str, template: ChatTemplate) -> bool:
        """Whether a string was rendered by a template before: the record says so, or it begins as one that was."""
        if self.chat_template != "auto":
            return False
        if group.extra.get(RENDERED) is True:
            return True
        return prompt.lstrip().startswith(template.openings) if template.openings else False

    def _plain(self, prompt: str) -> list[int]:
        """A string as it is, behind the tokenizer's start token; one that was rendered carries its own."""
        if any(token in prompt for token in special_tokens(self.tokenizer)):
            return list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        whole = list(self.tokenizer(prompt)["input_ids"])
        # A tokenizer may close every text; the response goes on where the prompt ends.
        bare = list(self.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return whole[: start + len(bare)]
        while whole and whole[-1] in self.all_ends:
            whole.pop()
        return whole

    def _responses(self, group: PromptGroup, where: str) -> tuple[list[list[int]], list[list[int]] | None]:
        """Token ids of responses that are given as text or messages, and masks if there are messages of others."""
        assert group.responses is not None
        made: list[tuple[list[int], list[int] | None]] = []
        for k, response in enumerate(group.responses):
            cut = group.truncated is not None and group.truncated[k]
            if isinstance(response, list):
                made.append(self._turns(group, k, response, cut, where))
            else:
                made.append((self._text(response, cut, f"{where}, responses[{k}]"), None))
        if all(mask is None for _, mask in made):
            return [ids for ids, _ in made], None
        return [ids for ids, _ in made], [[1] * len(ids) if mask is None else mask for ids, mask in made]

    def _turns(
        self, group: PromptGroup, k: int, response: list[dict[str, Any]], cut: bool, where: str
    ) -> tuple[list[int], list[int] | None]:
        first, name = response[0] if response else {}, f"{where}, responses[{k}]"
        if len(response) == 1 and first.keys() <= {"role", "content"} and first.get("role") == "assistant":
            return self._text(first["content"], cut, name), None
        if self.template is None:
            raise RecordError(
                name, "a response of several messages needs a chat template", "pass --chat-template FILE"
            )
        if group.prompt_ids is not None:
            raise RecordError(
                name, "the prompt is given as token ids, and the response as messages",
                "give both as messages, or both as token ids (with 'loss_mask')",
            )  # fmt: skip
        if isinstance(group.prompt, str) and self._is_rendered(group, group.prompt, self.template):
            raise RecordError(
                name, "the prompt is a text that a chat template rendered, and the response has several messages, "
                "which the template renders with the messages of the prompt alone",
                "give the prompt as messages, or store 'prompt_ids', 'response_ids' and 'loss_mask'",
            )  # fmt: skip
        prompt = as_messages(group.prompt)
        ids, mask = self.template.turn_ids(prompt, response, name, *self._template_values(group))
        if cut and response[-1].get("role") == "assistant":
            _leave_end_out(ids, mask, self.all_ends)
        return ids, mask

    def _text(self, response: str, cut: bool, where: str) -> list[int]:
        ids = list(self.tokenizer(response, add_special_tokens=False)["input_ids"])
        if early := self.all_ends.intersection(ids[:-1]):
            raise RecordError(
                where,
                f"goes on behind the end token {self.tokenizer.decode([min(early)])!r}, and what stands there was not "
                "sampled by the policy as one response",
                "give turns of tools and users as messages, or token ids with 'loss_mask'; cut the text at its end; or "
                "pass --skip-bad",
            )
        if not self.eos or cut or (ids and ids[-1] in self.all_ends):
            return ids
        assert self.end is not None
        return [*ids, self.end]

    def _warn_of_turns(self, responses: list[list[int]], where: str) -> None:
        for k, ids in enumerate(responses):
            if not self.all_ends.isdisjoint(ids[:-1]):
                self._warn(
                    "turns",
                    f"{where}, responses[{k}]: there are tokens behind an end token, and no 'loss_mask'; if tools or "
                    "users speak there, store the mask, or their tokens count as the policy's",
                    BehindEnd,
                )
                return

    def _warn(self, kind: str, words: str, category: type[Warning]) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warn(words, category)

    def _check_vocabulary(self, where: str, name: str, ids: list[int]) -> None:
        if max(ids, default=-1) < self.vocabulary:
            return
        for t, token in enumerate(ids):
            if token >= self.vocabulary:
                raise RecordError(
                    where,
                    f"token id {token} at position {t} of {name} is beyond the model's "
                    f"vocabulary of {self.vocabulary}",
                    "use the model that made the trajectories, or pass --skip-bad",
                )

    def _fit(
        self, where: str, prompt: list[int], responses: list[list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        limit = self.max_length or self.context
        longest = max(map(len, responses))
        if limit is None or len(prompt) + longest <= limit:
            return prompt, responses
        if self.too_long == "truncate-left" and longest < limit:
            return prompt[len(prompt) + longest - limit :], responses
        if self.too_long == "truncate-right" and len(prompt) < limit:
            return prompt, [ids[: limit - len(prompt)] for ids in responses]
        what = f"the prompt has {len(prompt)} tokens and its longest response {longest}"
        bound = f"max_length {limit}" if self.max_length else f"the model's context of {limit}"
        if self.too_long == "skip":
            raise TooLong(where, f"{what}, more than {bound}")
        cures = {"skip": True, "truncate-right": len(prompt) < limit, "truncate-left": longest < limit}
        cure = " or ".join(name for name, works in cures.items() if works)
        higher = "a higher --max-length or " if self.max_length and self.max_length != self.context else ""
        raise RecordError(where, f"{what}, together more than {bound}", f"pass {higher}--too-long {cure}")


def _without_rest(responses: list[list[int]], masks: list[list[int]]) -> list[list[int]]:
    """The responses up to their last scored token: nothing that is scored reads what comes behind it."""
    return [
        ids[: max((t for t, scored in enumerate(mask) if scored), default=len(ids) - 1) + 1]
        for ids, mask in zip(responses, masks, strict=True)
    ]


def _leave_end_out(ids: list[int], mask: list[int], ends: frozenset[int]) -> None:
    """Clear the mask from the end token of the last scored turn on: a template closes every turn, and the policy did
    not come to the end of one that was cut."""
    last = max(t for t, scored in enumerate(mask) if scored)
    first = max((t for t in range(last) if not mask[t]), default=-1) + 1
    end = next((t for t in range(first, last + 1) if ids[t] in ends), last + 1)
    mask[end:] = [0] * (len(mask) - end)
