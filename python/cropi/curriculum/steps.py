"""The steps of one stage. Each may be killed anywhere and done again; each returns what the next ones need."""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cropi import pipeline
from cropi.agreement import Alone
from cropi.atomic import make_folder, sync_all
from cropi.commands import fill, run_command
from cropi.curriculum import data
from cropi.curriculum.learnt import read_training
from cropi.curriculum.plan import IN_PROCESS, Plan
from cropi.curriculum.state import State
from cropi.data.export import export
from cropi.data.trainer_rows import FILES
from cropi.errors import CropiError, warn
from cropi.files import is_file, is_there, writing
from cropi.gradient.behaviour import behaviour_source
from cropi.model.policy import Policy
from cropi.model.sources import base_of
from cropi.options import Influence
from cropi.pipeline import Checked, Part
from cropi.pipeline.lost import LostSets, NothingToFollow, followed, usable_sets, warn_lost
from cropi.pipeline.rescoring import Anew, training_store
from cropi.ranking.plot import plot_scores
from cropi.ranking.selection import select
from cropi.ranking.selection_files import (
    RECORDS,
    SELECTED,
    read_selection,
    write_selected_records,
    write_selection,
)
from cropi.ranking.table import SCORES, read_scores, write_scores
from cropi.report.folder import report_folder
from cropi.sealed import check_sums, sum_of
from cropi.sketching.job import SketchJob, make_tokenize
from cropi.store.earlier import EARLIER
from cropi.store.rows import OK
from cropi.store.store import SketchStore
from cropi.trainers.trl.in_process import CHECKPOINTS, train_stage

Result = dict[str, Any]
# What a stage writes of the prompts that are chosen, for its trainer.
CHOSEN = (SELECTED, RECORDS)


@dataclass
class Stage:
    """Everything that the steps of one stage share. ``lock`` is inherited by commands; ``checkpoints`` are those of the
    models that this stage has loaded."""

    plan: Plan
    files: data.Files
    state: State
    number: int
    model: str
    lock: int
    checkpoints: dict[str, str] = field(default_factory=dict)

    def load(self, model: str) -> Policy:
        """A policy by its name, of which nothing is loaded yet.

        Raises:
            CropiError: its weights are not those that an earlier step used or made.
        """
        policy = data.load(self.plan, model)
        now, used = policy.checkpoint, self.state.checkpoint(model)
        if used not in (None, now) and not self.plan.accept_changes:
            raise CropiError(
                f"the files of {model} have changed since an earlier step: what was scored, trained and compared would "
                "be of different models; put the old ones back, give another --out, or pass --accept-changes"
            )
        self.checkpoints[model] = now
        return policy

    def log(self, step: str) -> Path | None:
        """Where the output of a step's command goes; None: the step is no command."""
        commands = {"rollouts": self.plan.rollouts, "train": self.plan.trainer}
        return None if commands.get(step) in (None, IN_PROCESS) else self.folder / f"{step}.log"

    @property
    def folder(self) -> Path:
        """Where this stage's files are."""
        return self.plan.stage_folder(self.number)

    def values(self) -> dict[str, object]:
        """The values of the names in the trainer's templates; paths are absolute."""
        folder, plan = self.folder.absolute(), self.plan
        return {
            "model": _absolute(self.model), "stage": self.number, "steps": plan.steps,
            "total_steps": plan.steps * (self.number + 1), "selected": folder / SELECTED,
            "records": folder / RECORDS, "rollouts": folder / "rollouts.jsonl",
            "out": folder / "trained", "dataset": _dataset(folder, plan), "python": sys.executable,
        }  # fmt: skip


