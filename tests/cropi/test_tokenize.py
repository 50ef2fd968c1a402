"""Text to tokens: template, end token, vocabulary and length, each by its explicit rule."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from support.made_data import make_tokenizer

from cropi.data.records import PromptGroup
from cropi.errors import CropiError, RecordError
from cropi.gradient.tokenize import BehindEnd, Tokenize, TooLong

VOCABULARY = 98
EOS = 1


def group(**changes: Any) -> PromptGroup:
    values: dict[str, Any] = {
        "id": "a",
        "prompt": "ab",
        "responses": ["x", "yz"],
        "rewards": [1.0, 0.0],
        "where": "f:1",
    }
    return PromptGroup(**(values | changes))


def ids(text: str) -> list[int]:
    return list(make_tokenizer()(text)["input_ids"])


def test_template_is_applied_by_rule(tmp_path: Path) -> None:
    chat, plain = make_tokenizer(chat=True), make_tokenizer()
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "ab"}]
    assert Tokenize(chat, VOCABULARY)(group()).prompt == ids("<user>ab\n>")
    assert Tokenize(chat, VOCABULARY)(group(prompt=messages)).prompt == ids("<system>s\n<user>ab\n>")
    assert Tokenize(plain, VOCABULARY)(group()).prompt == ids("ab")
    assert Tokenize(chat, VOCABULARY, chat_template="none")(group()).prompt == ids("ab")
    (tmp_path / "own.jinja").write_text("{{ messages[-1]['content'] }}!")
    assert Tokenize(chat, VOCABULARY, chat_template=str(tmp_path / "own.jinja"))(group()).prompt == ids("ab!")
    assert Tokenize(plain, VOCABULARY, chat_template="{{ messages[0]['role'] }}")(group()).prompt == ids(
        "user"
    )
    rendered = Tokenize(chat, VOCABULARY, chat_template="none")(group(prompt="ab<eos>")).prompt
    assert rendered == [*ids("ab"), EOS], "without a template a string's special tokens are tokens"


def test_no_template_is_applied_to_what_the_policy_read() -> None:
    chat, read = make_tokenizer(chat=True), {"rendered": True}
    assert Tokenize(chat, VOCABULARY)(group(extra=read)).prompt == ids("ab")
    assert Tokenize(chat, VOCABULARY)(group(extra={"rendered": False})).prompt == ids("<user>ab\n>")
    assert Tokenize(chat, VOCABULARY, chat_template=chat.chat_template)(group(extra=read)).prompt == ids(
        "<user>ab\n>"
    )
    messages = [{"role": "user", "content": "ab"}]
    assert Tokenize(chat, VOCABULARY)(group(prompt=messages, extra=read)).prompt == ids("<user>ab\n>")


def test_messages_without_a_template_are_an_error() -> None:
    messages = [{"role": "user", "content": "ab"}]
    for tokenizer, template in ((make_tokenizer(), "auto"), (make_tokenizer(chat=True), "none")):
        with pytest.raises(RecordError, match="f:1 .prompt 'a'.: the prompt is a list of messages"):
            Tokenize(tokenizer, VOCABULARY, chat_template=template)(group(prompt=messages))
    with pytest.raises(CropiError, match="there is no file 'missing.jinja'$"):
        Tokenize(make_tokenizer(), VOCABULARY, chat_template="missing.jinja")
    with pytest.raises(RecordError, match="does not render"):
        Tokenize(make_tokenizer(), VOCABULARY, chat_template="{{ raise_exception('no') }}")(
            group(prompt=messages)
        )


def test_end_token_is_appended_unless_truncated_or_there() -> None:
    tokens = Tokenize(make_tokenizer(), VOCABULARY)
    assert tokens(group()).responses == [[*ids("x"), EOS], [*ids("yz"), EOS]]
    assert tokens(group(truncated=[False, True])).responses == [[*ids("x"), EOS], ids("yz")]
    assert tokens(group(responses=["x<eos>", "yz"])).responses[0] == [*ids("x"), EOS]
    assert Tokenize(make_tokenizer(), VOCABULARY, eos=False)(group()).responses == [ids("x"), ids("yz")]


@pytest.mark.parametrize(
    "response", ["x<eos>\n", "x<eos>user: y<eos>", [{"role": "assistant", "content": "x<eos>y"}]]
)
@pytest.mark.parametrize("eos", [True, False])
def test_text_behind_an_end_token_is_not_the_policys(response: Any, eos: bool) -> None:
    """As SkyRL and AReaL write rollouts of several turns: a sampler stops at the end token."""
    tokens = Tokenize(make_tokenizer(), VOCABULARY, eos=eos)
    assert tokens(group(responses=["x<eos>", "<eos>"])).responses == [[*ids("x"), EOS], [EOS]]
    with pytest.raises(RecordError, match=r"f:1 .*, responses\[1\]: goes on behind the end token '<eos>'"):
        tokens(group(responses=["x", response]))


def test_token_ids_behind_an_end_token_want_a_mask() -> None:
    held = group(response_ids=[[7, EOS], [7, EOS, 8, EOS]])
    tokens = Tokenize(make_tokenizer(), VOCABULARY)
    with pytest.warns(
        BehindEnd, match=r"responses\[1\]: there are tokens behind an end token, and no 'loss_mask'"
    ):
        assert tokens(held).responses == held.response_ids
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(held)  # said once
        masked = group(response_ids=held.response_ids, loss_mask=[[1, 1], [1, 1, 0, 1]])
        assert Tokenize(make_tokenizer(), VOCABULARY)(masked).masks == [[1, 1], [1, 1, 0, 1]]


def test_stored_ids_win_over_text() -> None:
    got = Tokenize(make_tokenizer(chat=True), VOCABULARY)(
        group(prompt_ids=[9, 8], response_ids=[[7], [6, 5]], logprobs=[[-1.0], [-2.0, -3.0]], temperature=0.5)
    )
    assert (got.prompt, got.responses, got.logprobs) == ([9, 8], [[7], [6, 5]], [[-1.0], [-2.0, -3.0]])
    assert got.temperature == 0.5 and got.scored == 3
    assert Tokenize(make_tokenizer(), VOCABULARY, temperature=0.7)(group(temperature=0.5)).temperature == 0.7
    assert Tokenize(make_tokenizer(), VOCABULARY)(group()).temperature == 1.0


@pytest.mark.parametrize("change", [{"prompt_ids": [5, 98]}, {"response_ids": [[5], [5, 98]]}])
def test_token_beyond_the_vocabulary_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="prompt 'a'.*token id 98 at position 1 .*vocabulary of 98"):
        Tokenize(make_tokenizer(), VOCABULARY)(group(**change))
    assert Tokenize(make_tokenizer(), VOCABULARY + 1)(group(**change))


def test_lengths_above_the_limit() -> None:
    record = group(
        prompt_ids=[1, 2, 3, 4], response_ids=[[5], [6, 7, 8]], logprobs=[[-1.0], [-1.0, -2.0, -3.0]]
    )

    def fit(too_long: str, length: int) -> Any:
        return Tokenize(make_tokenizer(), VOCABULARY, context=100, max_length=length, too_long=too_long)(
            record
        )

    assert fit("error", 7).responses == [[5], [6, 7, 8]]
    with pytest.raises(
        RecordError, match="prompt has 4 tokens and its longest response 3, together more than max_length 6"
    ):
        fit("error", 6)
    with pytest.raises(TooLong):
        fit("skip", 6)
    cut = fit("truncate-right", 6)
    assert (cut.prompt, cut.responses, cut.logprobs) == ([1, 2, 3, 4], [[5], [6, 7]], [[-1.0], [-1.0, -2.0]])
    left = fit("truncate-left", 6)
    assert (left.prompt, left.responses) == ([2, 3, 4], [[5], [6, 7, 8]])
    for policy, length, remedies in (
        ("truncate-right", 4, "pass a higher --max-length or --too-long skip or truncate-left$"),
        ("truncate-left", 3, "pass a higher --max-length or --too-long skip$"),
        ("error", 5, "pass a higher --max-length or --too-long skip or truncate-right or truncate-left$"),
    ):
        with pytest.raises(RecordError, match=remedies):
            fit(policy, length)
    with pytest.raises(RecordError, match="the model's context of 6"):
        Tokenize(make_tokenizer(), VOCABULARY, context=6)(record)


def test_options_are_checked_at_once() -> None:
    for options, message in (
        ({"too_long": "crop"}, "too_long must be one of"),
        ({"max_length": 9, "context": 8}, "max_length is 9, but the model's context is 8"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0"),
    ):
        with pytest.raises(CropiError, match=message):
            Tokenize(make_tokenizer(), VOCABULARY, **options)  # type: ignore[arg-type]
