"""Chat templates: how a prompt begins and ends, which token ends a response, what is read from messages."""

from __future__ import annotations

import datetime
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.made_data import make_model, make_records, make_tokenizer, write_lines
from support.stores import sketches_of
from tokenizers.processors import TemplateProcessing

from cropi.data.records import parse_record
from cropi.errors import CropiError, RecordError
from cropi.gradient.template import ChatTemplate
from cropi.gradient.tokenize import NotInTemplate, QuotedToken, Tokenize
from cropi.model.policy import Policy
from cropi.sketching import job as jobs
from cropi.sketching.job import DatedTemplate, SketchJob
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

# Templates in the ways that families write them: the turn is closed by a special token, which may not be the end token.
TURNS = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] | trim }}</turn>\n{% endfor %}"
    "{% if tools %}TOOLS {{ tools | length }}{% endif %}"
    "{% if enable_thinking is defined and not enable_thinking %}NOTHINK{% endif %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<turn>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "</turn>{% endgeneration %}{% else %}{{ m['content'] }}</turn>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y') }}. " + TURNS
USER = [{"role": "user", "content": "2+2?"}]


def tokenizer_of(template: str | None = TURNS) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"], "bos_token": "<bos>"})
    tokenizer.chat_template = template
    return tokenizer


def tokens_of(tokenizer: Any, tokenize: dict[str, Any] | None = None, **changes: Any) -> Any:
    record = {"id": "x", "prompt": USER, "responses": ["4"], "rewards": [1]} | changes
    return Tokenize(tokenizer, len(tokenizer), 4096, **tokenize or {})(
        parse_record(json.dumps(record), "f:1")
    )


def shown(tokenizer: Any, **changes: Any) -> tuple[str, list[str]]:
    found = tokens_of(tokenizer, **changes)
    return tokenizer.decode(found.prompt), [tokenizer.decode(ids) for ids in found.responses]


# ----------------------------------------------------------------------------------------------------- end tokens
def test_a_response_ends_as_the_template_closes_a_turn() -> None:
    tokenizer = tokenizer_of()
    assert shown(tokenizer)[1] == ["4</turn>"]
    assert shown(tokenizer, responses=["4</turn>"])[1] == ["4</turn>"]
    assert shown(tokenizer, responses=["4<eos>"])[1] == ["4<eos>"], (
        "the tokenizer's own end token ends it too"
    )
    assert shown(tokenizer, truncated=[True])[1] == ["4"]
    assert shown(tokenizer, prompt="2+2?")[1] == ["4</turn>"]
    assert shown(tokenizer_of(None), prompt="2+2=")[1] == ["4<eos>"], "without a template there are no turns"
    plain = tokens_of(tokenizer, {"chat_template": "none"}, prompt="2+2=")
    assert tokenizer.decode(plain.responses[0]) == "4<eos>"
    assert tokenizer.decode(tokens_of(tokenizer, {"eos": False}).responses[0]) == "4"


def test_every_token_at_which_the_model_stops_ends_a_response() -> None:
    tokenizer = tokenizer_of(None)
    stop = tokenizer.convert_tokens_to_ids("</turn>")
    found = tokens_of(
        tokenizer, {"ends": (stop,)}, prompt="2+2=", responses=["4</turn>", "5"], rewards=[1, 0]
    )
    assert [tokenizer.decode(ids) for ids in found.responses] == ["4</turn>", "5<eos>"]
    model = make_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [1, stop]
    job = SketchJob(["t.jsonl"], None)
    made = jobs.make_tokenize(Policy(model, tokenizer), job)
    assert made.all_ends == {1, stop}


def test_a_tokenizer_without_an_end_token_takes_the_templates() -> None:
    tokenizer = tokenizer_of()
    tokenizer.eos_token = None
    assert shown(tokenizer)[1] == ["4</turn>"]
    tokenizer.chat_template = None
    with pytest.raises(CropiError, match="no end token to append"):
        tokens_of(tokenizer, prompt="2+2=")


@pytest.mark.parametrize("single", ["<bos> $A <eos>", "$A <eos>", "<bos> $A", "$A"])
def test_a_tokenizer_that_closes_every_text_puts_nothing_between_prompt_and_response(single: str) -> None:
    tokenizer = tokenizer_of(None)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", 1)]
    )
    begins = "<bos>" if single.startswith("<bos>") else ""
    assert shown(tokenizer, prompt="2+2=") == (f"{begins}2+2=", ["4<eos>"])