def rollouts(stage: Stage) -> Result:
    """Have the user's command make the trajectories of the current policy."""
    assert stage.plan.rollouts is not None
    stage.load(stage.model)
    folder = stage.folder / "rollouts"
    files = {name: folder.absolute() / f"{name}.jsonl" for name in ("train", "valid")}
    with writing(folder):
        make_folder(folder)
        # Of an attempt that was cut short: a file without its end looks whole.
        for path in files.values():
            path.unlink(missing_ok=True)
    values = {
        "model": _absolute(stage.model), "stage": stage.number, "out": folder.absolute(), "python": sys.executable,
        **files,
    }  # fmt: skip
    command = fill(stage.plan.rollouts, values, option="rollouts")
    run_command("rollouts", command, stage.folder / "rollouts.log", [stage.lock], values)
    made: Result = {"maker": stage.model, "checkpoints": dict(stage.checkpoints)}
    for name, path in files.items():
        if f"{{{name}}}" not in stage.plan.rollouts:
            continue
        if not is_file(path):
            raise CropiError(f"rollouts: the command succeeded, but wrote no {{{name}}} file ({path})")
        _keep(path)
        made[name] = [str(folder / path.name)]
    if stage.number and "valid" in made and (lost := _solved(stage, made["valid"])):
        warn(f"stage {stage.number}: {lost}; the validation rollouts before are kept", LostSets)
        del made["valid"]
    return made


def _solved(stage: Stage, valid: list[str]) -> str:
    """Why no validation set of new rollouts can be selected for any more; nothing where one can be."""
    try:
        groups, lost = usable_sets(stage.files(valid), stage.plan.influence.minus)
    except CropiError:
        return ""  # the step that reads them for its sketches says what is wrong
    return "" if groups is not None else "; ".join(lost.values())


def sketch_all(stage: Stage) -> Result:
    """Sketch the validation prompts, then the training prompts, with the current policy."""
    begun = time.monotonic()
    plan, source = stage.plan, data.source_of(stage.plan, stage.state, stage.number)
    stage.files.keep(source)
    models = {"policy": stage.load(stage.model)}
    checked = data.check(plan, stage.files, source, stage.number, models["policy"])
    _check_unchanged(stage, data.fingerprints(checked))
    _check_makers(stage, source, checked)
    parts = [*checked.valid, checked.train]
    earlier = [
        plan.stage_folder(n) / "sketches" / part.name for n in range(stage.number + 1) for part in parts
    ]
    job = pipeline.one_date(models["policy"], plan.job, parts, earlier)
    valid = {
        str(part.set): _sketch_one(stage, source.valid_maker, models, part, job) for part in checked.valid
    }
    _followed(stage, valid)  # an error comes before the long part
    part, anew = checked.train, None
    if plan.rescoring.asked:
        part, anew = _anew(stage, checked, valid, begun)
    train: Result = {"files": [], "behaviour": "-"}
    if part.scan.prompts:
        train = _sketch_one(stage, source.train_maker, models, part, job)
    store = training_store(stage.folder / "sketches")
    rows, weights = store.rows(), store.manifest["model"]["weights"]
    models.clear()  # the trainer needs the memory, a GPU's most of all
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {
        "train": train, "valid": valid, "fingerprints": data.fingerprints(checked), "weights": weights,
        "checkpoints": dict(stage.checkpoints),
        "prompts": len(rows), "usable": sum(row.status == OK for row in rows),
        "without_gradient": dict(Counter(row.reason for row in rows if row.status != OK)),
        **({} if anew is None else {"anew": anew.scored, "left": anew.left}),
    }  # fmt: skip


