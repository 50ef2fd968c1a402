"""The trajectories of a stage: which files, who made them, and whether they can be used at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cropi import pipeline
from cropi.curriculum.checks import check_stage, needs_logprobs
from cropi.curriculum.plan import IN_PROCESS, Plan
from cropi.curriculum.state import State
from cropi.data.formats import stem
from cropi.data.forms import parse_columns
from cropi.data.readers import PromptGroups
from cropi.data.scan import Scan
from cropi.data.writers import replace_records
from cropi.errors import CropiError
from cropi.gradient.behaviour import behaviour_source
from cropi.model.policy import Policy
from cropi.pipeline import Checked
from cropi.pipeline.lost import usable_sets, warn_lost, without_minus
from cropi.ranking.selection import check_resampled
from cropi.trainers.dumps import auto


class Files:
    """Opens a curriculum's files: trajectory records, and what trainers and engines write, which is converted once.

    Args:
        plan: what the files of ``train`` and ``valid`` are. What commands write is recognised by its content.
        say: takes a line about every dump.
    """

    def __init__(self, plan: Plan, say: Callable[[str], None] = lambda text: None) -> None:
        self.plan, self.say = plan, say
        self._held: dict[tuple[str, ...], Any] = {}

    def __call__(self, files: Sequence[str | Path]) -> PromptGroups:
        """The records of some files.

        Raises:
            CropiError: a file holds prompts alone, or is of no kind that is read.
        """
        plan, names = self.plan, tuple(map(str, files))
        given = set(names) <= {*plan.train, *plan.valid}
        job = plan.job if given else replace(plan.job, columns=None)
        if names not in self._held:
            columns = parse_columns(job.columns)
            reading = auto.Reading(columns=columns, tokenizer=lambda: load(plan, plan.model).tokenizer)
            self._held[names] = auto.opened(
                list(names), plan.source if given else auto.AUTO, skip_bad=plan.job.skip_bad, columns=columns,
                reading=reading, say=self.say,
            )  # fmt: skip
        return job.read(self._held[names])

    def keep(self, source: Source) -> None:
        """Forget files that a stage does not work on: what dumps were converted to is temporary files of their size."""
        wanted = {tuple(source.train), *((path,) for path in source.valid)}
        self._held = {names: held for names, held in self._held.items() if names in wanted}


def load(plan: Plan, model: str) -> Policy:
    """A policy of the curriculum; of a name nothing is loaded before it is asked for."""
    eos = plan.job.eos or plan.trainer == IN_PROCESS  # TRL ends its rollouts by one
    return Policy(
        model, dtype=plan.dtype, device=plan.device, eos=eos, trust_remote_code=plan.trust_remote_code,
        progress=plan.progress,
    )  # fmt: skip


@dataclass
class Source:
    """Trajectory files, and the policies that made them (models' names)."""

    train: list[str]
    valid: list[str]
    train_maker: str
    valid_maker: str


def source_of(plan: Plan, state: State, stage: int) -> Source:
    """The files that ``stage`` works on: the newest of what was given, rolled out, and collected while training."""
    first = plan.behaviour_model or plan.model
    source = Source(list(plan.train), list(plan.valid), first, first)
    for entry in state.data["done"]:
        if entry["stage"] > stage or (entry["stage"] == stage and entry["step"] == "collect"):
            break
        if entry["step"] == "rollouts":
            if "train" in entry:
                source.train, source.train_maker = entry["train"], entry["maker"]
            if "valid" in entry:
                source.valid, source.valid_maker = entry["valid"], entry["maker"]
        elif entry["step"] == "collect" and entry.get("train"):
            source.train = entry["train"]
    return source


def check(plan: Plan, files: Files, source: Source, stage: int, policy: Policy) -> Checked:
    """Read all files once, before the policy's weights are loaded.

    Raises:
        RecordError: a bad record, or one that does not fit the model.
        CropiError: no training prompt has a gradient, or a validation set has no prompt with one.
    """
    names = set_names(source.valid)
    valid = {name: files([path]) for name, path in zip(names, source.valid, strict=True)}
    sets, setup = plan.sets, plan.setup
    if stage and plan.renews("valid"):
        given = setup.influence
        (name,) = names  # the command's file
        groups, lost = usable_sets(valid[name], given.minus)
        warn_lost(lost, f"stage {stage}: ")
        if groups is not None:
            valid = {name: groups}
        if given.minus in lost:
            setup = replace(setup, influence=without_minus(given))
        sets = [one for one in sets if one not in lost]
    checked = pipeline.check(
        policy,
        files(source.train),
        valid,
        setup,
        sets=sets,
        option="sets",
        before=f"stage {stage}: ",
    )
    if (plan.export or {}).get("format") == "weights":
        check_resampled("export.format weights", setup.influence.draws, checked.alone)
    check_stage(plan, checked.train.scan, {str(part.set): part.scan for part in checked.valid}, stage)
    return replace(checked, valid=[replace(part, name=f"valid-{part.set}") for part in checked.valid])


def fingerprints(checked: Checked) -> dict[str, str]:
    """The content of the files: of the training files, and of every validation file."""
    parts = {str(part.set): part.scan.fingerprint for part in checked.valid}
    return {"train": checked.train.scan.fingerprint} | parts


def set_names(valid: Sequence[str]) -> list[str]:
    """The name of every validation file: its stem. It names the store, and the set of records that carry none.

    Raises:
        CropiError: two files of one name.
    """
    names = [stem(path) for path in valid]
    if len(set(names)) < len(names):
        raise CropiError(f"valid: two files of one name ({', '.join(names)}), but each names a store")
    return names


def behaviour_of(plan: Plan, scan: Scan, maker: str, model: str) -> str:
    """Where beta comes from in a stage: "auto" knows who made the trajectories, which a single job cannot.

    The file's log-probs if every record has them; the current policy (ratio 1) while it is itself the one that
    made them; from then on the model that made them, run again.

    Raises:
        CropiError: some records have log-probs, and others have none.
    """
    return behaviour_source(plan.job.behaviour, scan, plan.job.estimator.ratio, of_another=maker != model)


def refresh(plan: Plan, files: Files, stored: Sequence[str], newer: Path, out: Path) -> Mapping[str, int]:
    """Write ``stored`` to ``out`` with the records of ``newer`` in place of older ones with the same id.

    Raises:
        RecordError: a bad record in ``newer``.
        CropiError: a record has no log-probs, and the plan's estimator needs the ratio to the policy that made it.
    """
    counts = replace_records(files(stored), files([newer]), out)
    if needs_logprobs(plan) and counts.without_logprobs:
        raise CropiError(
            f"{newer}: rollouts of several policies are mixed, so every record needs 'logprobs' (with 'response_ids'), "
            f"but {counts.without_logprobs} have none; write them, or leave {{rollouts}} out of the trainer's command"
        )
    return {"replaced": counts.replaced, "unknown": counts.unknown}