@pytest.mark.long
def test_the_end_token_is_a_part_of_what_a_store_depends_on(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    model = make_model(vocab_size=len(tokenizer))
    path = write_lines(tmp_path / "t.jsonl", make_records(3))

    def manifest(template: str | None, **options: Any) -> Any:
        tokenizer.chat_template = template
        job = SketchJob([path], None, spec=SketchSpec(dim=512), **options)
        return sketch(Policy(model, tokenizer), job, progress=False).store.manifest["tokens"]

    with pytest.warns(UserWarning):
        assert manifest(TURNS)["end"] == tokenizer.convert_tokens_to_ids("</turn>")
        assert "end" not in manifest(TURNS, eos=False) and "end" not in manifest(None)
        off = {"enable_thinking": False}
        made = manifest(TURNS, chat_template_kwargs=off, tools=[{"name": "w"}])
        assert (made["chat_template_kwargs"], made["tools"]) == (off, [{"name": "w"}])
        # Text that ends with any token of these gets no other.
        assert "ends" not in made
        model.generation_config.eos_token_id = [1, 0]
        assert manifest(None)["ends"] == manifest(None, eos=False)["ends"] == [0]


# ----------------------------------------------------------------------------------------------------- prompts
@pytest.mark.long
def test_prompts_are_rendered_as_trl_renders_them() -> None:
    trl = pytest.importorskip("trl")
    tokenizer = tokenizer_of()
    tools = [
        {"type": "function", "function": {"name": "w", "description": "d", "parameters": {"type": "object"}}}
    ]
    for messages, more in (
        (USER, {}), (USER, {"tools": tools}), (USER, {"chat_template_kwargs": {"enable_thinking": False}}),
        ([*USER, {"role": "assistant", "content": "The sum is "}], {}),
        ([{"role": "system", "content": "s"}, *USER, {"role": "assistant", "content": "5"}, *USER], {"tools": tools}),
    ):  # fmt: skip
        kwargs = more.get("chat_template_kwargs", {})
        wanted = trl.apply_chat_template({"prompt": messages}, tokenizer, tools=more.get("tools"), **kwargs)
        assert shown(tokenizer, prompt=messages, **more)[0] == wanted["prompt"], messages


def test_what_a_template_gets_for_records_that_have_none_of_their_own() -> None:
    tokenizer, values = (
        tokenizer_of(),
        {"tools": [{"name": "w"}], "chat_template_kwargs": {"enable_thinking": False}},
    )
    assert "TOOLS 1NOTHINK" in tokenizer.decode(tokens_of(tokenizer, values).prompt)
    own = tokens_of(tokenizer, values, tools=[], chat_template_kwargs={"enable_thinking": True})
    assert own.prompt == tokens_of(tokenizer).prompt
    # Text that was rendered before is as it is.
    assert (
        tokenizer.decode(tokens_of(tokenizer, values, prompt="<turn>user\n", rendered=True).prompt)
        == "<turn>user\n"
    )
    answered = {"prompt": USER, "responses": [[{"role": "assistant", "content": "4"}, USER[0]]]}
    marked = tokenizer_of(MARKED.replace("<turn>assistant", "{{ tools | length }}<turn>assistant"))
    with pytest.raises(RecordError, match="renders the prompt in another way"):
        tokens_of(marked, {"tools": [{"name": "w"}]}, **answered)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tools": [{"name": "w"}]}, "tools"),
        ({"chat_template_kwargs": {"enable_thinking": False, "other": 1}}, "enable_thinking, other"),
        ({"tools": [], "chat_template_kwargs": {}}, ""),
    ],
)
def test_what_the_template_does_not_read_is_said_once(changes: dict[str, Any], named: str) -> None:
    plain = "{% for m in messages %}<turn>{{ m['content'] }}</turn>{% endfor %}{# no_tools #}"
    tokenize = Tokenize(tokenizer := tokenizer_of(plain), len(tokenizer), 4096)
    record = {"id": "x", "prompt": USER, "responses": ["4"], "rewards": [1]} | changes
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for line in ("f:1", "f:2"):
            tokenize(parse_record(json.dumps(record), line))
    said = [str(one.message) for one in told if one.category is NotInTemplate]
    assert [
        text.startswith(f"f:1 (prompt 'x'): the chat template does not read {named},") for text in said
    ] == ([True] if named else []), said
    with warnings.catch_warnings():
        warnings.simplefilter("error", NotInTemplate)
        tokens_of(tokenizer_of(TURNS), tools=[{"name": "w"}], chat_template_kwargs={"enable_thinking": False})


