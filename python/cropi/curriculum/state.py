"""Which steps are finished: one small JSON file, replaced whole, so that a crash at any instant leaves it valid."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from cropi.atomic import write_atomic
from cropi.checked import fits
from cropi.curriculum.plan import IN_PROCESS, Plan
from cropi.errors import CropiError, shown
from cropi.files import entries, is_there, writing
from cropi.form import check_form
from cropi.report.forms import BESIDE, TRAINED, is_amount
from cropi.sealed import read_sealed, sealed
from cropi.store.differences import first_difference
from cropi.trainers.trl.checkpoints import newest_whole
from cropi.trainers.trl.in_process import CHECKPOINTS, STATE

FORMAT = 1
NAME = "state.json"
REMEDY = "put the file back, or start again with another --out"
_STORE = {"behaviour": str, "seconds?": is_amount, "tokens?": is_amount}
# What each step has found out.
RESULTS: dict[str, Any] = {
    "rollouts": {"maker": str, "train?": [str], "valid?": [str], "checkpoints?": {str: str}},
    "sketch": {
        "prompts": int, "usable": int, "without_gradient": dict, "weights": str, "anew?": int, "left?": int,
        "train": _STORE, "valid": {str: _STORE}, "fingerprints": {str: str}, "checkpoints?": {str: str},
    },
    "influence": {"sets": [str], "scored": int},
    "select": {
        "prompts": int, "selected": int, "scores": {str: BESIDE}, "pass_rate": BESIDE,
        "kept_from_last": int | None, "last": int, "sums?": {str: str}, "checkpoints?": {str: str},
    },
    "train": {"model": str, "training?": TRAINED, "checkpoints?": {str: str}},
    "collect": {"model": str, "train?": [str], "replaced?": int},
}  # fmt: skip
_STEP = {
    "stage": lambda stage: fits(stage, int) and stage >= 0,
    "step": lambda step: fits(step, str) and step in RESULTS,
    "attempts": int,
}
_FORM = {"settings": {str: dict}, "done": [_STEP | {"seconds": is_amount}], "started?": (None, _STEP)}


def read_state(path: Path) -> dict[str, Any]:
    """What stands in the file, but for the steps' own results.

    Raises:
        CropiError: it is damaged, or of a newer release.
    """
    return read_sealed(path, _FORM, REMEDY, version=("format", "format", FORMAT))


class State:
    """The finished steps of a curriculum, in order, each with its results.

    ``done`` holds one object per step: ``stage``, ``step``, ``seconds`` (of the attempt that finished),
    ``attempts`` and the step's own results.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path = path
        self.data = data

    @classmethod
    def open(cls, plan: Plan) -> State:
        """Read the state of ``plan.out``, or begin one.

        Raises:
            CropiError: it is damaged, of a newer release, or a finished step was done under other settings.
        """
        path, settings = plan.out / NAME, json.loads(json.dumps(plan.settings()))
        if not is_there(path):
            # Beside the lock there may be a temporary file of a run that was killed right here.
            if any(not held.name.startswith(".") for held in entries(plan.out)):
                raise CropiError(f"out: {plan.out} is not empty and holds no {NAME}; give a new folder")
            state = cls(path, {"format": FORMAT, "settings": settings, "done": [], "started": None})
            state.write()  # before anything else is written, by which the folder would be refused the next time
            return state
        state = cls(path, read_state(path))
        for i, entry in enumerate(state.data["done"]):
            check_form(entry, RESULTS[entry["step"]], f"{path} is damaged", REMEDY, f"done[{i}]")
        state._check_settings(plan, settings)
        return state

    def _check_settings(self, plan: Plan, wanted: dict[str, Any]) -> None:
        """A setting may change as long as no finished step has used it; a trainer's command can so be mended."""
        for step, values in wanted.items():
            used = [entry for entry in self.data["done"] if entry["step"] == step]
            differs = first_difference(self.data["settings"].get(step), values, step)
            if used and differs and not plan.accept_changes:
                raise CropiError(
                    f"{self.path.parent} was begun with {differs.field} = {shown(differs.left)}, but now it is "
                    f"{shown(differs.right)}, and {len(used)} finished stage(s) used the first; put it back, give "
                    "another --out, or pass --accept-changes to use the new value from here on"
                )
        last = max((entry["stage"] for entry in self.data["done"]), default=0)
        if last >= plan.stages:
            raise CropiError(
                f"stages is {plan.stages}, but {self.path.parent} has reached stage {last} (the first is 0); "
                f"give at least {last + 1}"
            )
        self._check_training(plan, wanted)  # last, since it may remove checkpoints
        self.data["settings"] = wanted

    def _check_training(self, plan: Plan, wanted: dict[str, Any]) -> None:
        """Training in this process goes on from its checkpoints, with the learning rate and the steps that are in them:
        it cannot change half way. A command's training is its own."""
        started, held = self.data["started"] or {}, self.data["settings"].get("train", {})
        differs = first_difference(held, wanted["train"], "train")
        if not differs and started.get("stage") == 0:  # later stages train what the stage before has made
            models = [
                {"model": one.get("sketch", {}).get("model")} for one in (self.data["settings"], wanted)
            ]
            differs = first_difference(models[0], models[1], "sketch")
        if started.get("step") != "train" or held.get("trainer") != IN_PROCESS or not differs:
            return
        checkpoints = plan.stage_folder(started["stage"]) / "trained" / CHECKPOINTS
        if newest_whole(checkpoints, STATE) is None:
            return
        if not plan.accept_changes:
            raise CropiError(
                f"{checkpoints} holds half of a stage's training with {differs.field} = {shown(differs.left)}, but now "
                f"it is {shown(differs.right)}; put it back to go on, or pass --accept-changes to train this stage anew"
            )
        with writing(checkpoints):
            shutil.rmtree(checkpoints)

    def result(self, stage: int, step: str) -> dict[str, Any] | None:
        """The results of a finished step, or None while it is not finished."""
        for entry in self.data["done"]:
            if (entry["stage"], entry["step"]) == (stage, step):
                return dict(entry)
        return None

    def accept(self, stage: int, step: str, **changed: Any) -> None:
        """Write down with a finished step what ``--accept-changes`` has accepted since."""
        for entry in self.data["done"]:
            if (entry["stage"], entry["step"]) == (stage, step):
                entry.update(changed)
        self.write()

    def latest(self, step: str, before: int) -> dict[str, Any] | None:
        """The newest result of ``step`` in the stages below ``before``."""
        entries = self._below(step, before)
        return dict(entries[-1]) if entries else None

    def seconds(self, step: str, before: int) -> float:
        """Seconds of ``step`` in the newest stage below ``before`` in which one attempt did all of it, else in the
        newest one: of a training that was cut short, ``seconds`` are those of what was left."""
        entries = self._below(step, before)
        whole = [e for e in entries if e["attempts"] == 1] or entries
        return float(whole[-1]["seconds"]) if whole else 0.0

    def _below(self, step: str, before: int) -> list[dict[str, Any]]:
        return [e for e in self.data["done"] if e["step"] == step and e["stage"] < before]

    def checkpoint(self, model: str) -> str | None:
        """The checkpoint (:attr:`cropi.Policy.checkpoint`) of a model, when a finished step used or made it last."""
        known = [entry["checkpoints"] for entry in self.data["done"] if model in entry.get("checkpoints", ())]
        return str(known[-1][model]) if known else None

    def do(self, stage: int, step: str, work: Any) -> dict[str, Any]:
        """Do a step unless it is finished, and write down that it is; returns its result."""
        if finished := self.result(stage, step):
            return finished
        started = self.data["started"] or {}
        attempts = (
            started.get("attempts", 0) if (started.get("stage"), started.get("step")) == (stage, step) else 0
        )
        self.data["started"] = {"stage": stage, "step": step, "attempts": attempts + 1}
        self.write()
        begun = time.monotonic()
        result = work()
        entry = {
            "stage": stage, "step": step, "seconds": time.monotonic() - begun, "attempts": attempts + 1, **result
        }  # fmt: skip
        self.data["done"].append(entry)
        self.data["started"] = None
        self.write()
        return entry

    def write(self) -> None:
        """Replace the file."""
        write_atomic(self.path, json.dumps(sealed(self.data), indent=1, ensure_ascii=False) + "\n")
