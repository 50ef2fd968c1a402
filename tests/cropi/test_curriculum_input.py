"""``cropi curriculum``: what it says to bad input, before any work and in words; and the example configurations."""

from __future__ import annotations

import json
import math
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from support.made_curriculum import config, curriculum, make_folder
from support.made_data import make_records, write_lines

from cropi.curriculum import Plan, run
from cropi.errors import CropiError
from cropi.options import Influence

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("curriculum"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fractoin": 0.1}, ["'fractoin' is not an option", "did you mean 'fraction'?"]),
        ({"stage": 2}, ["'stage' is not an option", "did you mean 'stages'?"]),
        ({"sketch": {"dimm": 512}}, ["'dimm'", "did you mean 'dim'?"]),
        ({"trl": 3}, ["'trl' should be a table"]),
        ({"trl": {"a": 1}}, ["trl: options are given, but the trainer is the command"]),
        ({"stages": 0}, ["stages must be at least 1, got 0"]),
        ({"steps": None}, ["required: --steps"]),
        ({"trainer": "train {modle} {selected}"}, ["{modle} is not known here", "did you mean {model}?"]),
        ({"trainer": "train {model}"}, ["does not name what was selected"]),
        ({"trainer": "train {dataset}"}, ["names {dataset}", "--dataset"]),
        ({"trained_model": "{out}/{step}"}, ["trained_model: {step}", "did you mean {steps}?"]),
        ({"train": None}, ["train: is missing"]),
        ({"rollouts": "roll {train}"}, ["train: files are given and the rollout command writes them too"]),
        (
            {"trainer": "true {selected} {rollouts}", "train": ["train.jsonl", "more.jsonl"], "per": "file"},
            ["select: per is 'file'", "the 2 files of train are put together in one"],
        ),
        ({"rollouts": "roll {model}"}, ["names neither {train} nor {valid}"]),
        (
            {"rollouts_when": "every"},
            ["rollouts_when 'every' is for a rollouts command", "not given; leave it out"],
        ),
        (
            {"sets": ["x", "z"]},
            ["sets: no trajectory covers the validation set 'z'", "are trajectories of 'x', 'y'"],
        ),
        ({"model": "no/such/folder/at/all"}, ["no/such/folder/at/all"]),
        ({"metric": "cos"}, ["invalid choice: 'cos'"]),
        (
            {"trainer": "no-such-program {selected}"},
            ["trainer: the shell finds no program 'no-such-program'"],
        ),
        ({"trainer": "X=1 no-such-program {selected}"}, ["finds no program 'no-such-program'"]),
        ({"trainer": "echo '{selected}"}, ["trainer: the shell cannot read", "nterminated"]),
        ({"device": "cdua"}, ["device 'cdua' is not a torch device"]),
        ({"behaviour_model": "no/such/folder/too"}, ["no/such/folder/too"]),
        (
            {"train": None, "rollouts": "true {train}", "exclude": ["*nrom*"]},
            ["'*nrom*' matches no parameter"],
        ),
        ({"train": None, "rollouts": "true {train}", "valid": "nowhere.jsonl"}, ["nowhere.jsonl"]),
        ({"train": None, "rollouts": "no-such-program {train}"}, ["rollouts: the shell finds no program"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_configs(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    out = tmp_path / "run"
    try:
        status = curriculum(config(made, out, **changes))
    except SystemExit as end:  # argparse
        status = int(end.code or 0)
    assert status == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert not list(out.glob("stage-*/sketches/*"))


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says when it refuses the configuration."""
    assert curriculum(path) == 2
    return capsys.readouterr().err


def test_a_stage_with_nothing_to_select(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    equal = [record | {"rewards": [1.0] * 4} for record in make_records(40)]
    path = config(made, tmp_path / "run", train=str(write_lines(tmp_path / "equal.jsonl", equal)))
    error = refused(path, capsys)
    assert "stage 0: there is nothing to select" in error and "40 with equal rewards" in error


def test_a_validation_set_without_a_gradient(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [
        record | ({"rewards": [0.0] * 4} if record["set"] == "y" else {})
        for record in make_records(12, seed=1, sets=["x", "y"])
    ]
    path = config(made, tmp_path / "run", valid=str(write_lines(tmp_path / "half.jsonl", records)))
    error = refused(path, capsys)
    assert "no trajectory covers the validation set 'y' usefully" in error and "6 with equal rewards" in error


def test_a_dataset_without_stable_ids_is_found_before_any_sketch(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nameless = write_lines(tmp_path / "nameless.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    twice = write_lines(tmp_path / "twice.jsonl", [{"id": 1}, {"id": "1"}])
    for dataset, words in (
        (nameless, "has no stable prompt id"),
        (twice, "rows 0 and 1 have the same id '1'"),
    ):
        path = config(made, tmp_path / "run", dataset=str(dataset), trainer="true {dataset}")
        error = refused(path, capsys)
        assert words in error and "--id-key" in error and not (tmp_path / "run").exists()


@pytest.mark.long
def test_rollout_commands_that_write_nothing(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    nothing = config(made, out, train=None, rollouts="true {train}")
    assert "wrote no {train} file" in refused(nothing, capsys)
    train = f"true {{rollouts}}; cp {made}/model/* {{out}}; : {{selected}}"
    nothing = config(made, out, trainer=train, behaviour="current")
    assert "names {rollouts}, but wrote no such file" in refused(nothing, capsys)


def test_a_folder_of_something_else(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").touch()
    assert "is not empty and holds no state.json" in refused(config(made, out), capsys)


@pytest.mark.parametrize("name", ["curriculum.yaml", "curriculum_trl.yaml", "verl/curriculum.yaml"])
def test_example_configs_are_plans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cropi.cli import make_parser
    from cropi.cli.config import apply_config
    from cropi.cli.curriculum import make_plan

    args = make_parser().parse_args(["curriculum", str(ROOT / "examples" / name)])
    args.words, args.trl, args.stage = [args.config], {}, "0"
    apply_config(args, tables=("trl",))
    plan = make_plan(args)
    assert plan.stages > 1 and plan.train and plan.valid
    if plan.trainer == "trl":
        from cropi.trainers.trl.in_process import check_options

        monkeypatch.chdir(ROOT)
        check_options(plan.trl)
    else:
        script = ROOT / plan.trainer.split()[1]
        assert script.is_file()


def test_switches_in_a_config_file_are_named_either_way(made: Path, tmp_path: Path) -> None:
    from cropi.cli import make_parser
    from cropi.cli.config import apply_config
    from cropi.cli.curriculum import make_plan

    for number, (changes, shown) in enumerate((({"no_progress": None}, True), ({}, False))):
        path = config(made, tmp_path / str(number), trainer="false {selected}", **changes)
        args = make_parser().parse_args(["curriculum", str(path)])
        args.words, args.trl, args.stage = [args.config], {}, "0"
        apply_config(args, tables=("trl",))
        assert make_plan(args).progress is shown


def trl(**changes: Any) -> dict[str, Any]:
    args = {"per_device_train_batch_size": 4, "num_generations": 2, "learning_rate": 1e-6}
    return {"trainer": "trl", "trl": {"reward": f"{__file__}:reward", "args": args} | changes}


def reward(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"args": {"learning_rate": "1e-6"}}, ["learning_rate must be a finite number, got '1e-6'", "1.0e-6 a number"]),
        ({"args": {"num_generations": "4"}}, ["num_generations must be an integer or None, got '4'"]),
        ({"args": {"temperature": True}}, ["temperature must be a finite number, got True"]),
        ({"args": {"bf16": "yes"}}, ["bf16 must be True or False", "got 'yes'"]),
        ({"args": {"num_generations": 1}}, ["GRPOConfig does not take these options", "at least 2 generations"]),
        ({"args": {"per_device_train_batch_size": 3, "num_generations": 2}}, ["GRPOConfig does not take", "divisible"]),
        ({"args": {"optim": "adamx"}}, ["GRPOConfig does not take these options", "adamx"]),
        ({"args": ["a"]}, ["trl.args should be a table"]),
        ({"dtype": "float23"}, ["trl: dtype must be one of float32, bfloat16, float16, got 'float23'"]),
        ({"device": "cdua"}, ["trl: device 'cdua' is not a torch device"]),
        ({"args": {"per_device_train_batch_size": 40, "num_generations": 2}},
         ["stage 0: 4 of 40 prompts are selected, but one generation batch takes 20 different ones",
          "raise fraction or count, give more"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_options_of_the_in_process_trainer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: list[str]
) -> None:
    pytest.importorskip("trl")
    error = refused(config(made, tmp_path / "run", **trl(**changes), fraction=0.1), capsys)
    for word in words:
        assert word in error
    assert not list((tmp_path / "run").glob("stage-*/sketches/*"))


@pytest.mark.parametrize("value", [date(2026, 1, 1), b"x", math.nan, (1, 2), {1: "a"}, "fine"], ids=ascii)
def test_options_that_the_state_of_a_curriculum_would_not_keep(value: Any, tmp_path: Path) -> None:
    """YAML makes dates of some texts, and a state that has them is not written, or not the same when it is read."""
    make = partial(Plan, "m", tmp_path, 1, 1, "trl", ["t"], ["v"], trl={"reward": value})
    if value == "fine":
        make()
        return
    with pytest.raises(CropiError, match="trl: 'reward' is .*finite numbers"):
        make()


@pytest.mark.long
def test_a_failing_disk_is_told_from_a_failing_reward(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sandbox that a reward function may not enter was called a folder of the training that cannot be written."""
    (tmp_path / "denied.py").write_text(
        "def even(**columns):\n    raise PermissionError(13, 'No', '/sandbox')\n"
    )
    args = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "save_steps": 1,
    }
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    given = {"trainer": "trl", "stages": 1, "steps": 1, "chat_template": template}
    options = {"reward": f"{tmp_path}/denied.py:even", "args": args}
    assert curriculum(config(made, tmp_path / "run", **given, trl=options)) == 2
    assert "error: [Errno 13] No: '/sandbox'" in capsys.readouterr().err
    full = RuntimeError("unexpected pos 64 vs 0: No space left on device (28)")
    monkeypatch.setattr("trl.GRPOTrainer._save_checkpoint", Mock(side_effect=full))
    options["reward"] = f"{__file__}:reward"
    assert curriculum(config(made, tmp_path / "run", **given, trl=options)) == 2
    assert "trained cannot be written: no space left on device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stages": "2"}, "stages must be an integer, got '2'"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"train": "a.jsonl"}, r"train must be a list .*got 'a.jsonl'; for one, write \['a.jsonl'\]"),
        ({"out": "run"}, "out must be a path"),
        ({"progress": 0}, "progress must be True or False, got 0"),
        ({"influence": {"metric": "dot"}}, "influence must be"),
        ({"dtype": "float23"}, "dtype must be one of auto, float32"),
        ({"export": {"format": "csv"}}, "export.format must be one of jsonl"),
        (
            {"export": {"format": "weights"}, "influence": Influence(draws=0)},
            "export.format weights needs resampled scores, and draws is 0; give draws of at least 2",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_plan_from_python_is_checked_before_any_work(
    made: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {
        "model": str(made / "model"), "out": tmp_path / "run", "stages": 1, "steps": 1, "trainer": "echo {selected}",
        "train": [str(made / "train.jsonl")], "valid": [str(made / "valid.jsonl")],
    }  # fmt: skip
    with pytest.raises(CropiError, match=words):
        run(Plan(**(given | changes)))
    assert not (tmp_path / "run").exists()


def test_weights_of_one_validation_prompt_are_refused_before_the_sketches(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (made / "valid.jsonl").read_text().splitlines()
    usable = next(line for line in lines if len(set(json.loads(line)["rewards"])) > 1)
    (tmp_path / "one.jsonl").write_text(usable + "\n")
    export = {"format": "weights", "dataset": str(made / "train.jsonl")}
    given = config(made, tmp_path / "run", valid=[str(tmp_path / "one.jsonl")], export=export)
    words = "export.format weights needs resampled scores, and the validation set 'x' has 1 prompt"
    assert words in refused(given, capsys)


def test_a_disk_without_room_for_the_sketches(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    # 40 prompts of both kinds have a gradient: 512 float32 numbers each, in two stages.
    words = f"the sketches of 40 prompts in 2 stages need {40 * 512 * 4 * 2 / 1e9:.3g} GB at least"
    assert words in refused(config(made, tmp_path / "run"), capsys)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"selection": 3}, "trainer.cropi.selection must be text, got 3"),
        ({"selection": "s", "stage_steps": "4"}, "stage_steps must be an integer, got '4'"),
        ({"selection": "s", "stage_steps": True}, "stage_steps must be an integer, got True"),
        ({"selection": "s", "comand": "x"}, "did you mean 'command'"),
        ({"selection": "s", "command": "x {step}", "stage_steps": 4}, "does not name {selection}"),
        ({"selection": "s", "command": "x {selection} {rollouts}", "stage_steps": 4}, "record=FOLDER is needed"),
        ({"selection": "s", "record": f"{__file__}/x"}, "is a file; give a folder"),
    ],
)  # fmt: skip
def test_options_of_the_trainer_in_verl(options: dict[str, Any], words: str) -> None:
    from cropi.trainers.verl.options import check_options

    with pytest.raises(CropiError) as caught:
        check_options(options, SimpleNamespace(save_freq=2))
    assert words in str(caught.value)