def test_text_parts_are_joined_and_other_parts_are_refused() -> None:
    tokenizer = tokenizer_of()
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert (
        tokens_of(tokenizer, prompt=[{"role": "user", "content": parts}]).prompt
        == tokens_of(tokenizer).prompt
    )
    for content, words in (
        ([{"type": "image"}, *parts], "holds a part of the type 'image', which is not text"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}], "holds a part of the type 'image_url'"),
        ([{"type": "text"}], 'must be {"type": "text", "text": ...}'),
        ({"text": "2+2?"}, "must be a string or a list of text parts"),
        (7, "must be a string or a list of text parts, got 7"),
        (None, "needs 'role' and 'content'"),
    ):
        with pytest.raises(RecordError, match="f:1 .prompt 'x'") as caught:
            tokens_of(tokenizer, prompt=[{"role": "user", "content": content}])
        assert words in str(caught.value)


def test_what_only_a_template_can_render_needs_one() -> None:
    for changes in ({"tools": [{"name": "w"}]}, {"chat_template_kwargs": {"enable_thinking": False}}):
        with pytest.raises(RecordError, match=f"has '{next(iter(changes))}', but its prompt is not rendered"):
            tokens_of(tokenizer_of(None), prompt="2+2=", **changes)
    with pytest.raises(
        RecordError, match="holds 'tokenize', which is not a variable of templates.*take it out"
    ):
        tokens_of(tokenizer_of(), chat_template_kwargs={"tokenize": True})
    with pytest.raises(RecordError, match="does not render this prompt.*no more turns"):
        tokens_of(tokenizer_of("{{ raise_exception('no more turns') }}"))


KNOWN = {
    "images": ["x.png"], "videos": ["x"], "multi_modal_data": {}, "advantages": [0.1], "token_rewards": [[1]],
    "rollout_log_probs": [[-1]], "old_log_probs": [[-1]], "system": "s", "documents": [{}], "functions": [{}],
    "chat_template": "{{ messages }}", "attention_mask": [1], "input_ids": [1],
}  # fmt: skip


@pytest.mark.parametrize("key", KNOWN)
def test_a_known_key_that_is_not_supported_is_an_error(key: str) -> None:
    with pytest.raises(RecordError, match=f"the key '{key}' is known, but not supported; .{{10,}}"):
        tokens_of(tokenizer_of(), **{key: KNOWN[key]})


def test_keys_that_only_change_text_do_not_matter_beside_token_ids() -> None:
    record = {"id": 1, "prompt_ids": [5], "response_ids": [[6]], "rewards": [1], "system_prompt": "s"}
    assert parse_record(json.dumps(record), "f:1").extra == {"system_prompt": "s"}


@pytest.mark.parametrize("token", ["<eos>", "<turn>", "</turn>", "<bos>"])
@pytest.mark.parametrize("role", ["user", "system", "string"])
def test_a_quoted_special_token_stays_text(token: str, role: str) -> None:
    tokenizer = tokenizer_of()
    text = f"What does {token} mean?"
    prompt = text if role == "string" else [{"role": role, "content": text}]
    with pytest.warns(QuotedToken, match=f"quotes {token}, which is taken as text"):
        found = tokens_of(tokenizer, prompt=prompt)
    name = "user" if role == "string" else role
    begin, end, turn = (tokenizer.convert_tokens_to_ids(t) for t in ("<turn>", "</turn>", "<turn>"))

    def plain(words: str) -> list[int]:
        return [tokenizer.convert_tokens_to_ids(character) for character in words]

    assert found.prompt == [begin, *plain(f"{name}\n{text}"), end, *plain("\n"), turn, *plain("assistant\n")]