def _anew(stage: Stage, checked: Checked, valid: Mapping[str, Result], begun: float) -> tuple[Part, Anew]:
    """The training prompts that this stage sketches; the others keep the sketches of the stages before."""
    plan, last, folder = stage.plan, stage.number - 1, stage.folder / "sketches"
    before = plan.stage_folder(last) if stage.number else None
    entries = {
        step: stage.state.result(last, step) or {} for step in ("influence", "select", "collect", "sketch")
    }
    renewed = (stage.state.result(stage.number, "rollouts") or {}) if plan.rollouts_when == "every" else {}
    timed = [*valid.values(), entries["sketch"].get("train", {})]
    choosing = sum(entries[step].get("seconds", 0.0) for step in ("influence", "select"))
    anew = Anew(
        plan.rescoring, stage.folder, folder / EARLIER, before,
        [] if before is None else [before / "sketches" / name for name in ("train", EARLIER)],
        others=stage.state.seconds("train", stage.number)
        + sum(entry.get("seconds", 0.0) for entry in (entries["collect"], renewed)),
        spent=lambda: time.monotonic() - begun + choosing,
        seconds=sum(one.get("seconds", 0.0) for one in timed), passed=sum(one.get("tokens", 0) for one in timed),
    )  # fmt: skip
    part = anew.settle(
        Alone(), checked.train, lambda: [SketchStore.open(folder / f"valid-{name}") for name in valid],
        replace(plan.setup, later=stage.number > 0),
    )  # fmt: skip
    return part, anew


def _sketch_one(stage: Stage, maker: str, models: dict[str, Policy], part: Part, job: SketchJob) -> Result:
    """Sketch one part into its store of the stage; ``models`` holds the models that are loaded already."""
    plan = stage.plan
    behaviour = data.behaviour_of(plan, part.scan, maker, stage.model)
    # Two of one weights are two models: the sketched one is tapped, and must not score for the other.
    role = f"behaviour {maker}"
    if behaviour == "model" and role not in models:
        models[role] = stage.load(maker)
    part = replace(
        part, behaviour=behaviour,
        behaviour_model=models[role] if behaviour == "model" else None,
    )  # fmt: skip
    # Later the policy has moved away from its rollouts on purpose: no reason to stop.
    check = "warn" if stage.number and plan.job.behaviour_check == "error" else plan.job.behaviour_check
    job = replace(
        job,
        columns=job.columns if part.groups.columns else None,  # what a command wrote has the names of records
        behaviour_check=check,
        stage=str(stage.number),
        notes={**plan.job.notes, "model": stage.model},
    )
    made = pipeline.sketch_part(
        models["policy"], part, job, stage.folder / "sketches" / part.name, progress=plan.progress
    )
    return {
        "files": [source.name for source in part.groups.sources], "behaviour": behaviour,
        "seconds": made.wall, "tokens": made.cost,
    }  # fmt: skip


def _followed(stage: Stage, names: Iterable[str]) -> tuple[list[SketchStore], Influence, dict[str, str]]:
    """The validation stores of some names and how they are compared; in later stages as `usable_stores` gives them."""
    stores = [SketchStore.open(stage.folder / "sketches" / f"valid-{name}") for name in names]
    try:
        return followed(stores, stage.plan.influence, later=stage.number > 0)
    except NothingToFollow as error:
        raise CropiError(
            f"stage {stage.number}: {error}, and no other set is left to select for: give other validation prompts, or "
            "an estimator that clips less"
        ) from None


def influence_all(stage: Stage) -> Result:
    """Score the training prompts against every validation set."""
    folder = stage.folder / "sketches"
    stores, given, lost = _followed(stage, stage.state.result(stage.number, "sketch")["valid"])  # type: ignore[index]
    warn_lost(lost, f"stage {stage.number}: ")
    scores = pipeline.score(training_store(folder), stores, given, stage.plan.select, checked=True)
    write_scores(stage.folder / SCORES, scores)
    return {"sets": scores.sets, "scored": int(scores.usable.sum())}


