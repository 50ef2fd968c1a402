"""What every command does alike: JSON, quiet and verbose, a dry run, a config that repeats a run, completion, help."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.made_data import make_records, make_tokenizer, save_policy, write_lines

import cropi
import cropi_kernels
from cropi.cli import COMMANDS, main, make_parser
from cropi.cli.manners import speaking
from cropi.errors import warn
from cropi.ranking.selection_files import read_selection


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    save_policy(folder / "model")
    write_lines(folder / "train.jsonl", make_records(20))
    write_lines(folder / "valid.jsonl", make_records(8, seed=1))
    return folder


def job(work: Path, out: str = "run") -> list[str]:
    return ["run", "--model", str(work / "model"), "--train", str(work / "train.jsonl"), "--valid",
            str(work / "valid.jsonl"), "--out", str(work / out), "--dim", "512", "--no-report"]  # fmt: skip


@pytest.fixture(scope="module")
def run(work: Path) -> Path:
    assert (
        main([*job(work), "-q", "--width", "full", "--exclude", "*norm*", "--no-eos", "--fraction", "0.25"])
        == 0
    )
    return work / "run"


# --------------------------------------------------------------------------------------------------------- help
def parsers() -> list[tuple[str, argparse.ArgumentParser]]:
    found = []
    for action in make_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, parser in action.choices.items():
                found.append((name, parser))
                for inner in parser._actions:
                    if isinstance(inner, argparse._SubParsersAction):
                        found += [(f"{name} {key}", value) for key, value in inner.choices.items()]
    return found


def test_help_says_every_default_and_every_command_has_the_manners() -> None:
    names = [name for name, _ in parsers()]
    assert set(COMMANDS) <= set(names)
    lacking = []
    for name, parser in parsers():
        flags = {flag for action in parser._actions for flag in action.option_strings}
        if not any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
            assert {"--json", "-q", "--quiet", "-v", "--verbose", "--debug", "--help"} <= flags, name
        for action in parser._actions:
            assert action.help or isinstance(action, argparse._SubParsersAction), (name, action.dest)
            takes_a_value = action.option_strings and action.nargs != 0 and not action.required
            if takes_a_value and "default" not in str(action.help) and action.default not in (None, []):
                lacking.append(f"{name} {action.option_strings[0]} ({action.default!r})")
        text = parser.format_help()
        usage = text.partition("\n\n")[0]
        assert "%(" not in text and "None)" not in text and usage.count("\n") < 4, name
        needed = [action for action in parser._actions if action.required and action.option_strings]
        assert all(action.option_strings[0] in usage for action in needed), name
    assert not lacking, lacking


def test_the_example_of_every_command_can_be_given_to_it() -> None:
    for name, parser in parsers():
        example = str(parser.epilog).removeprefix("example:\n  ")
        words = shlex.split(example)
        assert words[0] == "cropi" and " ".join(words[1:]).startswith(name), example
        make_parser().parse_args(words[1:])  # a wrong word ends the process
        titles = [group.title for group in parser._action_groups]
        assert len(set(titles)) == len(titles), f"{name} has two groups of options of one title"


def test_completion_in_python_shows_public_names_only() -> None:
    for module, more in ((cropi, {"options"}), (cropi_kernels, set())):
        shown = {name for name in dir(module) if not name.startswith("__")}
        assert shown == {*module.__all__, *more} - {"__version__"}


# --------------------------------------------------------------------------------------------------------- JSON
def printed(capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    told = capsys.readouterr()
    return json.loads(told.out), told.err


@pytest.mark.long
def test_json_is_all_that_standard_output_gets(
    work: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stores = run / "sketches"
    commands: dict[str, list[str]] = {
        "sketch": ["sketch", "--model", str(work / "model"), "--trajectories", str(work / "valid.jsonl"), "--out",
                   str(tmp_path / "store"), "--dim", "512"],
        "influence": ["influence", "--train", str(stores / "train"), "--valid", str(stores / "valid"), "--out",
                      str(tmp_path / "scores.parquet")],
        "select": ["select", "--scores", str(run / "scores.parquet"), "--out", str(tmp_path / "s.jsonl")],
        "convert": ["convert", str(work / "train.jsonl"), "--out", str(tmp_path / "t.jsonl")],
        "report": ["report", str(run), "--out", str(tmp_path / "r.html")],
        "info": ["info", str(run)],
        "store verify": ["store", "verify", str(stores / "train")],
    }  # fmt: skip
    found = {}
    for name, words in commands.items():
        assert main([*words, "--json"]) == 0, name
        found[name], _ = printed(capsys)
        assert found[name]["command"] == words[0] and found[name]["status"] == 0
    assert (
        found["sketch"]["read"] == 8
        and found["sketch"]["sketched"] + sum(found["sketch"]["skipped"].values()) == 8
    )
    assert found["influence"]["sets"] == ["valid"] and found["influence"]["prompts"] == 20
    assert found["select"]["selected"] == read_selection(tmp_path / "s.jsonl")
    assert found["convert"]["prompts"] == 20 and found["convert"]["responses"] == 80
    assert found["report"]["report"] == str(tmp_path / "r.html")
    assert found["info"]["kind"] == "run" and found["info"]["selected"] == 5
    assert found["store verify"][str(stores / "train")]["prompts"] == 20
    assert main(["info", str(tmp_path / "nothing.jsonl"), "--json"]) == 2
    failed, told = printed(capsys)
    assert failed["status"] == 2 and "there is no such file" in failed["error"] and "error:" in told


def test_quiet_and_verbose(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["info", str(work / "train.jsonl")]
    assert main([*words, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*words, "-q", "--json"]) == 0
    found, told = printed(capsys)
    assert found["prompts"] == 20 and told == ""
    write_lines(tmp_path / "t.jsonl", [{k: v for k, v in r.items() if k != "id"} for r in make_records(3)])
    assert main(["info", str(tmp_path / "t.jsonl"), "-v"]) == 0
    told = capsys.readouterr().err
    assert f"cropi {cropi.__version__}, Python {sys.version.split()[0]}, torch" in told
    assert re.search(r"warning: .*\(HashedIds, \S*readers\.py:\d+\)", told), "where the warning comes from"
    assert main(["info", str(tmp_path / "t.jsonl"), "-q"]) == 0
    assert "warning: " in capsys.readouterr().err  # what is wrong is said all the same


def test_a_command_says_a_warning_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(quiet=False, verbose=False, json=False)
    for _ in range(2):
        with speaking(args):
            for words in ("a", "b", "a"):
                warn(words)
    assert capsys.readouterr().err == 2 * "warning: a\nwarning: b\n"


@pytest.mark.long
def test_there_is_no_bar_where_nobody_looks(work: Path, tmp_path: Path) -> None:
    words = [
        "sketch",
        "--model",
        str(work / "model"),
        "--trajectories",
        str(work / "valid.jsonl"),
        "--dim",
        "512",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "cropi", *words, "--out", str(tmp_path / "s")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "running on    cpu" in done.stdout and "\r" not in done.stderr and "it/s" not in done.stderr
    assert done.stderr.count("trying out    the model on a few tokens, before the first prompt\n") == 1


# ------------------------------------------------------------------------------------------------------ dry run
@pytest.mark.long
def test_a_dry_run_says_what_it_would_take_and_writes_nothing(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*job(work, "dry"), "--dry-run", "--json", "--store-dtype", "float16"]) == 0
    found, told = printed(capsys)
    assert not (work / "dry").exists() and "nothing was written" in told
    tokenizer = make_tokenizer()
    for name, records in (("train", make_records(20)), ("valid", make_records(8, seed=1))):
        usable = [record for record in records if len(set(record["rewards"])) > 1]
        tokens = sum(
            len(tokenizer(record["prompt"])["input_ids"])
            + sum(len(tokenizer(text)["input_ids"]) + 1 for text in record["responses"])
            for record in usable
        )
        cost = found["dry_run"][name]
        assert (cost["prompts"], cost["tokens"], cost["bytes"]) == (
            len(usable),
            tokens,
            2 * 512 * len(usable),
        )
        assert 0 < cost["seconds"] < 60 and cost["stored"] == 0
    words = [
        "sketch",
        "--model",
        str(work / "model"),
        "--trajectories",
        str(work / "train.jsonl"),
        "--dim",
        "512",
    ]
    assert main([*words, "--out", str(work / "some"), "--limit", "5"]) == 0
    capsys.readouterr()
    assert main([*words, "--out", str(work / "some"), "--dry-run"]) == 0
    assert "(5 more are stored already)" in capsys.readouterr().out
    # A store that the run will refuse is refused now: its prompts were counted as stored already.
    other = write_lines(work / "other.jsonl", make_records(20, seed=3))
    assert main([*words, "--trajectories", str(other), "--out", str(work / "some"), "--dry-run"]) == 2
    assert f"or remove the folder {work / 'some'}, to sketch" in " ".join(capsys.readouterr().err.split())
    bad = write_lines(work / "bad.jsonl", [{**make_records(1)[0], "rewards": [1.0]}])
    assert main([*job(work, "dry"), "--train", str(bad), "--dry-run"]) == 2  # everything is checked


# ------------------------------------------------------------------------------------------------------- config
@pytest.mark.long
def test_the_config_of_a_run_repeats_it_from_anywhere(
    work: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = yaml.safe_load((run / "config.yaml").read_text())
    assert (
        held["width"] == "full"
        and held["exclude"] == ["*norm*"]
        and held["eos"] is False
        and held["dim"] == 512
    )
    assert held["train"] == [str(work / "train.jsonl")] and "quiet" not in held and "config" not in held
    monkeypatch.chdir(tmp_path)
    assert main(["run", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again"), "-q"]) == 0
    assert (tmp_path / "again/selected.jsonl").read_bytes() == (run / "selected.jsonl").read_bytes()
    manifests = [cropi.SketchStore.open(out / "sketches/train").manifest for out in (run, tmp_path / "again")]
    assert manifests[0]["spec"]["width"] is None and manifests[0]["parameters"]["excluded"]
    assert {k: v for k, v in manifests[0].items() if k not in ("notes", "writer")}.items() <= manifests[
        1
    ].items()
    again = yaml.safe_load((tmp_path / "again/config.yaml").read_text())
    assert again == held | {"out": str(tmp_path / "again")}


# --------------------------------------------------------------------------------------------------------- info
@pytest.mark.long
def test_info_reads_everything_that_is_written(
    work: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file and folder that a run, its exports, a check, a store's export and a selection leave behind."""
    data = write_lines(
        tmp_path / "data.jsonl", [{"id": r["id"], "question": r["prompt"]} for r in make_records(20)]
    )
    select = ["select", "--scores", str(run / "scores.parquet"), "--fraction", "0.25", "--table", "0", "-q",
              "--trajectories", str(work / "train.jsonl"), "--out", str(tmp_path / "selected.jsonl")]  # fmt: skip
    exports = {"e.jsonl": "jsonl", "e.parquet": "parquet", "e.txt": "ids", "saved": "save_to_disk", "v.parquet": "verl",
               "s.jsonl": "slime", "o.jsonl": "openrlhf"}  # fmt: skip
    for name, form in exports.items():
        more = ["--data-source", "sums"] if form == "verl" else []
        assert main([*select, "--export", str(tmp_path / name), "--format", form, *more]) == 0
    for name in ("indices", "weights"):
        more = ["--export", str(tmp_path / f"{name}.json"), "--format", name, "--dataset", str(data)]
        assert main([*select, *more]) == 0
    assert main(["report", str(run), "-q"]) == 0
    for name in ("m.npy", "m.parquet"):
        assert (
            main(["store", "export", str(run / "sketches/train"), "--out", str(tmp_path / name), "-q"]) == 0
        )
    check = ["check", "--model", str(work / "model"), "--trajectories", str(work / "train.jsonl"), "--dim", "512",
             "-n", "4", "--out", str(tmp_path / "check.json"), "-q"]  # fmt: skip
    assert main(check) in (0, 1)  # whatever it says of a tiny model
    capsys.readouterr()
    kinds = {
        run: "run", run / "sketches/train": "store", run / "scores.parquet": "scores",
        run / "selected.jsonl": "selection",
        run / "selected_trajectories.jsonl": "trajectories", run / "config.yaml": "config", run / "report.html": "page",
        run / "selected_trajectories.jsonl.sha256": "checksums",
        run / "scores.png": "picture", tmp_path / "selected.jsonl": "selection", tmp_path / "e.txt": "ids",
        tmp_path / "indices.json": "indices", tmp_path / "weights.json": "weights", tmp_path / "check.json": "check",
        tmp_path / "m.npy": "matrix", tmp_path / "m.parquet": "sketches", tmp_path / "m.npy.rows.jsonl": "rows",
        **{tmp_path / name: "prompts" for name in ("e.jsonl", "e.parquet", "saved", "v.parquet", "s.jsonl", "o.jsonl")},
    }  # fmt: skip
    written = {path for path in run.iterdir() if not path.name.startswith(".")} - {run / "sketches"}
    assert written <= set(kinds), written - set(kinds)  # of a new file, the kind has to be said here
    for path, kind in kinds.items():
        assert main(["info", str(path), "--json"]) == 0, path
        found, told = printed(capsys)
        assert found["kind"] == kind and str(path) in told, path
        assert found.get("prompts", found.get("selected", 5)) == (20 if kind in ("run", "store", "scores") else
                                                                  found.get("prompts", 5))  # fmt: skip
    assert found["columns"] == ["input", "label", "datasource", "id"]
    for path, words in (
        (run / "sketches/train", "spec          dim "),
        (run / "scores.parquet", "metric        cosine"),
    ):
        assert main(["info", str(path)]) == 0
        text = capsys.readouterr().out
        assert words in text and "{" not in text and "null" not in text, text
    damaged = tmp_path / "x.npy"
    damaged.write_bytes(b"\x93NUMPY\x01\x00v\x00{}")
    assert main(["info", str(damaged)]) == 2 and "damaged NumPy file" in capsys.readouterr().err