def test_a_pad_token_that_is_a_character_of_the_text_is_text() -> None:
    tokenizer = tokenizer_of()
    tokenizer.pad_token = "!"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shown(tokenizer, prompt="Hello!")[0] == "<turn>user\nHello!</turn>\n<turn>assistant\n"


def test_a_string_that_begins_as_a_rendered_prompt_is_not_rendered_again() -> None:
    tokenizer = tokenizer_of()
    rendered = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    for begin in ("", "<bos>", "\n"):
        assert shown(tokenizer, prompt=begin + rendered)[0] == begin + rendered
    tokenizer.chat_template = "<bos>" + TURNS
    assert ChatTemplate(tokenizer).openings == ("<bos>", "<turn>")
    assert shown(tokenizer, prompt=rendered)[0] == rendered


# ----------------------------------------------------------------------------------------------------- dates
def test_a_template_that_prints_the_date_prints_the_one_that_is_given() -> None:
    tokenizer = tokenizer_of(DATED)
    today = tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert shown(tokenizer)[0] == today, "without a date it is today's"
    made = tokenizer.decode(tokens_of(tokenizer, {"template_date": "2025-02-03"}).prompt)
    assert made.startswith("Today is 03 Feb 2025. <turn>user")
    guarded = '{% if strftime_now is defined %}{% set d = strftime_now("%Y") %}{% endif %}{{ d }}' + TURNS
    assert tokenizer.decode(
        tokens_of(tokenizer, {"template_date": "2031-02-03", "chat_template": guarded}).prompt
    ).startswith("2031<turn>")
    with pytest.raises(CropiError, match="template_date must be a date as YYYY-MM-DD, got 'tomorrow'"):
        tokens_of(tokenizer, {"template_date": "tomorrow"})


@pytest.mark.long
def test_a_store_that_is_continued_on_another_day_keeps_its_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(DATED)
    model = make_model(vocab_size=len(tokenizer), max_position_embeddings=256)
    path = write_lines(tmp_path / "t.jsonl", make_records(8))

    class Day(datetime.date):
        now = datetime.date(2026, 1, 31)

        @classmethod
        def today(cls) -> Any:
            return cls.now

    monkeypatch.setattr(jobs.datetime, "date", Day)

    def run(out: str, **options: Any) -> dict[str, torch.Tensor]:
        job = SketchJob([path], tmp_path / out, spec=SketchSpec(dim=512), **options)
        sketch(Policy(model, tokenizer), job, progress=False)
        store = SketchStore.open(tmp_path / out)
        assert store.manifest["tokens"]["template_date"] == "2026-01-31"
        return sketches_of(store)

    with pytest.warns(DatedTemplate, match="2026-01-31 is taken for all"):
        run("whole")
        run("parts", limit=3)
    Day.now = datetime.date(2026, 2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DatedTemplate)
        parts, whole = run("parts"), run("whole")
        named = run("named", template_date="2026-01-31")
    assert parts.keys() == whole.keys() == named.keys() and len(whole) > 3
    for name in whole:
        assert torch.equal(named[name], whole[name])
        # Batches of other prompts: the sums differ by rounding. Another day differs by far more.
        assert float((parts[name] - whole[name]).norm()) < 1e-5 * float(whole[name].norm())
    job = SketchJob([path], None, spec=SketchSpec(dim=512), template_date="2026-02-01")
    ((rows, table),) = sketch(Policy(model, tokenizer), job, progress=False).store.shards()
    for row, vector in zip(rows, table):
        assert float((vector - whole[row.id]).norm()) > 1e-2 * float(vector.norm())


