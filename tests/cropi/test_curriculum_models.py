"""Curricula whose models change where later steps need them as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.made_curriculum import config, curriculum, make_folder, report
from support.made_data import write_lines
from test_curriculum import forget, with_logprobs
from test_loading import make_adapter

import cropi

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


def test_adapters_of_peft_are_models(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a trainer of LoRA leaves, and what the first stage begins with."""
    adapter, out = make_adapter(made / "model", tmp_path / "adapter"), tmp_path / "run"
    own = f"test -f {{records}} && cp {adapter}/* {{out}}"
    assert curriculum(config(made, out, trainer=own)) == 0
    stores = [cropi.SketchStore.open(out / f"stage-0{k}/sketches/train") for k in (0, 1)]
    covered = [store.manifest["parameters"]["covered"] for store in stores]
    assert covered[0] > covered[1] == 2 * (4 * (32 + 32) + 4 * (64 + 32))
    assert report(out)[0]["model"] == str(out / "stage-00/trained")
    assert curriculum(config(made, tmp_path / "kept", trainer=own, passes=0.5)) == 2
    assert "are not both adapters of PEFT: budget and passes keep sketches of" in capsys.readouterr().err
    assert curriculum(config(made, tmp_path / "from", trainer=own, model=str(adapter))) == 0
    of_adapter = cropi.SketchStore.open(tmp_path / "from/stage-00/sketches/train").manifest["parameters"]
    assert of_adapter["covered"] == covered[1]


def test_trl_goes_on_with_an_adapter(made: Path, tmp_path: Path) -> None:
    """Killed while it writes its last checkpoint, it comes to the same adapter."""
    adapter, out = make_adapter(made / "model", tmp_path / "adapter"), tmp_path / "run"
    (tmp_path / "rewards.py").write_text(
        "def size(completions, **_):\n    return [float(sum(map(ord, t)) % 7) for t in completions]\n"
    )
    args = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "save_steps": 1,
    }
    options = {"reward": f"{tmp_path}/rewards.py:size", "args": {**args, "learning_rate": 0.01}}
    path = config(made, out, trainer="trl", trl=options, model=str(adapter), stages=1, steps=2)
    assert curriculum(path) == 0
    new = out / "stage-00/trained/policy"
    before, trained = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, new))
    assert before.keys() == trained.keys()
    assert not any(torch.equal(weights, trained[name]) for name, weights in before.items())
    forget(out / "state.json", "train")
    shutil.rmtree(new)
    for part in (out / "stage-00/trained/checkpoints/checkpoint-2").iterdir():
        part.unlink() if part.name == "trainer_state.json" else part.write_bytes(part.read_bytes()[:100])
    assert curriculum(path) == 0
    again = load_file(new / "adapter_model.safetensors")
    assert all(torch.equal(weights, again[name]) for name, weights in trained.items())
