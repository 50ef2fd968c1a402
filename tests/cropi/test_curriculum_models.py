"""Curricula whose models change where later steps need them as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from support.made_curriculum import config, curriculum, make_folder, report
from support.made_data import write_lines
from test_curriculum import forget, with_logprobs

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("curriculum"))


def check_refused(config: Path, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With one bit of the weights changed."""
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    assert curriculum(config) == 2
    assert f"the files of {weights.parent} have changed since an earlier step" in capsys.readouterr().err
    weights.write_bytes(before)


def test_models_that_change_between_steps_are_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first policy, by which later stages take ratios and the first one trains; and what a stage has trained."""
    here, out = tmp_path / "made", tmp_path / "run"
    shutil.copytree(made, here)
    assert curriculum(config(here, out, stages=1)) == 0
    path, first = config(here, out), here / "model/model.safetensors"
    held = (out / "state.json").read_bytes()

    check_refused(path, first, capsys)
    check_refused(path, out / "stage-00/trained/model.safetensors", capsys)
    (out / "state.json").write_bytes(held)
    forget(out / "state.json", "train")
    check_refused(path, first, capsys)
    assert curriculum(path) == 0


def test_a_model_that_changes_after_its_rollouts_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed between the two steps: the ratio to the policy that rolled out would be taken for 1."""
    here, out = tmp_path / "made", tmp_path / "run"
    shutil.copytree(made, here)
    roll = f"cp {here}/train.jsonl {{train}}"
    path = config(here, out, train=None, rollouts=roll, stages=1)
    assert curriculum(path) == 0
    forget(out / "state.json", "sketch")
    check_refused(path, here / "model/model.safetensors", capsys)


def test_training_that_would_write_over_the_model_of_the_ratios_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second stage took its ratios for 1: the policy had the name of the one that made the trajectories."""
    here, out = tmp_path / "made", tmp_path / "run"
    shutil.copytree(made, here)
    for where in ("{model}", f"{here}/model"):
        assert curriculum(config(here, out, trained_model=where)) == 2
        said = capsys.readouterr().err
        assert f"training would write over {here}/model, which made the trajectories of train" in said
    assert not (out / "stage-00/trained").exists() and not Path(f"{out}.calls").exists()
    # Log-probs that are stored stay right.
    for name in ("train", "valid"):
        write_lines(here / f"{name}.jsonl", with_logprobs(here / f"{name}.jsonl", here / "model"))
    trainer = yaml.safe_load(config(here, out).read_text())["trainer"].replace("{out}", "{model}")
    copied = "for name in os.listdir(model):\n    shutil.copy(os.path.join(model, name), out)\n"
    (here / "nudge.py").write_text((here / "nudge.py").read_text().replace(copied, ""))
    out = tmp_path / "logged"
    assert curriculum(config(here, out, trainer=trainer, trained_model="{model}")) == 0
    assert report(out)[1]["behaviour"] == {"train": "file", "valid": "file"}