# ----------------------------------------------------------------------------------------------------- several turns
TALK = [
    {"role": "assistant", "content": "call"}, {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4"},
]  # fmt: skip


def test_the_templates_own_marks_say_what_is_scored() -> None:
    tokenizer = tokenizer_of(MARKED)
    found = tokens_of(tokenizer, responses=[TALK, "4", TALK[:1]], rewards=[1, 0, 0])
    assert tokenizer.decode(found.prompt) == "<turn>user\n2+2?</turn><turn>assistant\n"
    assert (
        tokenizer.decode(found.responses[0])
        == "call</turn><turn>tool\n4</turn><turn>assistant\nIt is 4</turn>"
    )
    assert found.masks is not None
    scored = [token for token, mask in zip(found.responses[0], found.masks[0]) if mask]
    assert tokenizer.decode(scored) == "call</turn>It is 4</turn>" and found.lengths == [5 + 8, 2, 5]
    assert [tokenizer.decode(ids) for ids in found.responses[1:]] == ["4</turn>", "call</turn>"]


@pytest.mark.parametrize("close", ["</turn>", "</turn>\n"])
def test_a_response_of_several_messages_that_was_cut_has_no_end_token(close: str) -> None:
    """The template writes one behind the last turn, which the policy has not ended."""
    tokenizer = tokenizer_of(MARKED.replace("</turn>{% endgeneration %}", f"{close}{{% endgeneration %}}"))
    given = {"responses": [TALK, TALK, TALK[:2]], "rewards": [1, 0, 0]}
    found = tokens_of(tokenizer, truncated=[True, False, True], **given)
    assert found.masks is not None
    scored = [
        tokenizer.decode([token for token, mask in zip(ids, marks) if mask])
        for ids, marks in zip(found.responses, found.masks)
    ]
    assert scored == [f"call{close}It is 4", f"call{close}It is 4{close}", f"call{close}"]
    assert tokenizer.decode(found.responses[0]).endswith("It is 4"), "nor is it read"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "tool_calls", "content"])
def test_what_the_policy_said_is_not_left_out_by_the_template(key: str) -> None:
    """Sampled tokens that are not rendered would be missing from the gradient."""
    says = MARKED.replace(
        "{{ m['content'] }}</turn>{% end", "{{ m['reasoning'] | trim }}{{ m['content'] }}</turn>{% end"
    )
    calls = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    turn = {"role": "assistant", "content": "4", key: calls if key == "tool_calls" else " 2 and\n2 "}
    silent = MARKED.replace("{{ m['content'] }}</turn>{% end", "4</turn>{% end")
    template = silent if key == "content" else MARKED
    with pytest.raises(
        RecordError, match=rf"leaves out what the policy said: '{key}' of its message 1, '.*--chat-temp"
    ):
        tokens_of(tokenizer_of(template), responses=[[{"role": "assistant", "content": "4"}, turn]])
    if key == "reasoning":
        tokenizer = tokenizer_of(says)
        assert tokenizer.decode(tokens_of(tokenizer, responses=[[turn]]).responses[0]) == "2 and\n24</turn>"


def test_several_turns_without_marks_are_an_error_with_the_remedy() -> None:
    with pytest.raises(
        RecordError, match=r"does not mark what the assistant said; pass a --chat-template with"
    ):
        tokens_of(tokenizer_of(), responses=[TALK])
    other = MARKED.replace("{% for", "{{ messages | length }}{% for", 1)
    with pytest.raises(RecordError, match="renders the prompt in another way when an answer follows"):
        tokens_of(tokenizer_of(other), responses=[TALK])
    with pytest.raises(RecordError, match="a response of several messages needs a chat template"):
        tokens_of(tokenizer_of(None), prompt="2+2=", responses=[TALK])
    ids = {"prompt": None, "prompt_ids": [5, 6]}
    with pytest.raises(RecordError, match="the prompt is given as token ids, and the response as messages"):
        tokens_of(tokenizer_of(MARKED), responses=[TALK], **ids)


def test_several_turns_behind_a_text_that_was_rendered_or_quotes_a_special_token() -> None:
    """A text without special tokens that says that it was rendered would be rendered again, without a word."""
    plain = MARKED.replace("<turn>", "").replace("</turn>", "")
    for template, prompt in ((plain, "user: 2+2=\n"), (MARKED, "<turn>user\n2+2=</turn><turn>assistant\n")):
        with pytest.raises(
            RecordError, match="a text that a chat template rendered.* give the prompt as messages"
        ):
            tokens_of(tokenizer_of(template), prompt=prompt, rendered=True, responses=[TALK])
    quoting = [{"role": "user", "content": "say <turn>"}]
    with pytest.raises(RecordError, match="the prompt quotes <turn>, and the response has several messages"):
        tokens_of(tokenizer_of(MARKED), prompt=quoting, responses=[TALK])
