"""The options of a sketching job, and what is made of them alone."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cropi.data.readers import PromptGroups, read
from cropi.data.scan import Scan
from cropi.errors import CropiError, warn
from cropi.files import is_file
from cropi.gradient.estimators import ESTIMATORS, Estimator, make_estimator
from cropi.gradient.subset import Subset
from cropi.gradient.template import prints_date, template_text
from cropi.gradient.tokenize import Tokenize
from cropi.grouping import Grouping
from cropi.model.moments import file_of
from cropi.model.policy import Policy
from cropi.option_fields import names_of
from cropi.options import Gradient, Running, Sketch, Sketching, Storing, Tokens
from cropi.store.manifest import MANIFEST, read_manifest
from cropi_kernels import SketchSpec


class DatedTemplate(UserWarning):
    """The chat template prints the date of the day it is rendered on."""


class EqualModels(UserWarning):
    """The model that made the responses has the policy's own weights."""


@dataclass(frozen=True)
class SketchJob(Grouping, Tokens, Running, Storing):
    """Everything that a job depends on besides the model; :func:`make_job` makes one from options.

    Attributes:
        trajectories: files, or anything else that :func:`cropi.data.readers.read` takes.
        out: the store's folder; None keeps the sketches in memory.
        spec: what a sketch is.
        exclude: patterns of parameter names to leave out.
        estimator: the weight of every token.
        behaviour: "auto", "file", "current" or "model".
        behaviour_model: for "model": the model that made the rollouts (a module or a Policy).
        temperature: of the rollouts; None: each record's own, else 1.
        responses: at most so many of each prompt, drawn (:mod:`cropi.gradient.subset`); None: all.
        token_share: of each response's scored tokens, likewise; None: all.
        optimizer_state: what :func:`cropi.model.moments.read_moments` takes: these are validation prompts, and their
            gradients are scaled as a step of that optimiser scales the training prompts'.
        noise: a draw of every gradient's noise is sketched in its place (:mod:`cropi.gradient.noise`).
        set: validation set of records that carry none.
        tools, chat_template_kwargs: what the chat template gets for records that have none of their own.
        shard: ``(i, n)``: only share i of n, counted from 1; None: all prompts.
        shard_rows: sketches that are written at once; what a kill may cost.
        notes: kept in the manifest, never compared.

    The other fields are those of :class:`cropi.grouping.Grouping`, :class:`cropi.options.Tokens`,
    :class:`~cropi.options.Running` and :class:`~cropi.options.Storing`.
    """

    trajectories: Any
    out: str | Path | None
    spec: SketchSpec = field(default_factory=SketchSpec)
    exclude: Sequence[str] = ()
    estimator: Estimator = ESTIMATORS["cropi"]
    behaviour: str = "auto"
    behaviour_model: Any = None
    temperature: float | None = None
    responses: int | None = None
    token_share: float | None = None
    optimizer_state: Any = None
    noise: bool = False
    set: str | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    shard: tuple[int, int] | None = None
    shard_rows: int = 64
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard_rows < 1:
            raise CropiError(f"shard_rows must be at least 1, got {self.shard_rows}")
        self.subset.check(self.estimator)
        if isinstance(self.optimizer_state, (str, Path)):
            file_of(Path(self.optimizer_state))
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise CropiError(
                f"shard {self.shard[0]}/{self.shard[1]}: give i/n with 1 <= i <= n; shares are counted from 1"
            )

    def read(self, source: Any = None, name: str = "records") -> PromptGroups:
        """The prompt groups of a source, by these options; None: of :attr:`trajectories`. ``name``: for messages."""
        rewards = bool(self.estimator.centred)
        groups = read(
            self.trajectories if source is None else source, skip_bad=self.skip_bad, columns=self.columns, name=name,
            rewards=rewards,
        )  # fmt: skip
        # Groups that somebody read for the other kind of estimator are read anew, and what does not fit it is an error.
        return groups if groups.rewards is rewards else replace(groups, rewards=rewards, bad=[], scan=None)

    @property
    def subset(self) -> Subset:
        """What is sketched of each prompt; every stage draws anew."""
        return Subset(self.responses, self.token_share, self.noise, self.stage)

    @property
    def zeros(self) -> bool:
        """Whether a gradient that is rounding and nothing else is looked for; a draw of noise is as small as it is."""
        return self.zero_check and not self.noise

    @property
    def row_size(self) -> int:
        """Numbers of a row of the store; with ``layer_groups`` at most."""
        return self.spec.dim * self.most_groups

    @property
    def names(self) -> list[str]:
        """What messages and notes call the trajectories."""
        held = self.trajectories
        if isinstance(held, (str, Path)):
            return [str(held)]
        if isinstance(held, PromptGroups):
            return [name for source in held.sources for name in source.files]
        if isinstance(held, Sequence) and all(isinstance(part, (str, Path)) for part in held):
            return [str(part) for part in held]
        return [str(getattr(held, "names", type(held).__name__))]


