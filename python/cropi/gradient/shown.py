"""A prompt group as a person can check it: the text that its tokens stand for, and which of them are scored."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from cropi.gradient.tokenize import TokenGroup


def token_lines(group: TokenGroup, tokenizer: Any) -> Iterator[str]:
    """Lines that show a group: its prompt, and every response in pieces of scored tokens and of tokens only read.

    Text is shown as Python writes strings, so that line ends and odd characters can be seen; without a tokenizer the
    token ids are shown.
    """
    record, scored = group.group, group.scored
    exact = "stored token ids" if record.response_ids is not None else "tokenised from text"
    yield f"prompt {group.id} ({record.where}): {len(group.prompt)} tokens, {scored} tokens scored ({exact})"
    yield f"  prompt    {_text(group.prompt, tokenizer)}"
    for k, (ids, reward) in enumerate(zip(group.responses, record.rewards, strict=True)):
        yield f"  response {k}" + ("" if record.demonstrations else f", reward {reward:g}")
        mask = group.masks[k] if group.masks is not None else [1] * len(ids)
        for kept, part in groupby(zip(mask, ids, strict=True), key=lambda pair: bool(pair[0])):
            yield f"    {'scored ' if kept else 'read   '} {_text([token for _, token in part], tokenizer)}"


def _text(ids: list[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return str(ids)
    return repr(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
