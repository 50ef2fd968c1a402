"""Prompt groups to token ids: chat template, end token and length limits, each by an explicit rule.

Token ids stored in a record always win. Text is tokenised here, which is *lossy*: a tokenizer maps several
token sequences to one text, so the ids may differ from those that were sampled (``scan.py`` says so once).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cropi.data.records import PromptGroup
from cropi.errors import CropiError, RecordError

TOO_LONG = ("error", "skip", "truncate-right", "truncate-left")


class TooLong(RecordError):
    """A prompt group does not fit, under ``too_long="skip"``: the prompt is left out and reported."""


def template_text(template: str) -> str:
    """A chat template as :class:`Tokenize` takes it, with the content of a file in place of its path.

    Raises:
        CropiError: there is no such file.
    """
    if template in ("auto", "none") or "{" in template:
        return template
    path = Path(template)
    if not path.is_file():
        raise CropiError(
            f"chat_template must be auto, none, a Jinja template or the path of one; there is no file {template!r}"
        )
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class TokenGroup:
    """A prompt group as token ids; every response ends with the end token unless it was truncated.

    ``masks`` holds a 1 for every token of ``responses`` that is scored, and a 0 for those that are only read (what
    tools and users said in between); None: all are scored. The last token of a response is always scored.
    """

    group: PromptGroup
    prompt: list[int]
    responses: list[list[int]]
    logprobs: list[list[float]] | None
    temperature: float
    masks: list[list[int]] | None = None

    @property
    def id(self) -> str:
        """The prompt's id."""
        return self.group.id

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
            message, if the tokenizer has a template and the string does not already contain one of its
            special tokens), "none" (strings as they are), or a Jinja template, as text or as the path of a
            file.
        eos: append the end token to responses that are given as text and are not marked as truncated.
        max_length: limit on prompt + response in tokens; None: the context.
        too_long: what to do above the limit: "error", "skip" (leave the prompt out, with the reason),
            "truncate-right" (drop the last tokens of the response) or "truncate-left" (drop the first of the
            prompt).
        temperature: of the rollouts, for all records; None takes each record's own, and 1 where it has none.
    """

    tokenizer: Any
    vocabulary: int
    context: int | None = None
    chat_template: str = "auto"
    eos: bool = True
    max_length: int | None = None
    too_long: str = "error"
    temperature: float | None = None

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
        if self.eos and self.tokenizer.eos_token_id is None:
            raise CropiError(
                "the tokenizer has no end token to append; set its eos_token, or pass --no-eos (eos=False)"
            )
        object.__setattr__(self, "chat_template", template_text(self.chat_template))

    def __call__(self, group: PromptGroup) -> TokenGroup:
        """Tokenise one group.

        Raises:
            RecordError: a token id beyond the vocabulary, a prompt that leaves no room in the context, a
                response that does not fit (unless it is truncated), or messages that no template renders.
            TooLong: the same lengths, under ``too_long="skip"``.
        """
        where = f"{group.where} (prompt {group.id!r})"
        prompt = list(group.prompt_ids) if group.prompt_ids is not None else self._prompt(group, where)
        if group.response_ids is not None:
            responses = [list(ids) for ids in group.response_ids]
        else:
            responses = [self._response(group, k) for k in range(group.size)]
        self._check_vocabulary(where, "prompt", prompt)
        for k, ids in enumerate(responses):
            self._check_vocabulary(where, f"responses[{k}]", ids)
            if not ids:
                raise RecordError(where, f"responses[{k}] has no token")
        logprobs, masks = group.logprobs, group.loss_mask
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

    def _prompt(self, group: PromptGroup, where: str) -> list[int]:
        prompt, template = group.prompt, self.chat_template
        if isinstance(prompt, str):
            plain = template == "none"
            if template == "auto":
                plain = not self.tokenizer.chat_template or any(
                    token in prompt for token in self.tokenizer.all_special_tokens
                )
            if plain:
                # A string that was rendered by a template carries its own start token.
                rendered = any(token in prompt for token in self.tokenizer.all_special_tokens)
                return list(self.tokenizer(prompt, add_special_tokens=not rendered)["input_ids"])
            prompt = [{"role": "user", "content": prompt}]
        if template == "none" or (template == "auto" and not self.tokenizer.chat_template):
            raise RecordError(
                where,
                "the prompt is a list of messages, but there is no chat template",
                "pass --chat-template FILE, or store the prompt as text or prompt_ids",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=True,
                chat_template=None if template == "auto" else template,
            )  # fmt: skip
        except Exception as error:  # a template may raise anything, jinja2's own errors included
            raise RecordError(where, f"the chat template does not render this prompt: {error}") from error
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _response(self, group: PromptGroup, k: int) -> list[int]:
        assert group.responses is not None
        ids = list(self.tokenizer(group.responses[k], add_special_tokens=False)["input_ids"])
        end, cut = self.tokenizer.eos_token_id, group.truncated is not None and group.truncated[k]
        return [*ids, end] if self.eos and not cut and ids[-1:] != [end] else ids

    def _check_vocabulary(self, where: str, name: str, ids: list[int]) -> None:
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
