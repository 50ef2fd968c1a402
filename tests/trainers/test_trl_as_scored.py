"""A stage that TRL trains in this process sees the tokens that its prompts were scored by."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from support.made_data import CHAT, make_tokenizer

from cropi.data.prompt_ids import PromptIds
from cropi.data.readers import read
from cropi.gradient.tokenize import Tokenize
from cropi.trainers.trl.as_scored import OtherPrompts, prompts_as_scored, unlike_dataset


def made(tokenizer: Any, prompt: Any, template: str = "auto", **record: Any) -> tuple[Any, list[int]]:
    """The prompt for TRL, and the tokens that it was scored by."""
    rest = {"id": "a", "responses": ["1", "2"], "rewards": [1.0, 0.0]}
    groups = list(read([rest | record | ({} if prompt is None else {"prompt": prompt})]))
    tokens = Tokenize(tokenizer, len(tokenizer), None, chat_template=template, eos=True)
    (given,) = prompts_as_scored(groups, tokenizer, tokens.prompt)
    return given, tokens.prompt(groups[0])


@pytest.mark.parametrize("start", [False, True])
def test_text_is_given_as_the_template_renders_it(start: bool) -> None:
    tokenizer = make_tokenizer(chat=True)
    if start:  # as Llama's, which puts its token in front of every text, and whose template writes it, too
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        single = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = single
        tokenizer.chat_template = "{{ bos_token }}" + CHAT
    with warnings.catch_warnings():
        warnings.simplefilter("error", OtherPrompts)
        given, ids = made(tokenizer, "1+1=")
        assert given == "<user>1+1=\n>" and tokenizer(given)["input_ids"] == ids
        assert tokenizer("1+1=")["input_ids"] != ids
        messages = [{"role": "user", "content": "1+1="}]
        assert made(tokenizer, messages)[0] == messages
        assert made(tokenizer, None, prompt_ids=ids)[0] == given
        assert made(tokenizer, "<user>7=\n>", rendered=True)[0] == "<user>7=\n>"
        tokenizer.chat_template = None
        assert made(tokenizer, "1+1=")[0] == "1+1="


@pytest.mark.parametrize(("prompt", "told"), [("1+1=", True), ([{"role": "user", "content": "1+1="}], False)])
def test_a_dataset_of_other_prompts_than_the_files_is_told(prompt: Any, told: bool) -> None:
    """TRL reads text as it is; in files it is a user's message where there is a template."""
    tokenizer = make_tokenizer(chat=True)
    groups = read([{"id": "a", "prompt": "1+1=", "responses": ["1", "2"], "rewards": [1.0, 0.0]}])
    dataset = [{"id": "b", "prompt": "-"}, {"id": "a", "prompt": prompt}]
    trainer = SimpleNamespace(train_dataset=dataset, _tokenizer=tokenizer, chat_template=None, tools=[])
    tokens = Tokenize(tokenizer, len(tokenizer), None, eos=True)
    words = unlike_dataset(groups, trainer, PromptIds(dataset, "id"), tokens.prompt)
    assert (
        words.startswith("1 of the first 1 prompts of the train files, for example 'a'")
        if told
        else not words
    )


def test_what_trl_reads_otherwise_is_warned_of() -> None:
    tokenizer, messages = make_tokenizer(chat=True), [{"role": "user", "content": "1+1="}]
    with pytest.warns(
        OtherPrompts, match="1 of 1 selected prompts, for example 'a', are other tokens to TRL"
    ):
        assert made(tokenizer, messages, template="{{ messages[0]['content'] }}")[0] == messages
