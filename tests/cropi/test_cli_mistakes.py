"""The command line finds mistakes early: in its words at once, in files and options before anything is computed."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from support.commands import cropi
from support.made_curriculum import config, make_folder
from support.made_data import make_model, make_records, make_tokenizer, save_policy, write_lines

from cropi.cli import COMMANDS, main, make_parser
from cropi.cli.config import read_config, write_config
from cropi.cli.parser import vocab_width, width
from cropi.files import LINES, check_outputs
from cropi.store.store import SketchStore
from cropi_kernels import SketchSpec

WRONG_WORDS = [
    ("run --model m", "cropi run: error: the following arguments are required: --train, --valid, --out"),
    ("run --model m --train t --out o", "are required: --valid (scored responses to prompts like those"),
    ("run --modle m", "cropi run: error: there is no option '--modle', did you mean --model?"),
    ("run --output_dir o", "there is no option '--output_dir', did you mean --out?"),
    ("run --frac 0.1", "there is no option '--frac', did you mean --fraction?"),
    ("run --fraction 2", "argument --fraction: '2': give a number in (0, 1]"),
    ("run --fraction nan", "argument --fraction: 'nan': give"),
    ("run --limit 0", "argument --limit: '0': give an integer of at least 1"),
    ("run --temperature inf", "argument --temperature: 'inf': give a number above 0"),
    ("convert a --out b --temperature nan", "argument --temperature: 'nan': give a number above 0"),
    ("run --width 63", "argument --width: '63': give a power of two from 16 to 65536, or 'full' for no fold"),
    ("run --width 8", "argument --width: '8': give a power of two from 16 to 65536, or 'full'"),
    ("run --vocab-width 2097152", "'2097152': give a power of two from 16 to 1048576, or 'full'"),
    ("run --length-constant 0", "argument --length-constant: '0': give a number above 0"),
    ("run --config bad.toml", "error: bad.toml: argument --fraction: '2': "),
    (
        "select --scores s --out o --columns prompt=q",
        "--columns and --source say how --trajectories are read",
    ),
    ("select --scores s --out o --source verl", "--columns and --source say how --trajectories are read"),
    (
        "select --scores s --out o --sketches f",
        "--sketches are for --dedup and --diversity; give one of them",
    ),
    ("sketsh", "'completion'), did you mean 'sketch'?"),
    (
        "run --store-dtype int3",
        "choose from 'float32', 'float16', 'bfloat16', 'int8', 'int4', 'int1'), did you mean 'int",
    ),
    ("run t.jsonl", "error: 't.jsonl' belongs to no option: write the option's name before it; see"),
]


@pytest.mark.parametrize("line,named", WRONG_WORDS, ids=[line for line, _ in WRONG_WORDS])
def test_a_mistake_in_the_words_is_one_line_too(
    line: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.toml").write_text("fraction = 2\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        cropi(*line.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and named in error and error.count("\n") == 1, error


@pytest.mark.parametrize(
    "text,named",
    [
        ("dim:\n", "'dim' has no value"),
        ("sketch:\n  no: 1\n", "c.yaml: the key False is not a string"),
        ("dim: 1024\nseed: 1\ndim: 2048\n", "c.yaml: 'dim' is given twice"),
        ("eos: true\nno_eos: true\n", "c.yaml: 'eos' and 'no_eos' are one option"),
        ("stage: no\n", "c.yaml: 'stage' must be text or a number, got False"),
        ("train: [null]\n", "c.yaml: 'train' must be text or a number, got None"),
        ("train: [[a]]\n", "c.yaml: 'train' must be text or a number, got ['a']"),
        ("stage: 2024-01-01 10:00:00\n", "c.yaml: 'stage' must be text or a number"),
        ("stage: 1.10\n", "c.yaml: 'stage' is text, got the number 1.1"),
        (f"seed: {2**200}\n", "no option takes an integer of more than 128 bits"),
        ("quota: {no: 0.5}\n", "c.yaml: the key False in 'quota' is not a string"),
        ("columns: {prompt: null}\n", "c.yaml: 'columns.prompt' must be text or a number, got None"),
        ("columns: {prompt: 'a,b'}\n", "c.yaml: columns: 'a,b' holds ','"),
        ("groups: {a=b: ['*']}\n", "c.yaml: groups: 'a=b' holds '='"),
    ],
)
def test_a_mistake_in_a_config_file_is_named(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert cropi("run", "--config", tmp_path / "c.yaml") == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    "name,text",
    [
        ("c.toml", "columns = {prompt = 'question'}\n[groups]\nmlp = ['*mlp*', '*norm*']\nothers = 'rest'\n"
                   "[select.quota]\nsums = 0.5\ncode = 3\n"),
        ("c.yaml", "columns: {prompt: question}\ngroups: {mlp: ['*mlp*', '*norm*'], others: [rest]}\n"
                   "select: {quota: {sums: 0.5, code: 3}}\n"),
    ],
)  # fmt: skip
def test_values_by_name_may_be_tables_in_a_config_file(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_config(tmp_path / name) == {
        "columns": "prompt=question", "groups": ["mlp=*mlp*,*norm*", "others=rest"], "quota": ["sums=0.5", "code=3"],
    }  # fmt: skip


def test_numbers_of_a_config_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    """YAML 1.1 reads 010 to the base of 8, and 1:30 to that of 60."""
    file = tmp_path / "c.yaml"
    file.write_text("a: 010\nb: 1:30\nc: 1:30.5\nd: 12\ne: -0.5\nf: 1.0e-6\ng: .inf\nh: 0\ni: 2024-01-02\n")
    assert read_config(file) == {
        "a": "010", "b": "1:30", "c": "1:30.5", "d": 12, "e": -0.5, "f": 1e-6, "g": math.inf, "h": 0,
        "i": datetime.date(2024, 1, 2),
    }  # fmt: skip


def test_a_written_config_has_the_absolute_paths_of_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation set may be called as its folder is, and a stage as some file."""
    monkeypatch.chdir(tmp_path)
    for name in ("math", "0", "1", "auto", "t.jsonl"):
        Path(name).touch()
    words = ["--train", "t.jsonl", "u.jsonl", "--minus", "math", "--stage", "1", "--chat-template", "math"]
    args = make_parser().parse_args(["run", *words, "--out", "o"])
    args.words = words
    held = read_config(write_config(args, tmp_path / "o"))
    assert held["train"] == [str(tmp_path / "t.jsonl"), "u.jsonl"]
    assert (held["minus"], held["stage"], held["dtype"]) == ("math", "1", "auto")
    assert (held["chat_template"], held["out"]) == (str(tmp_path / "math"), str(tmp_path / "o"))


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_version_is_printed(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cropi(word)
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("cropi 0.")


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, told = capsys.readouterr()
    assert not out and all(f"    {name}" in told for name in COMMANDS)


def test_widths_of_the_command_line_are_those_of_the_spec() -> None:
    for parse, name in ((width, "width"), (vocab_width, "vocab_width")):
        assert parse("full") is None
        for power in range(23):
            try:
                wanted = getattr(SketchSpec(**{name: 1 << power}), name)
            except ValueError:
                with pytest.raises(ArgumentTypeError):
                    parse(str(1 << power))
            else:
                assert parse(str(1 << power)) == wanted == 1 << power


def test_no_command_writes_over_what_it_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    for name in ("scores.parquet", "train.jsonl", "data.jsonl"):
        Path(name).write_text("precious", encoding="utf-8")
    select = ["select", "--scores", "scores.parquet", "--out"]
    records = ["--trajectories", "train.jsonl", "--out-trajectories"]
    for words, named in (
        (
            [*select, "there/../scores.parquet"],
            "--out: there/../scores.parquet is the file that --scores reads",
        ),
        (
            [*select, "s", *records, tmp_path / "train.jsonl"],
            "train.jsonl is the file that --trajectories reads",
        ),
        (
            [*select, "s", "--dataset", "data.jsonl", "--export", "data.jsonl"],
            "--export: data.jsonl is the file that",
        ),
        ([*select, "s", "--export", "s", "--format", "ids"], "--export: s is the file that --out writes"),
        (
            ["convert", "data.jsonl", "train.jsonl", "--source", "verl", "--out", "train.jsonl"],
            "cropi convert: error: --out: train.jsonl is the file that FILE reads; give another path",
        ),
    ):
        assert cropi(*words) == 2 and named in capsys.readouterr().err
    assert {path.read_text() for path in tmp_path.glob("*.*")} == {"precious"}


@pytest.mark.parametrize("line, said", [
    ("influence --train s --valid s --out a.csv", "what is written is no .csv; give a path that ends in .parquet"),
    ("select --scores a --out a.jsonl.gz", "what is written is no .gz; give a path that ends in .jsonl"),
    ("influence --train s --valid s --out s/manifest.json", "what is written is no .json"),
    ("rollout --model m --prompts p --reward exact --out s/shard-00000.safetensors", "is a file of the store s; give"),
    ("convert a --out s/manifest.json", "--out: s/manifest.json is a file of the store s; give another path"),
    ("report s --out s/manifest.json", "what is written is no .json; give a path that ends in .html"),
])  # fmt: skip
def test_an_output_is_no_file_of_a_store_and_ends_as_what_is_written(
    line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s").mkdir()
    (tmp_path / "s/manifest.json").write_text("{}")
    assert cropi(*line.split()) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["s", "manifest.json"]


def test_lines_may_be_text_and_shards_of_others_have_manifests_too(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    check_outputs({"--out": str(tmp_path / "shard-00001.txt")}, {}, {"--out": LINES})


@pytest.mark.skipif(sys.getfilesystemencoding() != "utf-8", reason="such a locale has a message of its own")
def test_a_name_that_is_not_utf_8_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / os.fsdecode(b"x\xff")
    assert cropi("convert", "none.jsonl", "--out", out) == 2
    assert r"x\udcff' is not UTF-8, as what is noted of a job has to be; rename" in capsys.readouterr().err


@pytest.mark.long
def test_names_beyond_the_characters_of_a_process_say_what_to_set(tmp_path: Path) -> None:
    """With UTF-8 mode off, in no locale: as an argument the name comes in bytes, in a config file in characters."""
    env = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": "utf-8",
    }
    lines = json.dumps(
        {"id": "ä", "prompt": "1+1=", "responses": ["2", "3"], "rewards": [1, 0], "task": "中"}
    )
    for name in ("dé.jsonl", "d.jsonl"):
        (tmp_path / name).write_text(lines + "\n", encoding="utf-8")
    (tmp_path / "c.yaml").write_text(
        "model: m\ntrain: [dé.jsonl]\nvalid: [d.jsonl]\nout: o\n", encoding="utf-8"
    )
    code = (
        "import sys, cropi; from cropi.cli import main; from cropi.data.readers import read\n"
        "main(['convert', sys.argv[1], '--out', 'out.jsonl']); main(['run', '--config', 'c.yaml'])\n"
        "from pathlib import Path; from cropi.cli.config import read_config; from cropi.rollouts.rewards import _file\n"
        "from cropi.curriculum.checks import check_command\n"
        "for look in (lambda: list(read('d\\xe9.jsonl')), lambda: cropi.SketchStore.open('d\\xe9'),\n"
        "             lambda: read_config(Path('d\\xe9.yaml')), lambda: _file('d\\xe9.py'),\n"
        "             lambda: check_command('trainer', 'd\\xe9 x')):\n"
        "    try: look()\n"
        "    except cropi.CropiError as error: print(error, file=sys.stderr)\n"
        "print([(group.id, group.task) for group in read('d.jsonl')])\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, "dé.jsonl"], cwd=tmp_path, env=env, capture_output=True, encoding="utf-8"
    )
    told = "has characters beyond ascii, in which this process takes paths: set PYTHONUTF8=1"
    names = [re.search(f"'([^']*)' {told}", line) for line in ran.stderr.splitlines() if told in line]
    assert [found and found[1] for found in names] == [*3 * ["dé.jsonl"], "dé", "dé.yaml", "dé.py", "dé x"], (
        ran.stderr
    )
    assert ran.stdout.splitlines()[-1] == "[('ä', '中')]"


def test_a_tokenizer_without_an_end_token_is_used_as_the_message_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    train = write_lines(tmp_path / "train.jsonl", make_records(4))
    words = ["sketch", "--model", tmp_path / "model", "--trajectories", train, "--no-progress", "--dim", 1024]
    assert cropi(*words, "--out", tmp_path / "s") == 2
    assert "--no-eos" in capsys.readouterr().err and not (tmp_path / "s").exists()
    assert cropi(*words, "--out", tmp_path / "s", "--no-eos") == 0


@pytest.mark.long
def test_limit_is_one_of_training_prompts_alone(tmp_path: Path) -> None:
    made, sizes = make_folder(tmp_path), {"train": 6, "valid": 12}
    files = [
        "--train",
        made / "train.jsonl",
        "--valid",
        made / "valid.jsonl",
        "--fraction",
        0.5,
        "--limit",
        6,
    ]
    words = ["--model", made / "model", *files, "--no-progress", "--dim", 512]
    assert cropi("run", *words, "--out", tmp_path / "run") == 0
    assert {name: len(SketchStore.open(tmp_path / "run" / "sketches" / name)) for name in sizes} == sizes
    plan = config(made, tmp_path / "staged", stages=1, limit=6, fraction=0.5)
    assert cropi("curriculum", plan) == 0
    folder = tmp_path / "staged" / "stage-00" / "sketches"
    assert (
        len(SketchStore.open(folder / "train")) == 6 and len(SketchStore.open(folder / "valid-valid")) == 12
    )


def test_run_finds_what_is_wrong_with_its_last_step_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed, and nothing is made, before a mistake in the training file or the selection shows."""
    save_policy(tmp_path / "model")
    good = write_lines(tmp_path / "good.jsonl", make_records(40))
    valid = write_lines(tmp_path / "valid.jsonl", make_records(12, seed=1, sets=["x", "y"]))
    alone = write_lines(
        tmp_path / "alone.jsonl", [r | {"rewards": [1, 0, 0, 0]} for r in make_records(1, seed=1)]
    )
    equal = write_lines(tmp_path / "equal.jsonl", [r | {"rewards": [1, 1, 1, 1]} for r in make_records(40)])
    records = make_records(40)
    records[-1]["prompt"], records[-1]["rewards"] = "x" * 200, [1, 0, 0, 0]
    long = write_lines(tmp_path / "long.jsonl", records)

    def fails(named: str, *more: object, train: Path = good, valid: Path = valid) -> None:
        files = ["--train", train, "--valid", valid, "--out", tmp_path / "run"]
        assert cropi("run", "--model", tmp_path / "model", *files, "--no-progress", *more) == 2
        assert named in capsys.readouterr().err and not (tmp_path / "run").exists()

    least = "give a fraction of at least 0.025, a count, or more prompts"
    fails(f"fraction 0.01 of a pool of 40 prompts chooses none; {least}", "--fraction", 0.01)
    fails("fraction 0.1 of a pool of 5 prompts chooses none", "--limit", 5)
    fails("count 41 is more than the", "--count", 41)
    fails("quota: there is no task 'sum9'; did you mean 'sum", "--quota", "sum9=0.5")
    fails("quota: 'sum1' is to give 29 prompts, but", "--count", 30, "--quota", "sum1=29")
    fails("fraction 0.03 of groups of at most 20 prompts chooses none", "--per", "task", "--fraction", 0.03)
    fails("quota: there is no file 'other.jsonl'", "--per", "file", "--quota", "other.jsonl=0.5")
    plain = write_lines(tmp_path / "plain.jsonl", [{**record, "task": None} for record in make_records(40)])
    lined = write_lines(
        tmp_path / "lined.jsonl", [{**record, "id": f"a\n{i}"} for i, record in enumerate(make_records(40))]
    )
    fails("format ids: the prompt id 'a\\n0' is not one line", "--export", tmp_path / "e.txt", train=lined)
    for options in (("--per", "task"), ("--quota", "sum1=0.5"), ("--per", "task", "--limit", 30)):
        fails("but no prompt names its task", *options, train=plain)
    fails("noise is drawn where scores are resampled, and draws is 0", "--noise", "--draws", 0)
    fails("minus: there is no validation set 'yy'; did you mean 'y'", "--minus", "yy")
    fails("minus: 'good' is the only validation set", "--minus", "good", valid=good)
    one = "needs resampled scores, and the validation set 'alone' has 1 prompt"
    fails(f"confidence {one}", "--confidence", 0.9, valid=alone)
    fails("p_selected needs resampled scores, and max_valid is 1", "--draw", "p_selected",
          "--max-valid", 1)  # fmt: skip
    weights = ("--export", tmp_path / "w.json", "--format", "weights", "--dataset", good)
    fails("--format weights needs resampled scores, and draws is 0", *weights, "--draws", 0)
    fails(f"--format weights {one}", *weights, valid=alone)
    fails("device 'warp' is not a torch device", "--device", "warp")
    fails("none of the 40 training prompts has a gradient (40 with equal rewards)", train=equal)
    fails(f"{long}:40", train=long)
    # --limit is for trying out the training prompts: the validation files are taken, and checked, whole.
    fails(f"{long}:40", "--limit", 5, "--fraction", 0.5, valid=long)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    fails("the package 'pyarrow' is needed here: pip install 'cropi-kernels[run]'")
