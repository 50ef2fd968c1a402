"""``cropi curriculum``: stages end to end, and what may change in between."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors import SafetensorError
from support.commands import json_lines
from support.made_curriculum import config, curriculum, make_folder, report, selections
from support.made_data import make_records, write_lines
from support.oracle import stored_logprobs, with_token_ids
from support.syncs import recorded

from cropi.cli import main
from cropi.curriculum.data import Files, Source
from cropi.curriculum.plan import Plan
from cropi.curriculum.state import State

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "train_stage.py"
TRAINER = f"{sys.executable} {EXAMPLE} {{model}} {{records}} --steps {{steps}} --out {{out}} --lr 0.01"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("curriculum"))


# ------------------------------------------------------------------------------------------------ end to end
def test_two_stages_with_a_real_trainer(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced, replace, trained = tmp_path / "run", recorded(monkeypatch), os.replace, 0

    def replaced(source: Path, target: Path) -> None:
        """A power cut must not take the model that the state says is trained."""
        nonlocal trained
        if target.name == "state.json":
            done = [
                entry
                for entry in json.loads(source.read_text(encoding="utf-8"))["done"]
                if entry["step"] == "train"
            ]
            models = [Path(entry["model"]).absolute() for entry in done]
            want = {path for model in models for path in (model / "model.safetensors", model, model.parent)}
            assert want <= {*synced}
            trained = len(done)
        replace(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", replaced)
        assert curriculum(config(made, out, trainer=TRAINER), drawn=True) == 0
    assert trained == sum(path.read_bytes()[:4] == b"\x89PNG" for path in out.glob("stage-*/scores.png")) == 2
    first, second = selections(out)
    assert len(first) == len(second) == 8
    # Stage 1 is scored by the policy that stage 0 trained: other weights, other scores, off-policy ratios.
    assert first[0]["model"] != second[0]["model"]
    assert {row["id"]: row["scores"] for row in first} != {row["id"]: row["scores"] for row in second}
    rows = report(out)
    assert [row["behaviour"]["train"] for row in rows] == ["current", "model"]
    assert [row["selected"] for row in rows] == [8, 8] and rows[0]["kept_from_last"] is None
    kept = {row["id"] for row in first} & {row["id"] for row in second}
    assert rows[1]["kept_from_last"] == len(kept) and rows[1]["overlap"] == len(kept) / 8
    for row in rows:
        for values in row["scores"].values():
            assert values["selected"] > values["pool"]
        assert 0 < row["select_share"] < 1 and row["seconds"]["train"] > 0
    text = (out / "report.md").read_text("utf-8")
    assert text.count("\n| 0 |") == text.count("\n| 1 |") == 1 and "score on x" in text
    assert "\nstep 4/4: " in (log := out / "stage-01" / "train.log").read_text()
    from transformers import AutoModelForCausalLM

    weights = [AutoModelForCausalLM.from_pretrained(path).lm_head.weight for path in
               (made / "model", out / "stage-00/trained", out / "stage-01/trained")]  # fmt: skip
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    shown = capsys.readouterr().out
    assert "stage 1       select: 8 of 40 prompts" in shown and "report.md" in shown
    assert f"stage 1       train ... (its output: {log})\n" in shown
    assert shown.splitlines()[-1] in (out / "log.txt").read_text()


def test_training_in_this_process_with_trl(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "rewards.py").write_text(
        "def even(prompts, completions, answer, **columns):\n"
        "    assert all(p.startswith('Q: ') and p.endswith(' A: ') for p in prompts), prompts[0]\n"
        "    return [float(len(text) % 2 == 0) + 0.1 * len(a) for text, a in zip(completions, answer)]\n"
    )
    out = tmp_path / "run"
    args = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "learning_rate": 0.01,
            "save_steps": 1, "logging_steps": 1, "lr_scheduler_type": "constant"}  # fmt: skip
    options = {"reward": f"{tmp_path}/rewards.py:even", "args": args}
    template = "Q: {% for m in messages %}{{ m['content'] }}{% endfor %} A: "
    path_of_config = config(made, out, trainer="trl", trl=options, stages=1, steps=2, chat_template=template)
    assert curriculum(path_of_config) == 0
    new = out / "stage-00" / "trained" / "policy"
    assert report(out)[0]["model"].endswith("trained/policy")
    old, trained = (AutoModelForCausalLM.from_pretrained(p).lm_head.weight for p in (made / "model", new))
    assert not torch.equal(old, trained)
    assert (out / "stage-00" / "trained" / "checkpoints" / "checkpoint-2").is_dir()
    # Killed while it wrote its last checkpoint: the stage goes on from the one before, to the same policy.
    forget(out / "state.json", "train")
    for path in (out / "stage-00" / "trained" / "checkpoints" / "checkpoint-2").iterdir():
        path.unlink() if path.name == "trainer_state.json" else path.write_bytes(path.read_bytes()[:100])
    shutil.rmtree(new)
    assert curriculum(path_of_config) == 0
    again = AutoModelForCausalLM.from_pretrained(new).lm_head.weight
    assert torch.equal(trained, again)
    # With other options only anew: what is in a checkpoint goes on with the learning rate and the steps that it has.
    forget(out / "state.json", "train")
    shutil.rmtree(new)
    before = (out / "state.json").read_bytes()
    for changes in (
        {"trl": {**options, "args": {**args, "learning_rate": 0.02}}},
        {"steps": 1},
        {"trainer": TRAINER},
    ):
        given = {
            "trainer": "trl",
            "trl": options,
            "stages": 1,
            "steps": 2,
            "chat_template": template,
        } | changes
        if given["trainer"] != "trl":
            given["trl"] = None
        assert curriculum(config(made, out, **given)) == 2
        assert "holds half of a stage's training with train." in capsys.readouterr().err
        assert (out / "state.json").read_bytes() == before
    path_of_config = config(made, out, **(given | {"trainer": "trl", "trl": options}))
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with monkeypatch.context() as disk:
        disk.setattr("trl.GRPOTrainer.save_model", Mock(side_effect=full))
        assert curriculum(path_of_config) == 2
    assert "trained cannot be written: no space left on device" in capsys.readouterr().err
    # Killed between the last checkpoint, inside an epoch, and the end of the step: nothing more is trained.
    assert curriculum(path_of_config) == 0
    assert not (out / "stage-00/trained/checkpoints/checkpoint-3").exists()
    assert torch.equal(trained, AutoModelForCausalLM.from_pretrained(new).lm_head.weight)
    # And anew it trains as a stage that had none.
    forget(out / "state.json", "train")
    path_of_config = config(made, out, **(given | {"trainer": "trl", "trl": options, "steps": 1}))
    assert curriculum(path_of_config, "--accept-changes") == 0
    assert [path.name for path in (out / "stage-00/trained/checkpoints").glob("checkpoint-*")] == [
        "checkpoint-1"
    ]
    # What another first model becomes begins anew, too.
    forget(out / "state.json", "train")
    other = shutil.copytree(made / "model", tmp_path / "other")
    path_of_config = config(
        made, out, **(given | {"trainer": "trl", "trl": options, "steps": 1, "model": str(other)})
    )
    with monkeypatch.context() as patched:
        patched.setattr("cropi.curriculum.run", State.open)
        assert curriculum(path_of_config, "--accept-changes") == 0
    assert not (out / "stage-00/trained/checkpoints").exists()
    capsys.readouterr()
    for changes, words in (
        ({"rewards": "x"}, "'rewards' is not known; did you mean 'reward'?"),
        ({}, "'reward' is missing"),
        ({"reward": "nowhere.py:f"}, "trl.reward: there is no file nowhere.py"),
        ({**options, "args": {"learning_rat": 1}}, "did you mean 'learning_rate'?"),
        ({**options, "args": {"max_steps": 1}}, "'max_steps' is set by the stage"),
    ):
        assert curriculum(config(made, tmp_path / "bad", trainer="trl", trl=changes)) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "bad").exists()


def forget(path: Path, step: str) -> None:
    """Make the state that of a run that was killed in the middle of a step."""
    state = json.loads(path.read_text(encoding="utf-8"))
    del state["checksum"]
    place = [entry["step"] for entry in state["done"]].index(step)
    state["done"] = state["done"][:place]
    state["started"] = {"stage": 0, "step": step, "attempts": 1}
    path.write_text(json.dumps(state), encoding="utf-8")


# ------------------------------------------------------------------------------------- what may change, and not
def test_a_failed_trainer_is_shown_and_can_be_mended(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert curriculum(config(made, out, trainer="echo {selected}; echo no memory left >&2; exit 7")) == 2
    error = capsys.readouterr().err
    assert "exit status 7" in error and "  | no memory left" in error and "train.log" in error
    assert curriculum(config(made, out, trainer="true {selected}")) == 2
    assert "holds no Hugging Face model" in capsys.readouterr().err
    for name in ("selected.jsonl", "selected_trajectories.jsonl"):
        path, changed = out / "stage-00" / name, (out / "stage-00" / name).read_text()
        path.write_text("".join(changed.splitlines(keepends=True)[1:]))
        assert curriculum(config(made, out, stages=1)) == 2 and not Path(f"{out}.calls").exists()
        assert f"{path} is not the file that the stage wrote" in capsys.readouterr().err
        path.write_text(changed)
    # No finished stage has used the old commands, and what was chosen may be changed on purpose.
    (out / "stage-00" / "selected.jsonl").write_text("p0-003\n")
    # It is accepted once, and what a command keeps in a folder of that name is its own.
    checkpoints = f"{out}/stage-00/trained/checkpoints"
    own = config(made, out, stages=1, trainer=f"mkdir {checkpoints}; exit 7 {{selected}}")
    assert [curriculum(own, *words) for words in (["--accept-changes"], [], ["--accept-changes"])] == [2] * 3
    assert Path(checkpoints).is_dir() and "File exists" in capsys.readouterr().err
    assert curriculum(config(made, out, stages=1)) == 0
    attempts = [entry["attempts"] for entry in json.loads((out / "state.json").read_text())["done"]]
    assert attempts == [1, 1, 1, 8, 1]


def test_changes_after_a_finished_stage(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert curriculum(config(made, out, stages=1)) == 0
    capsys.readouterr()
    assert curriculum(config(made, out, fraction=0.3)) == 2
    error = capsys.readouterr().err
    assert "select.fraction = 0.2" in error and "0.3" in error and "--accept-changes" in error
    changed = tmp_path / "changed.jsonl"
    write_lines(changed, make_records(40)[1:])
    assert curriculum(config(made, out, train=str(changed))) == 2
    assert "'train' have changed since stage 0" in capsys.readouterr().err
    # More stages, other batches: the same job.
    assert curriculum(config(made, out), "--tokens-per-batch", 256) == 0
    assert [row["selected"] for row in report(out)] == [8, 8]
    assert curriculum(config(made, out, stages=1)) == 2
    assert "has reached stage 1" in capsys.readouterr().err
    assert curriculum(config(made, out, stages=3, fraction=0.3), "--accept-changes") == 0
    assert [row["selected"] for row in report(out)] == [8, 8, 12]


def test_rollouts_of_every_stage_and_of_the_trainer(made: Path, tmp_path: Path) -> None:
    """A command that makes trajectories, and a trainer that hands back newer ones."""
    script = tmp_path / "roll.py"
    script.write_text(
        "import json, sys\n"
        "source, out, stage = sys.argv[1:]\n"
        "with open(source) as lines, open(out, 'w') as file:\n"
        "    for line in lines:\n"
        "        file.write(json.dumps(json.loads(line) | {'made_at': int(stage)}) + '\\n')\n"
    )
    out = tmp_path / "every"
    roll = f"{sys.executable} {script} {made / 'train.jsonl'} {{train}} {{stage}}"
    path = config(made, out, train=None, rollouts=roll, rollouts_when="every")
    assert curriculum(path) == 0
    for stage in (0, 1):
        text = (out / f"stage-0{stage}" / "selected_trajectories.jsonl").read_text()
        assert text.count(f'"made_at": {stage}') == 8
    # Training trajectories are the current policy's own, validation ones still those of the first.
    assert report(out)[1]["behaviour"] == {"train": "current", "valid": "model"}

    out, records = tmp_path / "own", with_logprobs(made / "train.jsonl", made / "model")
    write_lines(tmp_path / "logged.jsonl", records)
    nudge = yaml.safe_load(config(made, out).read_text())["trainer"]
    own = f"{sys.executable} {script} {{records}} {{rollouts}} {{stage}} && {nudge}"
    assert curriculum(config(made, out, train=str(tmp_path / "logged.jsonl"), trainer=own)) == 0
    merged = json_lines(out / "stage-00" / "trajectories.jsonl")
    chosen = {row["id"] for row in selections(out)[0]}
    assert {record["id"] for record in merged if record.get("made_at") == 0} == chosen and len(merged) == 40
    done = json.loads((out / "state.json").read_text())["done"]
    sketched = {entry["stage"]: entry["train"]["files"] for entry in done if entry["step"] == "sketch"}
    assert sketched == {
        0: [str(tmp_path / "logged.jsonl")],
        1: [str(out / "stage-00" / "trajectories.jsonl")],
    }
    # The file's log-probs, of whichever policy made each record.
    assert report(out)[1]["behaviour"]["train"] == "file"


SKYRL = """
import json, sys
records, out, kind = sys.argv[1:]
with open(records) as lines, open(out, "w") as file:
    for record in map(json.loads, lines):
        record["rewards"] = [1 - reward for reward in record["rewards"]]
        rows = [{"input_prompt": record["prompt"], "output_response": text, "score": reward, "stop_reason": "stop"}
                for text, reward in zip(record["responses"], record["rewards"])]
        for row in rows if kind == "skyrl" else [record]:
            print(json.dumps(row), file=file)
