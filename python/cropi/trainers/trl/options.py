"""What a user sets: how rollouts are recorded, and how the prompts of each stage are chosen."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cropi.checked import check_fields
from cropi.errors import CropiError, as_keywords
from cropi.files import is_there, meant
from cropi.gradient.estimators import Estimator, make_estimator
from cropi.option_fields import changed, keywords_of
from cropi.options import SOURCES, Checks, Choosing, Comparing, Rescoring
from cropi.trainers.dumps import auto
from cropi_kernels import SketchSpec

logger = logging.getLogger(__name__)

Paths = str | Path | Sequence[str | Path]
ON_NOTHING = ("auto", "error", "keep")


@dataclass(frozen=True)
class Recording:
    """How rollouts are recorded.

    Attributes:
        folder: where; None: ``<output_dir>/cropi/rollouts``.
        id_key: the dataset's column of stable prompt ids.
        set_column: validation set of a prompt of ``eval_dataset``; without the column, the key of the dataset in
            a dictionary of eval datasets, else "valid".
        columns: more columns that go into the record, where the dataset has them.
        logprobs: record each token's log-prob under the policy that sampled it, as the trainer computes it.
        text: record prompt and responses as text too (token ids always are).
    """

    folder: str | Path | None = None
    id_key: str = "id"
    set_column: str = "set"
    columns: Sequence[str] = ("task", "answer")
    logprobs: bool = True
    text: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "recording: ")


@dataclass(frozen=True)
class Live:
    """Selection by the sketches of the run's own training steps (docs/live.md): no scoring pass over the pool.

    Attributes:
        refresh: stages between two sketches of the validation prompts under the current policy.
        dim, bits, half_life: of :class:`cropi.Selector`.
        explore: of :class:`cropi.Selector`, and less than its 1: a stage draws many prompts at once, and explores by
            that alone (docs/live.md has figures).
        alike: expect of a prompt what the visits of those with like tokens have shown
            (:func:`cropi.ranking.alike.prompt_features`); False: every prompt is known by its own visits alone, as it
            is where all prompts say the same.
        within: of :class:`cropi.Selector`: compare visits with the validation mean of their own time, at most so many
            steps old; None: with the present one.
        opposed: what the advantages of prompts are multiplied by, whose earlier visits say that they point against the
            validation mean (mean and one standard deviation below 0): 1 leaves them, 0 takes their rewards' part out
            of the step (that of ``beta`` and of an entropy bonus stays).
        coupled: as in :class:`cropi_kernels.LiveSketcher`: take losses that are not a sum over prompts (experts' load
            balancing) by the tokens that their gradient passes through.
    """

    refresh: int = 1
    dim: int = 1024
    bits: int = 16
    half_life: float = 200.0
    explore: float = 0.5
    alike: bool = True
    within: int | None = None
    opposed: float = 1.0
    coupled: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "live: ")
        if self.refresh < 1:
            raise CropiError(f"live: refresh must be an integer of at least 1, got {self.refresh!r}")
        if not 0.0 <= self.opposed <= 1.0:
            raise CropiError(f"live: opposed must be a number from 0 to 1, got {self.opposed!r}")


@dataclass(frozen=True)
class Curriculum(Comparing, Choosing, Rescoring, Checks):
    """How the prompts of each stage are chosen. A stage is ``stage_steps`` optimizer steps.

    Attributes:
        stage_steps: optimizer steps between two selections (CROPI's 1.5B run: 200).
        fraction: share of the pool that a stage trains on, in (0, 1]; by keyword.
        train: files of stored trajectories of training prompts, as CROPI uses them, or of what a trainer or an engine
            writes; None: what this run records, so that stage 0 trains on the whole dataset.
        valid: such files of validation prompts; None: what this run records while it evaluates
            ``eval_dataset`` (done once before the first selection, if no evaluation has been recorded by then).
        valid_sets: names of validation sets that must be covered; None: whatever sets the trajectories hold.
        source: what wrote these files: one of :data:`cropi.options.SOURCES`.
        skip_bad: go on after a bad record of these files, and count it.
        use_recorded: let rollouts of this run replace those in the files ``train``, prompt by prompt.
        recording: how rollouts are recorded; None: not at all.
        folder: where selections, score tables and the log of stages go; None: ``<output_dir>/cropi``.
        spec: the sketch.
        estimator: "auto" (that of the loss that is trained: see :mod:`cropi.trainers.trl.losses`), a name
            (docs/method.md) or an :class:`Estimator`.
        exclude: patterns of parameter names that are left out of the sketch.
        behaviour: "file" (recorded log-probs), "current" (ratio 1), or "auto": the file's if every record has them.
        metric, mean, max_valid: as in :class:`cropi.options.Comparing`, by keyword.
        method, pool, and the others of :class:`cropi.options.Choosing`, by keyword.
        budget, passes: as in :class:`cropi.options.Rescoring`, by keyword: how much of a stage goes into scoring
            prompts anew. A stage's time is that of its steps, as the stage before took them.
        behaviour_check, verify, zero_check: as in :class:`cropi.options.Checks`, by keyword. Log-probs far from
            the policy stop stage 0 alone: later the policy has moved away on purpose.
        tools, chat_template_kwargs: what the chat template gets for prompts of files that are text and have none of
            their own; None: what the trainer gives to its own template.
        layout, tokens_per_batch: of the sketching passes.
        seed: of the stages' orders and of every draw; None: the trainer's.
        on_nothing: a stage after the first for which no prompt has a gradient, or fewer than a generation batch takes:
            "error", or "keep" the prompts of the stage before, with a warning. "auto": an error where rewards are
            equal; kept where gradients are zero though rewards differ, where what was recorded holds no prompt of a
            task that has a quota, or too few, and where no reward function scored any response, of which TRL warns too
            and trains on.
        live: choose by the sketches of the training steps themselves; None: by a scoring pass before every stage.
        keep_sketches: keep the sketches of every stage (``dim`` x 4 bytes a prompt) instead of removing them once the
            prompts are chosen.
    """

    stage_steps: int
    train: Paths | None = None
    valid: Paths | None = None
    valid_sets: Sequence[str] | None = None
    use_recorded: bool | None = None
    recording: Recording | None = field(default_factory=Recording)
    folder: str | Path | None = None
    spec: SketchSpec = field(default_factory=SketchSpec)
    estimator: str | Estimator = "auto"
    exclude: Sequence[str] = ()
    behaviour: str = "auto"
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    layout: str = "auto"
    tokens_per_batch: int = 1024
    seed: int | None = None
    on_nothing: str = "auto"
    keep_sketches: bool = False
    live: Live | None = None
    source: str = "auto"
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        self._check_live()
        for name in ("stage_steps", "max_valid", "tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CropiError(f"{name} must be an integer of at least 1, got {value!r}")
        super().__post_init__()
        for name, allowed in (
            ("on_nothing", ON_NOTHING), ("behaviour", ("auto", "file", "current")),
            ("layout", ("auto", "shared", "padded")), ("source", SOURCES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise CropiError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        self.estimator_used()
        for name in ("train", "valid"):
            files = self.files(name)
            if files is not None and not files:
                raise CropiError(
                    f"{name} is an empty list of files; give files, or None for what this run records"
                )
            for path in files or ():
                if not is_there(path):
                    raise CropiError(
                        f"{name}: there is no trajectory file {path}; {meant(path)}give the path of one"
                    )
            steps = name == "train" and self.live is not None  # whose own sketches choose
            if files is None and self.recording is None and not steps:
                raise CropiError(
                    f"{name} is None, so it comes from what this run records, but recording is None too; give files "
                    "of trajectories, or a Recording"
                )
        if self.use_recorded and self.recording is None:
            raise CropiError(
                "use_recorded needs rollouts of this run, but recording is None; give a Recording"
            )
        if self.use_recorded and self.per == "file" and len(self.files("train") or ()) > 1:
            raise CropiError(
                "use_recorded puts rollouts of this run and the records of the files in train together in one file, by "
                "which per='file' would choose as from one pool; set per='task', or leave use_recorded out"
            )

    def _check_live(self) -> None:
        if self.live is None:
            return
        if self.train is not None:
            raise CropiError(
                "train names files, but live chooses by the sketches of this run's own steps: leave train out, or live"
            )
        bounded = changed(self, Rescoring)
        if bounded:
            raise CropiError(
                f"{' and '.join(bounded)}: live makes no scoring pass over the training prompts that could be bounded: "
                "leave it out, or live"
            )
        other = [name for name in changed(self, Choosing, Comparing) if name not in ("fraction", "count")]
        if other:
            raise CropiError(
                f"{other[0]} is {getattr(self, other[0])!r}, but live chooses by cropi.Selector, which has no such "
                f"option: leave {', '.join(other)} out, or live"
            )

    @property
    def id_key(self) -> str:
        """The dataset's column of prompt ids."""
        return "id" if self.recording is None else self.recording.id_key

    def files(self, name: str) -> list[Path] | None:
        """The files ``train`` or ``valid``, or None for recorded rollouts."""
        value = getattr(self, name)
        if value is None:
            return None
        return [Path(path) for path in ([value] if isinstance(value, (str, Path)) else value)]

    def opened(self, name: str) -> Any:
        """What :func:`cropi.data.readers.read` takes: the files ``train`` or ``valid``, dumps converted; or None.

        Raises:
            CropiError: a file holds prompts alone, or is of no kind that is read.
        """
        files = self.files(name)
        if files is None:
            return None
        with as_keywords(KEYWORDS):
            return auto.opened(files, self.source, skip_bad=self.skip_bad, say=logger.info)

    def estimator_used(self) -> Estimator:
        """The estimator itself. "auto" is known with the trainer's configuration, and has a ratio until then."""
        if isinstance(self.estimator, Estimator):
            made = self.estimator
        else:
            try:
                made = make_estimator("grpo" if self.estimator == "auto" else self.estimator)
            except ValueError as error:
                raise CropiError(str(error)) from None
        if not made.centred:
            raise CropiError(
                f"the estimator {made.name!r} is for demonstrations, and this trainer learns from rewards: name "
                "another estimator"
            )
        return made

    def settings(self) -> dict[str, Any]:
        """What the order of prompts depends on, to be compared when a run is resumed."""
        # Of what the first release did not have, what is used: without it its runs can be resumed.
        first = ("metric", "mean", "max_valid", "fraction", "method", "pool")
        chosen = changed(self, Comparing, Choosing, Rescoring, Checks, always=first)
        chosen.pop("draws", None)  # the order of prompts does not depend on them
        return {
            "stage_steps": self.stage_steps, **chosen, "spec": self.spec.to_dict(),
            "estimator": self.estimator_used().to_dict(), "exclude": list(self.exclude), "behaviour": self.behaviour,
            "recorded": [self.train is None, self.valid is None, bool(self.use_recorded)],
            **({} if self.live is None else {"live": asdict(self.live)}),
        }  # fmt: skip


# How messages name the options of a curriculum; for those of the command line that it lacks, what serves instead.
KEYWORDS = keywords_of(Curriculum) | {
    "--chat-template": "the chat_template of the trainer's processing_class",
    "--columns": "columns of that name in the file",
    "--dtype": "a model that is loaded in it",
    "--max-length": "max_completion_length of the trainer's arguments",
    "--too-long": "skip_bad=True",
    "--temperature": "'temperature' in the records",
}