def select_best(stage: Stage) -> Result:
    """Choose the prompts, write them in every form that was asked for, and compare with the last selection."""
    plan, folder = stage.plan, stage.folder
    scores = read_scores(folder / SCORES)
    sketches = training_store(folder / "sketches") if plan.select.needs_sketches else None
    selection = select(scores, plan.select, sketches=sketches)
    source = data.source_of(plan, stage.state, stage.number)
    write_selection(folder / SELECTED, scores, selection)
    write_selected_records(folder / RECORDS, stage.files(source.train), scores, selection)
    ids = [scores.rows[i].id for i in selection.chosen]
    if plan.export is not None:
        export(
            _dataset(folder, plan),
            ids,
            trajectories=[folder / RECORDS],
            weights=selection.weights if plan.export.get("format") == "weights" else None,
            **plan.export,
        )
    plot_scores(folder / "scores.png", scores, selection)
    report_folder(folder, every_text=False, records=lambda store: _records(stage, source, store.path.name))
    usable, chosen = scores.table[scores.usable], scores.table[selection.chosen]
    rates = [row.pass_rate for row, ok in zip(scores.rows, scores.usable) if ok]
    last = read_selection(plan.stage_folder(stage.number - 1) / SELECTED) if stage.number else []
    return {
        "prompts": len(scores.rows), "usable": int(scores.usable.sum()), "selected": len(ids),
        "scores": {
            name: {"pool": float(usable[:, v].mean()), "selected": float(chosen[:, v].mean()),
                   "lowest": float(chosen[:, v].min()), "highest": float(chosen[:, v].max())}
            for v, name in enumerate(scores.sets)
        },
        "pass_rate": {
            "pool": sum(rates) / len(rates),
            "selected": sum(scores.rows[i].pass_rate for i in selection.chosen) / len(ids),
        },
        "kept_from_last": len(set(ids) & set(last)) if stage.number else None,
        "last": len(last),
        "sums": {name: sum_of(folder / name) for name in CHOSEN},
    }  # fmt: skip


def _records(stage: Stage, source: data.Source, name: str) -> Any:
    """The trajectories of one of the stage's stores."""
    if name in ("train", EARLIER):
        return stage.files(source.train)
    files = dict(zip(data.set_names(source.valid), source.valid, strict=True))
    path = files.get(name.removeprefix("valid-"))
    return None if path is None else stage.files([path])


def train(stage: Stage) -> Result:
    """Train on the selection, by the user's command or in this process."""
    plan, values, policy = stage.plan, stage.values(), stage.load(stage.model)
    other = _check_chosen(stage) or stage.state.checkpoint(stage.model) not in (None, policy.checkpoint)
    checkpoints = stage.folder / "trained" / CHECKPOINTS
    with writing(stage.folder):
        make_folder(stage.folder / "trained")
        # With --accept-changes: training would go on with what the old prompts or the old model have become.
        if other and plan.trainer == IN_PROCESS and is_there(checkpoints):
            shutil.rmtree(checkpoints)
    if other:  # once: an attempt that is cut short goes on from checkpoints of its own
        stage.state.accept(
            stage.number,
            "select",
            sums={name: sum_of(stage.folder / name) for name in CHOSEN},
            checkpoints={stage.model: policy.checkpoint},
        )
    if plan.trainer == IN_PROCESS:
        model = train_stage(
            plan.trl,
            _absolute(stage.model),
            Path(str(values["records"])),
            plan.steps,
            Path(str(values["out"])),
            tokens=make_tokenize(policy, plan.job).prompt,
            trust_remote_code=plan.trust_remote_code,
        )
    else:
        with writing(stage.folder):
            Path(str(values["rollouts"])).unlink(missing_ok=True)
        command = fill(plan.trainer, values, option="trainer")
        run_command("trainer", command, stage.folder / "train.log", [stage.lock], values)
        model = Path(fill(plan.trained_model, values, quote=False))
    if not is_file(model / "config.json") and base_of(str(model)) is None:
        raise CropiError(
            f"trainer: training ended well, but {model} holds no Hugging Face model (no config.json) and no "
            "adapter of PEFT (no adapter_config.json); save the new policy there, or say by trained_model where it is"
        )
    if plan.rescoring.asked and (base_of(str(model)) is None) != (base_of(stage.model) is None):
        raise CropiError(
            f"trainer: {model} and {stage.model} are not both adapters of PEFT: budget and passes keep sketches of "
            "earlier stages, and those of all weights cannot be compared with those of an adapter; give an adapter as "
            "model, with which the first stage begins, or leave budget and passes out"
        )
    _keep(model)
    name = _relative(model)
    made = {"model": name, "checkpoints": stage.checkpoints | {name: data.load(plan, name).checkpoint}}
    return made | read_training(stage.folder / "trained")