"""


@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_what_the_dumps_of_earlier_stages_were_converted_to_is_removed(tmp_path: Path) -> None:
    row = {"input_prompt": "1+1=", "output_response": "2", "score": 1.0, "stop_reason": "stop"}
    paths = [
        str(write_lines(tmp_path / f"{i}.jsonl", [row, {**row, "output_response": "3"}])) for i in range(3)
    ]
    plan = Plan("model", tmp_path / "out", 2, 4, "train {records}", paths[:1], paths[1:2])
    files = Files(plan)
    made = [Path(files([path]).sources[0].lines_file()) for path in paths]
    assert all(path.is_file() for path in made)
    files.keep(Source([paths[2]], [paths[1]], "model", "model"))
    gc.collect()
    assert [path.is_file() for path in made] == [False, True, True]


@pytest.mark.filterwarnings("ignore::cropi.data.scan.LossyTokens")
def test_dumps_and_tables_are_read_as_by_every_command(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps of a trainer's dumps, validation rows under names of their own, and a trainer that hands dumps back:
    the selections of both stages are those of the same rollouts as records."""
    (tmp_path / "skyrl.py").write_text(SKYRL)
    train, valid = (json_lines(made / f"{name}.jsonl") for name in ("train", "valid"))
    (tmp_path / "steps").mkdir()
    for step in (0, 1):
        rows = [
            {"input_prompt": r["prompt"], "output_response": text, "score": reward, "stop_reason": "stop"}
            for r in train[step::2] for text, reward in zip(r["responses"], r["rewards"])
        ]  # fmt: skip
        write_lines(tmp_path / f"steps/step_{step}.jsonl", rows)
    flat = [
        {"name": r["id"], "question": r["prompt"], "said": text, "score": reward, "set": r["set"]}
        for r in valid for text, reward in zip(r["responses"], r["rewards"])
    ]  # fmt: skip
    assert main(["convert", str(tmp_path / "steps"), "--out", str(tmp_path / "train.jsonl")]) == 0

    def run(kind: str, **changes: Any) -> tuple[Any, dict[str, list[float]]]:
        out = tmp_path / kind
        nudge = yaml.safe_load(config(made, out).read_text())["trainer"]
        hand = f"{sys.executable} {tmp_path / 'skyrl.py'} {{records}} {{rollouts}} {kind} && {nudge}"
        assert curriculum(config(made, out, trainer=hand, behaviour="current", **changes)) == 0
        merged = (out / "stage-00/trajectories.jsonl").read_text().splitlines()
        return selections(out), {r["id"]: r["rewards"] for r in map(json.loads, merged)}

    expected, rewards = run("records", train=str(tmp_path / "train.jsonl"))
    capsys.readouterr()
    got, theirs = run(
        "skyrl", train=str(tmp_path / "steps"), valid=str(write_lines(tmp_path / "valid.jsonl", flat)),
        columns="id=name,prompt=question,response=said,reward=score",
    )  # fmt: skip
    assert got == expected and theirs == rewards
    before = (json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines())
    changed = {r["id"] for r in before if rewards[r["id"]] != r["rewards"]}
    assert changed == {row["id"] for row in got[0]}
    told = capsys.readouterr().out
    # The two steps are converted once, and what the trainer makes once a stage.
    assert told.count("read as       results of SkyRL") == 3
    with pytest.raises(SystemExit):
        curriculum(config(made, tmp_path / "unknown", source="sky"))
    assert "invalid choice: 'sky'" in capsys.readouterr().err