def spec_of(options: Sketch) -> SketchSpec:
    """The spec that some options name.

    Raises:
        CropiError: a value that a sketch does not take.
    """
    try:
        return SketchSpec(**{name: getattr(options, name) for name in names_of(Sketch)})
    except ValueError as error:
        raise CropiError(str(error)) from None


def estimator_of(options: Gradient) -> Estimator:
    """The estimator that some options name."""
    return make_estimator(
        options.estimator,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        cap=options.cap,
        eps=options.eps,
        constant=options.length_constant,
    )


def make_job(
    options: Sketching,
    trajectories: Any,
    out: str | Path | None,
    *,
    set: str | None = None,
    behaviour_model: Any = None,
    notes: Mapping[str, Any] | None = None,
    noise: bool = False,
) -> SketchJob:
    """The job of some options. A behaviour model that is given is used, unless ``behaviour`` names another source."""
    shared = {name: getattr(options, name) for name in names_of(Grouping, Tokens, Running, Storing)}
    behaviour = "model" if behaviour_model is not None and options.behaviour == "auto" else options.behaviour
    return SketchJob(
        trajectories, out, spec=spec_of(options), exclude=options.exclude, estimator=estimator_of(options),
        behaviour=behaviour, behaviour_model=behaviour_model, temperature=options.temperature, set=set,
        optimizer_state=options.optimizer_state, responses=options.responses, token_share=options.token_share,
        noise=noise,
        notes=dict(notes or {}), **shared,
    )  # fmt: skip


def make_tokenize(policy: Policy, job: SketchJob) -> Tokenize:
    """The tokenisation rules for this model.

    Raises:
        CropiError: an option does not fit the model or the tokenizer.
    """
    return Tokenize(
        policy.tokenizer, policy.vocabulary, policy.context, chat_template=job.chat_template, eos=job.eos,
        max_length=job.max_length, too_long=job.too_long, temperature=job.temperature,
        ends=policy.ends, template_date=job.template_date, tools=job.tools,
        chat_template_kwargs=job.chat_template_kwargs,
    )  # fmt: skip


def with_date(
    policy: Policy, job: SketchJob, scan: Scan, stores: Sequence[str | Path | None] = ()
) -> SketchJob:
    """The job with the date that the chat template prints: as given, as in a store that is there, or today's.

    Without it a store that is continued on another day, the stores that are compared with it, and the stages of a
    curriculum would hold prompts of two kinds.

    Args:
        policy: has the tokenizer.
        job: the options.
        scan: what is in the trajectories.
        stores: folders of stores that belong together with the job's own, which is asked first; the first date that one
            of them names is taken.
    """
    if job.template_date or policy.tokenizer is None or scan.with_prompt_ids == scan.prompts:
        return job
    if not prints_date(policy.tokenizer, template_text(job.chat_template)):
        return job
    date = None
    for folder in (job.out, *stores):
        if date is None and folder is not None and is_file(Path(folder) / MANIFEST):
            date = read_manifest(Path(folder))["tokens"].get("template_date")
    if date is None:
        date = datetime.date.today().isoformat()
        warn(
            f"the chat template prints the date, and policies that were sampled on another day saw another prompt; "
            f"{date} is taken for all: give the day of the rollouts with --template-date, or store prompt_ids",
            DatedTemplate,
        )
    return replace(job, template_date=date)
