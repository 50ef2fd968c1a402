"""The options of a sketching job, and the manifest that they make."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from cropi.data.readers import read_trajectories
from cropi.data.rewards import no_gradient_reason
from cropi.data.scan import Scan
from cropi.errors import CropiError, RecordError, optional
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.estimators import ESTIMATORS, Estimator
from cropi.gradient.template import prints_date, template_text
from cropi.gradient.tokenize import Tokenize, TooLong
from cropi.model.policy import Policy
from cropi.store.manifest import MANIFEST, read_manifest
from cropi.store.memory import MemoryStore
from cropi.store.store import SketchStore
from cropi_kernels import Coverage, SketchSpec


class DatedTemplate(UserWarning):
    """The chat template prints the date of the day it is rendered on."""


@dataclass
class SketchJob:
    """Everything that a job depends on besides the model. The fields are the options of ``cropi sketch``.

    ``out`` is the store's folder; None keeps the sketches in memory."""

    trajectories: Sequence[str | Path]
    out: str | Path | None
    spec: SketchSpec = field(default_factory=SketchSpec)
    exclude: Sequence[str] = ()
    estimator: Estimator = ESTIMATORS["cropi"]
    behaviour: str = "auto"
    behaviour_model: Any = None
    temperature: float | None = None
    chat_template: str = "auto"
    template_date: str | None = None
    eos: bool = True
    max_length: int | None = None
    too_long: str = "error"
    layout: str = "auto"
    tokens_per_batch: int = 1024
    dtype: str = "float32"
    stage: str = "0"
    set: str | None = None
    limit: int | None = None
    skip_bad: bool = False
    shard_rows: int = 64
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("tokens_per_batch", "shard_rows", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CropiError(f"{name} must be at least 1, got {value}")


def make_tokenize(policy: Policy, job: SketchJob, scan: Scan) -> Tokenize:
    """The tokenisation rules for this model.

    Raises:
        RecordError: a stored token id is beyond the vocabulary.
        CropiError: an option does not fit the model or the tokenizer.
    """
    if scan.largest_id[0] >= policy.vocabulary and not job.skip_bad:
        raise RecordError(
            scan.largest_id[1],
            f"token id {scan.largest_id[0]} is beyond the model's vocabulary of {policy.vocabulary}",
            "use the model that made the trajectories, or pass --skip-bad",
        )
    return Tokenize(
        policy.tokenizer, policy.vocabulary, policy.context, chat_template=job.chat_template, eos=job.eos,
        max_length=job.max_length, too_long=job.too_long, temperature=job.temperature,
        ends=_ends(policy.model), template_date=job.template_date,
    )  # fmt: skip


def with_date(policy: Policy, job: SketchJob, scan: Scan) -> SketchJob:
    """The job with the date that the chat template prints: as given, as in the store that is continued, or today's.

    Without it a store that is continued on another day would hold prompts of two kinds.
    """
    if job.template_date or policy.tokenizer is None or scan.with_prompt_ids == scan.prompts:
        return job
    if not prints_date(policy.tokenizer, template_text(job.chat_template)):
        return job
    date = None
    if job.out is not None and (Path(job.out) / MANIFEST).is_file():
        date = read_manifest(Path(job.out))["tokens"].get("template_date")
    if date is None:
        date = datetime.date.today().isoformat()
        warnings.warn(
            f"the chat template prints the date, and policies that were sampled on another day saw another prompt; "
            f"{date} is taken for all: give the day of the rollouts with --template-date, or store prompt_ids",
            DatedTemplate,
            stacklevel=3,
        )
    return replace(job, template_date=date)


def _ends(model: Any) -> tuple[int, ...]:
    """The tokens at which the model stops to generate."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(ends) if isinstance(ends, (list, tuple)) else () if ends is None else (int(ends),)


def _text_rules(policy: Policy, job: SketchJob, scan: Scan | None) -> dict[str, Any]:
    """What the tokens of text depend on beyond the options; nothing where all records hold token ids."""
    made: dict[str, Any] = {}
    if scan is None or policy.tokenizer is None:
        return made
    if job.template_date and scan.with_prompt_ids < scan.prompts:
        made["template_date"] = job.template_date
    end = make_tokenize(policy, replace(job, skip_bad=True), scan).end if job.eos else None
    if scan.with_ids < scan.prompts and end is not None and end != policy.tokenizer.eos_token_id:
        made["end"] = end
    return made


def check_tokens(tokens: Tokenize, job: SketchJob, scan: Scan, progress: bool = False) -> None:
    """Tokenise every prompt that has a gradient once, so that one that does not fit shows before any compute.

    Raises:
        RecordError: as :meth:`Tokenize.__call__`.
    """
    if scan.tokens_checked or job.skip_bad:
        return
    bar = optional("tqdm.auto").tqdm
    groups = islice(read_trajectories(job.trajectories), job.limit)
    total = min(scan.prompts, job.limit or scan.prompts)
    for group in bar(groups, "checking", total, unit="prompt", disable=not progress, delay=2, leave=False):
        if no_gradient_reason(group.rewards) is None:
            with suppress(TooLong):
                tokens(group)
    scan.tokens_checked = True


def make_manifest(
    policy: Policy,
    job: SketchJob,
    scan: Scan | None,
    behaviour: Behaviour,
    coverage: Coverage,
    *,
    sha256: bool = False,
) -> dict[str, Any]:
    """What the store's rows will depend on; ``notes`` apart, a run with other values may not continue the store.

    Args:
        policy: the current policy.
        job: the options.
        scan: what the files hold; None for prompts that come from no file.
        behaviour: where the behaviour log-probs come from.
        coverage: what is sketched of the model.
        sha256: name models by the hash of earlier releases.
    """

    def named(policy: Policy) -> dict[str, Any]:
        return policy.sha256_fingerprint() if sha256 else policy.fingerprint

    manifest: dict[str, Any] = {
        "spec": job.spec.to_dict(),
        "spec_fingerprint": job.spec.fingerprint(),
        "hash_version": job.spec.version,
        "stage": job.stage,
        "model": named(policy),
        "parameters": {
            "covered": coverage.covered,
            "total": coverage.total,
            "excluded": sorted(coverage.excluded),
        },
        "tokenizer": policy.tokenizer_fingerprint,
        "trajectories": None if scan is None else scan.fingerprint,
        "set": job.set,
        "estimator": job.estimator.to_dict(),
        "behaviour": {
            "source": behaviour.source,
            "model": None if behaviour.model is None else named(behaviour.model.policy),
        },
        "temperature": job.temperature,
        "tokens": {name: getattr(job, name) for name in ("eos", "max_length", "too_long")}
        | {"chat_template": template_text(job.chat_template)}
        | _text_rules(policy, job, scan),
        "dtype": job.dtype,
    }
    if scan is not None:
        manifest["prompts"] = min(scan.prompts, job.limit or scan.prompts)
    notes = {"trajectories": [str(path) for path in job.trajectories], **job.notes}
    return manifest | {"notes": notes}


def open_store(policy: Policy, job: SketchJob, behaviour: Behaviour, scan: Scan | None = None) -> SketchStore:
    """The store that a job fills: ``job.out``, continued if it is there, or one in memory.

    Args:
        policy: the current policy; what cannot be sketched of it shows here, before anything is written.
        job: the options.
        behaviour: where the behaviour log-probs come from.
        scan: what the files hold; None for prompts that come from no file.

    Raises:
        UncoveredParameterError: a trainable parameter cannot be sketched.
        CropiError: the folder cannot be written, or its store was made with other settings.
    """
    sketcher = policy.sketcher(job.spec, tuple(job.exclude))
    with sketcher:
        sketcher.check_model()

    def manifest(sha256: bool = False) -> dict[str, Any]:
        return make_manifest(policy, job, scan, behaviour, sketcher.coverage, sha256=sha256)

    if job.out is None:
        return MemoryStore(manifest())
    return SketchStore.create(
        job.out, manifest(), shard_rows=job.shard_rows, earlier=lambda: manifest(sha256=True)
    )
