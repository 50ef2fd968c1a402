"""Checks of a curriculum when it starts, before rollouts and before anything is sketched."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch

from cropi.commands import NAME
from cropi.curriculum.plan import IN_PROCESS, Plan
from cropi.data.export import FORMATS, check_export
from cropi.data.readers import PromptGroups
from cropi.data.scan import Scan, check_covered, scan
from cropi.errors import CropiError, did_you_mean, optional
from cropi.files import beyond_paths, check_room
from cropi.model.placing import DTYPES, check_device
from cropi.model.sources import base_of, locate
from cropi.options import BASELINES
from cropi.ranking.selection import check_resampled, check_selecting
from cropi.ranking.shares import how_many
from cropi.ranking.values import no_score
from cropi.store.codec import row_bytes
from cropi.trainers.trl.in_process import batch_of_options, check_options
from cropi_kernels import canonical_name


def check_plan(plan: Plan, opened: Callable[[Sequence[str]], PromptGroups]) -> None:
    """Everything that can be checked of a plan without a model.

    Args:
        plan: what is checked.
        opened: gives the records of some files (:class:`cropi.curriculum.data.Files`).

    Raises:
        CropiError, OSError, ModuleNotFoundError: names the option, its value and the remedy.
    """
    if plan.dtype not in ("auto", *DTYPES):
        raise CropiError(f"dtype must be one of auto, {', '.join(DTYPES)}, got {plan.dtype!r}")
    check_device("device", plan.device)
    for name in (plan.model, plan.behaviour_model):
        if name:
            locate(name)
    check_selecting(plan.select, draws=plan.influence.draws)
    if plan.select.per == "file" and "rollouts" in plan.trainer_uses and len(plan.train) > 1:
        raise CropiError(
            f"select: per is 'file', but the trainer's {{rollouts}} and the records of the {len(plan.train)} files of "
            "train are put together in one file, by which later stages would choose as from one pool; choose per "
            "'task', or leave {rollouts} out of the trainer's command"
        )
    if plan.trainer == IN_PROCESS:
        check_options(plan.trl)
    else:
        check_command("trainer", plan.trainer)
    if plan.export is not None:
        form, dataset = plan.export.get("format", "jsonl"), plan.export.get("dataset")
        if form not in FORMATS:
            raise CropiError(f"export.format must be one of {', '.join(FORMATS)}, got {form!r}")
        if form == "weights" and plan.select.method in BASELINES:
            raise CropiError(
                f"export.format is weights, and each choice is {no_score(plan.select.method)}; give another"
            )
        if form == "weights":
            check_resampled("export.format weights", plan.influence.draws)
        # Selected prompts are looked up and written after hours of sketching: that must go well then.
        groups = () if plan.rollouts else opened(plan.train)
        some = list(islice(groups, 200)) if dataset else []
        check_export(
            form, dataset=dataset, id_key=plan.export.get("id_key"), trajectories=() if dataset else groups,
            records=some, data_source=plan.export.get("data_source"),
        )  # fmt: skip
    if plan.rollouts:
        check_command("rollouts", plan.rollouts)
        # Without this command they are read at once, in the first step.
        if plan.train:
            scan(opened(plan.train))
        check_covered({path: scan(opened([path])) for path in plan.valid}, (), option="valid")
        check_names(plan)


def check_command(option: str, template: str) -> None:
    """Check that the shell can parse a command, and finds its first word.

    Raises:
        CropiError: a quote that is not closed, say, or a program that is not there.
    """
    text = NAME.sub(lambda match: f"{{{match[1]}}}" if match[1] else "name", template)
    try:
        parsed = subprocess.run(["/bin/sh", "-n", "-c", text], capture_output=True, text=True, check=False)
    except UnicodeEncodeError:
        raise CropiError(f"{option}: {beyond_paths(template)}") from None
    if parsed.returncode:
        raise CropiError(f"{option}: the shell cannot read {template!r}: {parsed.stderr.strip()}")
    try:
        words = shlex.split(template, comments=True)
    except ValueError:
        return  # the shell's own ways of quoting, which it could read
    while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
        del words[0]
    if not words or not re.fullmatch(r"[\w./+-]+", words[0]):
        return  # a name in braces, a variable, a bracket: known when it runs
    find = ["/bin/sh", "-c", 'command -v -- "$1"', "sh", words[0]]
    if subprocess.run(find, capture_output=True, check=False).returncode:
        raise CropiError(
            f"{option}: the shell finds no program {words[0]!r}, which the command begins with; install it, or "
            "give its path"
        )


def check_names(plan: Plan) -> None:
    """Check the patterns of ``exclude`` on the names of a model without weights.

    Raises:
        CropiError: a pattern matches no parameter.
    """
    source, options = locate(plan.model)
    if not plan.job.exclude or "gguf_file" in options or base_of(plan.model) is not None:
        return  # the layers of a .gguf file and the parameters of an adapter are known when it is loaded
    transformers = optional("transformers")
    config = transformers.AutoConfig.from_pretrained(
        source, trust_remote_code=plan.trust_remote_code, **options
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=plan.trust_remote_code
        )
    names = [canonical_name(name) for name, _ in model.named_parameters()]
    for pattern in plan.job.exclude:
        if not fnmatch.filter(names, pattern):
            raise CropiError(
                f"exclude: the pattern {pattern!r} matches no parameter of {plan.model} ({did_you_mean(pattern, names)}"
                f"one of them is {names[0]!r}); change it, or leave it out"
            )


def needs_logprobs(plan: Plan) -> bool:
    """Whether records of several policies need log-probs: the estimator has a ratio to the policy that made each."""
    return plan.job.estimator.ratio and plan.job.behaviour != "current"


def check_stage(plan: Plan, train: Scan, valid: Mapping[str, Scan], stage: int) -> None:
    """Check what depends on the number of prompts: the disk, and batches of the in-process trainer.

    Raises:
        CropiError: too little space for the sketches of the stages that are left; records without log-probs that the
            trainer's own rollouts cannot all replace; or a selection that is too small for one generation batch, on
            which TRL would silently train nothing.
    """
    rows = train.usable + sum(scan.usable for scan in valid.values())
    size = row_bytes(plan.job.store_dtype, plan.job.row_size) * rows
    left = plan.stages - stage
    check_room(plan.out, size * left, f"the sketches of {rows} prompts in {left} stages")
    given = plan.select
    pool = train.usable if given.pool == "usable" else train.prompts
    pool = min(pool, plan.job.limit or pool)
    replaces = "rollouts" in plan.trainer_uses and needs_logprobs(plan)
    if plan.trainer != IN_PROCESS and not replaces:
        return
    chosen = given.count or how_many(given.fraction, pool)
    # Where all of them may be chosen, the trainer's own rollouts may bring the log-probs.
    if replaces and chosen < (bare := train.prompts - train.with_logprobs):
        raise CropiError(
            f"stage {stage}: the trainer's {{rollouts}} replace the records of at most {chosen} prompts, and the other "
            f"rollouts are of an earlier policy, so that they need 'logprobs' (with 'response_ids'), but {bare} of "
            f"{train.prompts} records have none (the first {train.without_logprobs}); write them, or leave "
            "{rollouts} out of the trainer's command"
        )
    if plan.trainer != IN_PROCESS:
        return
    batch = batch_of_options(plan.trl)
    if chosen < batch:
        raise CropiError(
            f"stage {stage}: {chosen} of {pool} prompts are selected, but one generation batch takes {batch} different "
            "ones (generation_batch_size / num_generations in trl.args); raise fraction or count, give more "
            "trajectories, or make the batch smaller"
        )