def test_the_trainers_rollouts_need_log_probs_only_where_a_ratio_is_read(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(name: str, **changes: Any) -> int:
        out = tmp_path / name
        nudge = yaml.safe_load(config(made, out).read_text())["trainer"]
        return curriculum(config(made, out, trainer=f"cp {{records}} {{rollouts}} && {nudge}", **changes))

    assert run("ratio", stages=1, fraction=1.0, pool="all") == 2
    assert "every record needs 'logprobs' (with 'response_ids'), but 40 have none" in capsys.readouterr().err
    # The rollouts of 8 prompts cannot bring the log-probs of 40: that is known before any work.
    assert run("early", stages=1) == 2
    error = capsys.readouterr().err
    assert "at most 8 prompts" in error and "but 40 of 40 records have none (the first" in error
    assert not (tmp_path / "early.calls").exists() and not list((tmp_path / "early").glob("*/sketches/*"))
    for name, changes in (("none", {"estimator": "reinforce"}), ("current", {"behaviour": "current"})):
        assert run(name, **changes) == 0
        assert report(tmp_path / name)[1]["behaviour"]["train"] in ("auto", "current")
        assert (tmp_path / name / "stage-00" / "trajectories.jsonl").is_file()


def with_logprobs(path: Path, model_name: Path) -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_name)
    records = [with_token_ids(record) for record in json_lines(path)]
    return [record | {"logprobs": stored_logprobs(model, record)} for record in records]
