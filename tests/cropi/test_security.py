"""Data runs no code: values in commands, models with code of their own, control characters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines

import cropi
from cropi.cli import main
from cropi.commands import fill, run_command
from cropi.errors import CropiError, printable, printable_lines
from cropi.model.load import load_model
from cropi.model.policy import Policy

# Each makes a file where a shell reads it as more than a value.
EVIL = (
    "a; touch was_run", "a$(touch was_run)", "a`touch was_run`", "a' ; touch was_run ; '", 'a" ; touch was_run ; "',
    "a\ntouch was_run", "a|touch was_run", "a && touch was_run", "${x:-$(touch was_run)}", "a\\", "a b", "*", "~",
)  # fmt: skip


@pytest.mark.parametrize("value", EVIL, ids=range(len(EVIL)))
def test_values_outside_of_quotes_reach_a_command_as_they_are(value: str, tmp_path: Path) -> None:
    for template, expected in (
        ("printf %s {model}", value), ("printf %s x{model}y", f"x{value}y"),
        ("printf %s 'it'\\''s'{model}", f"it's{value}"), ('printf %s "$(printf %s a)"{model}', f"a{value}"),
        ("printf %s \\'{model}", f"'{value}"),
    ):  # fmt: skip
        done = subprocess.run(
            fill(template, {"model": value}), shell=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout == expected and not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("value", EVIL, ids=range(len(EVIL)))
@pytest.mark.parametrize(
    "template",
    [
        "sh -c 'echo {model}'",
        'sh -c "echo {model}"',
        'echo "$(echo {model})"',
        'echo "it\'s {model}"',
        "echo '{model}'",
    ],
)
def test_values_inside_quotes_cannot_leave_them(value: str, template: str) -> None:
    with pytest.raises(CropiError) as caught:
        fill(template, {"model": value}, option="trainer")
    assert "trainer: {model} stands inside quotes" in str(caught.value) and "$CROPI_MODEL" in str(
        caught.value
    )


def test_plain_values_may_stand_inside_quotes() -> None:
    values = {"out": "/runs/é-1_a+b@c,d=e:f%.x", "stage": 3}
    assert fill('x "{out}/hf" \'{stage}\' {{out}} ${out} "\\"{stage}\\""', values) == (
        f'x "{values["out"]}/hf" \'3\' {{out}} ${{out}} "\\"3\\""'
    )


def test_commands_find_the_values_in_their_environment(tmp_path: Path) -> None:
    value = 'a b; touch was_run; "$(touch was_run)"'
    command = f"cd {tmp_path} && sh -c 'printf %s \"$CROPI_MODEL\" > seen'"
    run_command("trainer", command, tmp_path / "log", values={"model": value, "stage": 3})
    assert (tmp_path / "seen").read_text() == value and not (tmp_path / "was_run").exists()


# ------------------------------------------------------------------------------------------------------ models
CODE = """
from pathlib import Path
Path({path!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_kind"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def coded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder with code of its own, which makes the file ``was_run`` beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "coded"
    save_policy(folder)
    (folder / "own.py").write_text(CODE.format(path=str(tmp_path / "was_run")))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own_kind", "architectures": ["OwnForCausalLM"],
               "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_models_own_code_is_not_run(coded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = coded.parent / "was_run"
    words = "brings code of its own, which is not run; if you trust it, pass --trust-remote-code"
    with pytest.raises(ValueError, match=words):
        load_model(str(coded))
    with pytest.raises(ValueError, match=words):
        Policy(str(coded)).model  # noqa: B018
    train = write_lines(coded.parent / "train.jsonl", make_records(6))
    sketch = ["sketch", "--model", str(coded), "--trajectories", str(train), "--out", str(coded.parent / "store"),
              "--dim", "512", "--no-progress"]  # fmt: skip
    assert main(sketch) == 2
    assert words in capsys.readouterr().err and not target.exists()
    assert main([*sketch, "--trust-remote-code"]) == 0
    assert target.exists()


# -------------------------------------------------------------------------------------------------- terminals
def test_control_characters_are_escaped_and_letters_are_not() -> None:
    assert printable("a\x1b[31mb\x9bc\r\n\t\u202ed\u2066\u2028\x00") == (
        "a\\x1b[31mb\\x9bc\\r\\n\\t\\u202ed\\u2066\\u2028\\x00"
    )
    for text in ("é ≤ 中文 \u00a0 \U0001f469\u200d\U0001f52c", "x" * 100):
        assert printable(text) == text
    assert printable_lines("a\x07\nb") == "a\\x07\nb"


@pytest.mark.long
def test_names_from_files_cannot_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\u202e\x9b2J"
    save_policy(tmp_path / "model")
    records = [
        record | {"id": f"{record['id']}{evil}\nrank 1", "task": f"t{evil}\nx", "set": f"s{evil}"}
        for record in make_records(20)
    ]
    train = write_lines(tmp_path / "train.jsonl", records)
    valid = write_lines(tmp_path / f"valid{evil[:6]}.jsonl", make_records(8, seed=1, sets=[f"x{evil}"]))
    words = ["run", "--model", tmp_path / "model", "--train", train, "--valid", valid, "--out", tmp_path / "out",
             "--dim", 512, "--no-progress"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    bad = write_lines(tmp_path / "bad.jsonl", [records[0] | {"rewards": [evil]}])
    for path in (train, tmp_path / "out" / "sketches" / "train", tmp_path / "out" / "scores.parquet", bad):
        main(["info", str(path)])
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not set(text) & set("\x1b\x07\u202e\x9b"), "a control character went through"
    assert "\\x1b]0;owned\\x07\\u202e\\x9b2J\\nrank 1" in shown.out


@pytest.mark.parametrize("name", ["..", "a/../../b", "/b"])
def test_a_sets_name_cannot_leave_the_folder(name: str, tmp_path: Path) -> None:
    policy = Policy.of(make_model(), make_tokenizer())
    with pytest.raises(CropiError, match="would lie outside of out="):
        cropi.score(policy, make_records(2), {name: make_records(2, seed=1)}, dim=1024, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "b").exists()
