"""Files and words that people write by hand: configs of `cropi run` and `cropi curriculum`, specifications of rewards,
columns, groups and quotas, options of trainers' plug-ins. Each is taken, or ends in words that name it."""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from support import fuzz

from cropi.cli import make_parser, options
from cropi.cli.config import UNUSABLE, apply_config
from cropi.cli.curriculum import make_plan
from cropi.cli.parser import Parser
from cropi.data.forms import parse_columns
from cropi.errors import CropiError
from cropi.grouping import read_groups
from cropi.ranking.shares import read_quotas
from cropi.rollouts.rewards import Reward
from cropi.trainers.slime.options import option
from cropi.trainers.trl.in_process import check_options as check_trl
from cropi.trainers.verl.options import check_options as check_verl

pytestmark = pytest.mark.long

PARSER = make_parser()
EXAMPLES = {
    "width": "64",
    "vocab_width": "8192",
    "trained_model": "{out}",
    "quota": ["a=0.5"],
    "groups": ["a=*"],
}


def made(command: str) -> dict[str, Any]:
    """A config with every option of a command, at a value that it takes."""
    parser = parser_of(command)
    held: dict[str, Any] = {}
    for action in parser._actions:
        if not action.option_strings or action.dest in UNUSABLE:
            continue
        value: Any = action.default
        if action.nargs == 0:
            value = bool(value)
        elif action.dest in EXAMPLES:
            value = EXAMPLES[action.dest]
        elif value in (None, []):
            value = next(iter(action.choices)) if action.choices else 1 if action.type is not None else "x"
            value = [value] if action.nargs else value
        held[action.dest] = value
    return held


def parser_of(command: str) -> Parser:
    (commands,) = (one for one in PARSER._actions if isinstance(one, argparse._SubParsersAction))
    parser: Parser = commands.choices[command]
    return parser