def collect(stage: Stage) -> Result:
    """Take over the new policy, and the rollouts that the trainer kept of it."""
    trained = stage.state.result(stage.number, "train")
    assert trained is not None
    result: Result = {"model": trained["model"]}
    if "rollouts" in stage.plan.trainer_uses:
        newer = stage.folder / "rollouts.jsonl"
        if not is_file(newer):
            raise CropiError(
                f"trainer: its command names {{rollouts}}, but wrote no such file ({newer.absolute()})"
            )
        _keep(newer)
        source = data.source_of(stage.plan, stage.state, stage.number)
        merged = stage.folder / "trajectories.jsonl"
        result |= data.refresh(stage.plan, stage.files, source.train, newer, merged)
        result["train"] = [str(merged)]
    return result


def _keep(path: Path) -> None:
    """Bring what a command wrote to the disk, before the state says that its step is done."""
    with writing(path):
        sync_all(path)


def _check_unchanged(stage: Stage, now: Mapping[str, str]) -> None:
    """Stored trajectories are read again at every stage; they must still be the same."""
    before = stage.state.latest("sketch", stage.number)
    renewed = stage.plan.rollouts_when == "every" or "rollouts" in stage.plan.trainer_uses
    if before is None or stage.plan.accept_changes or renewed:
        return
    for name, fingerprint in before["fingerprints"].items():
        if now.get(name) != fingerprint:
            raise CropiError(
                f"the trajectories {name!r} have changed since stage {before['stage']}: stages would not be "
                "comparable; put the old ones back, give another --out, or pass --accept-changes"
            )


def _check_chosen(stage: Stage) -> bool:
    """Whether the files of the chosen prompts are others than the stage has written, which has to be accepted."""
    written = (stage.state.result(stage.number, "select") or {}).get("sums", {})
    for name, want in written.items():
        if sum_of(stage.folder / name) != want:
            if stage.plan.accept_changes:
                return True
            raise CropiError(
                f"{stage.folder / name} is not the file that the stage wrote: other prompts would be trained on than "
                "were chosen; put the old one back, or pass --accept-changes"
            )
    if stage.plan.export is not None and not stage.plan.accept_changes:
        check_sums(_dataset(stage.folder, stage.plan))
    return False


def _check_makers(stage: Stage, source: data.Source, checked: Checked) -> None:
    """The next stages take ratios to the model that made the trajectories: training must not write over it."""
    plan = stage.plan
    if plan.trainer == IN_PROCESS:
        return
    new = Path(fill(plan.trained_model, stage.values(), quote=False))
    renewed = (plan.rollouts or "") if plan.rollouts_when == "every" else ""
    for name, maker, parts in (
        ("train", source.train_maker, [checked.train]), ("valid", source.valid_maker, checked.valid),
    ):  # fmt: skip
        if f"{{{name}}}" in renewed or new.resolve() != Path(maker).resolve():
            continue
        sources = [
            behaviour_source(plan.job.behaviour, part.scan, plan.job.estimator.ratio, of_another=True)
            for part in parts
        ]
        if "model" in sources:
            raise CropiError(
                f"trained_model: training would write over {maker}, which made the trajectories of {name}, and the "
                "next stages need its log-probs: have the trainer write elsewhere ({out}), or store 'logprobs'"
            )


def _dataset(folder: Path, plan: Plan) -> Path:
    form = (plan.export or {}).get("format", "jsonl")
    return folder / f"dataset.{FILES.get(form, form)}"  # trainers tell the format by the ending


def _absolute(model: str) -> str:
    return str(Path(model).absolute()) if is_there(Path(model)) else model


def _relative(path: Path) -> str:
    """Relative to where we are, as the other paths of the plan, so that the whole folder may be moved."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