def test_info_of_what_is_not_finished(
    work: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has not selected, a curriculum in the middle, a folder of a trainer's dumps."""
    (tmp_path / "half/sketches").mkdir(parents=True)
    shutil.copytree(run / "sketches/valid", tmp_path / "half/sketches/valid")
    assert main(["info", str(tmp_path / "half"), "--json"]) == 0
    found, told = printed(capsys)
    assert (
        found["kind"] == "run"
        and found["stores"]["valid"]["prompts"] == 8
        and "nothing is selected yet" in told
    )
    (tmp_path / "stages").mkdir()
    state = {"format": 1, "settings": {}, "done": [{"stage": 0, "step": "sketch", "seconds": 1.5, "attempts": 1}],
             "started": {"stage": 0, "step": "select", "attempts": 1}}  # fmt: skip
    (tmp_path / "stages/state.json").write_text(json.dumps(state))
    assert main(["info", str(tmp_path / "stages"), "--json"]) == 0
    found, told = printed(capsys)
    assert (
        found["kind"] == "curriculum" and found["started"]["step"] == "select" and "stage 0, select" in told
    )
    (tmp_path / "stages/state.json").write_text("{")
    assert main(["info", str(tmp_path / "stages")]) == 2 and "is damaged" in capsys.readouterr().err
    for step in (2, 4):
        (tmp_path / f"trained/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"trained/checkpoint-{step}/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "trained/checkpoint-4/trainer_state.json").write_text("{}")
    (tmp_path / "trained/checkpoint-6").mkdir()
    (tmp_path / "trained/checkpoint-6/adapter_config.json").write_text('{"base_model_name_or_path": "of/it"}')
    for name, words in (
        ("trained", "no rollouts, the models checkpoint-2, checkpoint-4, checkpoint-6"),
        ("trained/checkpoint-6", ": of of/it, for --model"),
        ("trained/checkpoint-2", ": llama, for --model"),
        ("trained/checkpoint-4", ": llama, saved by a trainer, for --model"),
    ):  # fmt: skip
        assert main(["info", str(tmp_path / name)]) == 0 and words in capsys.readouterr().out
    (tmp_path / "dumps").mkdir()
    write_lines(tmp_path / "dumps/1.jsonl", [{"input": "q", "output": "a", "score": 1.0, "step": 1}] * 2)
    assert main(["info", str(tmp_path / "dumps"), "--json"]) == 0
    found, told = printed(capsys)
    assert found["kind"] == "trajectories" and "read as       rollouts of verl" in told


# ------------------------------------------------------------------------------------------------------- shells
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "--tokens-per-batch" in script and "curriculum" in script
    if shell != "bash":
        return
    (tmp_path / "cropi.bash").write_text(script)
    ask = (
        "source {0}/cropi.bash; COMP_WORDS=({1}); COMP_CWORD=$((${{#COMP_WORDS[@]}}-1)); "
        "$(complete -p cropi | sed 's/.*-F //; s/ cropi//') cropi; echo ${{COMPREPLY[@]}}"
    )
    for words, want in (("cropi sk", ["sketch"]), ("cropi run --metr", ["--metric"]),
                        ("cropi run --metric ", ["cosine", "dot"])):  # fmt: skip
        given = ask.format(tmp_path, words if not words.endswith(" ") else words + "''")
        done = subprocess.run(["bash", "-c", given], capture_output=True, text=True)
        assert done.stdout.split() == want, done.stderr