# ------------------------------------------------------------------------------------------------ how they are written
def toml(value: Any) -> str:
    """A value in TOML, which has none; tables inside one another are written in a line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return "1979-05-27T07:32:00Z" if value is None else json.dumps(value)


# What each language has beside JSON's types.
ODD = {
    ".toml": (
        "1979-05-27", "07:32:00", "1979-05-27T07:32:00", f"0x{'f' * 5000}", "1_000", "0o17", "'''a\nb'''", "1e400",
        "-nan", f"{'[' * 500}{']' * 500}",
    ),
    ".yaml": (
        "1979-05-27", "2001-12-14T21:59:43Z", f"0x{'f' * 5000}", "9" * 50, "010", "1:30", "1:30.5", "no", "~", "1e-6",
        "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!python/object:os.system x", "!!timestamp x", "!!int ''",
        "!!float x", "!!bool maybe", "&a [*a]", "*nowhere", "{? [a]: b}", "{? {a: 1}: b}", "{<<: 3}", "|\n  a\n  b",
        "'", "\t", "- a", f"{'[' * 500}{']' * 500}", f"{'{a: ' * 80}1{'}' * 80}",
    ),
}  # fmt: skip
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252")


def written(rng: random.Random, path: Path, content: Any) -> None:
    """The config in its language; some with a value that JSON lacks, a key twice, another encoding, or other bytes."""
    if path.suffix == ".toml":
        rows = content.items() if isinstance(content, dict) else [("x", content)]
        lines = [f"{json.dumps(key)} = {toml(value)}" for key, value in rows]
    else:
        text = yaml.safe_dump(content, allow_unicode=rng.random() < 0.5, sort_keys=False)
        lines = text.splitlines()
    if rng.random() < 0.4 and lines:
        place = rng.randrange(len(lines))
        equal = " = " if path.suffix == ".toml" else ": "
        key = lines[place].partition(equal)[0] if rng.random() < 0.8 else "dim"
        line = f"{key}{equal}{rng.choice(ODD[path.suffix])}"
        lines = [*lines[:place], line, *lines[place + (rng.random() < 0.9) :]]
    if rng.random() < 0.1 and lines:
        lines.append(rng.choice(lines))
    whole = rng.choice(("\n", "\r\n", "\n\n")).join(lines)
    data = whole.encode(rng.choice(ENCODINGS) if rng.random() < 0.1 else "utf-8", "replace")
    path.write_bytes(fuzz.damaged(rng, data, 0, len(data)) if rng.random() < 0.1 and data else data)


# ------------------------------------------------------------------------------------------------ what is checked
def of_run(file: Path) -> None:
    args = PARSER.parse_args(["run", "--config", str(file)])
    args.words = ["--config", str(file)]
    apply_config(args)
    options.selection(args)
    parse_columns(args.columns)


def of_curriculum(file: Path) -> None:
    args = PARSER.parse_args(["curriculum", str(file)])
    args.words, args.trl = [str(file)], {}
    apply_config(args, tables=("trl",))
    if any(getattr(args, name) is None for name in ("model", "out", "stages", "steps", "trainer")):
        raise CropiError(f"{file}: an option is required")
    plan = make_plan(args)
    plan.settings(), plan.fingerprint()


FEW = {"model": "m", "out": "o", "train": ["t"], "valid": ["v"]}
RIGHT: dict[str, list[dict[str, Any]]] = {
    "run": [
        FEW
        | {"sketch": {"dim": 64, "kind": "slab"}, "groups": {"a": ["*x*", "*y*"], "b": "rest"}, "seed": 3},
        FEW
        | {
            "quota": {"a": 0.5, "b": 2},
            "columns": {"prompt": "q", "reward": "score"},
            "per": "task",
            "eos": False,
        },
    ],
    "curriculum": [
        FEW | {"stages": 2, "steps": 3, "trainer": "go {model} {selected}", "select": {"fraction": 0.5}},
        FEW | {"stages": 2, "steps": 3, "trainer": "trl", "trl": {"reward": "a.py:f", "args": {"beta": 0.1}}},
    ],
}


@pytest.mark.parametrize("ending", ODD)
@pytest.mark.parametrize(("command", "read"), [("run", of_run), ("curriculum", of_curriculum)])
def test_any_config_is_taken_or_ends_in_words(
    command: str, read: Callable[[Path], None], ending: str
) -> None:
    rights = [made(command), *RIGHT[command]]
    places = [list(fuzz.ways(right)) for right in rights]
    names = [name for action in parser_of(command)._actions for name in (action.dest, *action.option_strings)]

    def one(rng: random.Random, file: Path) -> str:
        number = rng.choice((0, 1, 1, 2, 2))
        content = fuzz.changed(rng, copy.deepcopy(rights[number]), places[number])
        if isinstance(content, dict) and rng.random() < 0.2:
            content[rng.choice([*names, "Dim", "-", ""])] = fuzz.anything(rng)
        try:
            written(rng, file, content)
        except (ValueError, OverflowError, RecursionError, yaml.YAMLError):
            return "cannot be written"
        return fuzz.outcome(partial(read, file), str(file), "trl: ", *names)

    with fuzz.folder() as folder:
        ends = fuzz.run(300, lambda rng: one(rng, folder / f"c{ending}"))
    assert fuzz.repeats() or min(ends["taken"], ends["words"]) > 0.03 * ends.total(), ends


# ------------------------------------------------------------------------------------------------ words and tables
def a_file(rng: random.Random) -> str:
    """The name of a function, or nearly."""
    parts = (
        "a.py",
        "none.py",
        "",
        ":",
        "f",
        "math",
        "exact",
        "json",
        "json.decoder",
        ".",
        "..",
        "a b",
        "\0",
        "é",
        "os",
        "cropi",
    )
    return "".join(rng.choice(parts) + rng.choice(("", ":", ".", "/")) for _ in range(rng.randint(1, 4)))


def words(rng: random.Random) -> str:
    parts = (
        "prompt",
        "reward",
        "id",
        "a",
        "*x*",
        "rest",
        "0.5",
        "3",
        "-1",
        "1e5",
        "nan",
        ",",
        "=",
        "==",
        " ",
        "\n",
        "\ud800",
        "y" * 3000,
    )
    return "".join(rng.choice(parts) for _ in range(rng.randint(0, 6)))


VERL = {
    "selection": "s.jsonl",
    "stage_steps": 4,
    "command": "go {selection} {checkpoint}",
    "record": "r",
    "id_key": "id",
}
TRL = {
    "reward": "json:dumps",
    "dtype": "float32",
    "device": "cpu",
    "args": {"learning_rate": 0.1, "num_generations": 2},
}
TRAINER = SimpleNamespace(save_freq=2)


def in_table(
    check: Callable[[Any], object], right: dict[str, Any], *names: str
) -> Callable[[random.Random], str]:
    places = [way for way in fuzz.ways(right) if way]

    def one(rng: random.Random) -> str:
        table = fuzz.changed(rng, copy.deepcopy(right), places)
        if rng.random() < 0.2:
            table[rng.choice((5, None, "x", "args", fuzz.text(rng)))] = fuzz.anything(rng)
        return fuzz.outcome(partial(check, table), *names)

    return one


def of_slime(table: Any) -> None:
    args = SimpleNamespace(
        **{f"cropi_{name}": value for name, value in table.items() if isinstance(name, str)}
    )
    for name in ("selection", "record", "id_key"):
        option(args, name, "cropi of slime")


TABLES: dict[str, Callable[[random.Random], str]] = {
    "verl": in_table(lambda table: check_verl(table, TRAINER), VERL, "trainer.cropi", "cannot read"),
    "trl": in_table(check_trl, TRL, "trl"),
    "slime": in_table(of_slime, {"selection": "s.jsonl", "record": "r", "id_key": "id"}, "cropi_"),
    "reward": lambda rng: fuzz.outcome(partial(Reward, a_file(rng)), "reward"),
    "trl.reward": lambda rng: fuzz.outcome(
        partial(check_trl, {"reward": a_file(rng)}), "trl.reward", "'reward' is missing"
    ),
    "columns": lambda rng: fuzz.outcome(partial(parse_columns, words(rng)), "columns"),
    "groups": lambda rng: fuzz.outcome(partial(read_groups, [words(rng), words(rng)]), "groups"),
    "quota": lambda rng: fuzz.outcome(partial(read_quotas, [words(rng), words(rng)]), "quota"),
}


@pytest.mark.parametrize("kind", TABLES)
def test_any_options_of_a_plug_in_are_taken_or_end_in_words(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind.startswith("trl"):
        pytest.importorskip("trl")
    monkeypatch.chdir(tmp_path)
    Path("a.py").write_text("def f(prompt, response): return 1\n", encoding="utf-8")
    ends = fuzz.run(300, TABLES[kind])
    assert fuzz.repeats() or ends["words"] > 0.1 * ends.total(), ends
