"""One selection: sketch the stored trajectories under the current policy, compare, choose.

The ranks share the prompts: every rank holds the whole model and sketches every ``world``-th prompt into a store of its
own; rank 0 reads all stores, scores and chooses, and every rank gets the ids.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cropi import pipeline
from cropi.data.scan import NothingToSelect, Scan, check_covered, check_pool, scan
from cropi.errors import CropiError, as_keywords
from cropi.files import entries, is_file, is_folder
from cropi.gradient.behaviour import behaviour_source
from cropi.model.policy import Policy
from cropi.option_fields import part_of
from cropi.options import Choosing, Comparing, Influence, Rescoring, Selecting
from cropi.pipeline import Setup
from cropi.pipeline.lost import TooFewLeft
from cropi.pipeline.rescoring import PLAN, Anew
from cropi.ranking.resampling import one_alone
from cropi.ranking.rule import fixed_groups
from cropi.ranking.selection import check_selecting
from cropi.ranking.selection_files import SELECTED
from cropi.sketching.job import SketchJob
from cropi.store.earlier import EARLIER
from cropi.store.rows import DEFAULT_SET
from cropi.trainers.trl.options import KEYWORDS, Curriculum
from cropi.trainers.trl.ranks import Ranks

logger = logging.getLogger(__name__)

TRAINING = "sketches-train-"  # what the stores of training prompts begin with
OTHERWISE = ", or set on_nothing='keep'"


@dataclass
class Chosen:
    """The result of one selection: prompt ids, best first, and figures for the log."""

    ids: list[str]
    figures: dict[str, Any] = field(default_factory=dict)


@as_keywords(KEYWORDS)
def choose_prompts(
    model: Any,
    tokenizer: Any,
    options: Curriculum,
    *,
    stage: int,
    folder: Path,
    train: Any,
    valid: Any,
    known: Callable[[str], bool],
    ranks: Ranks,
    seed: int,
    least: int = 0,
    later: bool = False,
    others: float = math.nan,
    progress: bool = True,
) -> Chosen:
    """Choose the prompts of a stage by the influence of their stored trajectories under ``model``.

    Args:
        model: the current policy, whole on every rank; its mode and the random state are left as they were.
        tokenizer: its tokenizer.
        options: see :class:`Curriculum`.
        stage: its number, which the sketches carry.
        folder: for this stage's files: ``selected.jsonl``, ``scores.parquet`` and, while it runs, the stores.
        train, valid: trajectories: what :func:`cropi.data.readers.read` takes.
        known: whether a training prompt is in the dataset; the others are left out.
        ranks: the processes that share the work.
        seed: of the draws.
        least: prompts that a generation batch takes: so many are chosen, where the fraction would choose fewer.
        later: as in :class:`cropi.pipeline.Setup`.
        others: seconds that the steps of a stage take, for ``options.budget``.
        progress: show bars (on rank 0).

    Raises:
        NothingToSelect: all rewards are equal, prompt by prompt.
        NothingToFollow: no validation set has a usable gradient, where ``later``.
        TooFewLeft: fewer than ``least`` prompts have one, though the rewards of so many differ; or whatever differs,
            where ``on_nothing`` is "keep"; or the prompts are not as many, or not of the tasks, as the options ask.
        CropiError: a validation set that nothing usable covers, no training prompt that the dataset knows, or bad
            records. Raised on every rank, before anything is sketched.
    """
    begun = time.monotonic()
    anew = _anew(options, stage, folder, others, begun)
    policy = Policy(model, tokenizer)
    setup = replace(setup_of(options, stage, seed), least=least, later=later, before=f"stage {stage}: ")
    # A run that was killed right here may have left stores of another policy, or of another number of ranks.
    ranks.agree(lambda: _clean(folder) if ranks.first else None)
    with evaluating(model):
        checked = ranks.agree(
            lambda: pipeline.check(
                policy,
                train,
                valid,
                setup,
                known=known,
                sets=options.valid_sets or (),
                ranks=ranks,
                before=setup.before,
                option="valid_sets",
                otherwise=OTHERWISE,
            )  # fmt: skip
        )
        try:
            chosen = pipeline.choose(
                policy, train, valid, setup, folder, ranks, checked=checked, progress=progress and ranks.first,
                anew=anew, store_at=lambda name, rank: folder / f"sketches-{name}-{rank:05d}",
            )  # fmt: skip
        except pipeline.NothingToFollow:  # training goes on
            if ranks.first and not options.keep_sketches:
                _clean(folder)
            raise
    if ranks.first and not options.keep_sketches:
        _clean(folder, but=() if anew is None else (TRAINING,))
    # Rewards differ, and gradients are zero all the same (every token is clipped): a training does not end there.
    if len(chosen) < least and (checked.usable >= least or options.on_nothing == "keep"):
        raise _too_few(int(chosen.scores.usable.sum()), len(chosen), checked.usable, least)
    if ranks.first:
        size = checked.usable if options.pool == "usable" else checked.prompts
        _warn_of_more(options, stage, size, len(chosen))
    figures = {
        "pool": checked.prompts, "usable": checked.usable, "unknown": checked.unknown, "selected": len(chosen),
        "seconds": time.monotonic() - begun, **({} if anew is None else {"anew": anew.scored, "left": anew.left}),
    }  # fmt: skip
    return Chosen(chosen.ids, figures)


def _anew(options: Curriculum, stage: int, folder: Path, others: float, begun: float) -> Anew | None:
    """Which prompts a stage that began at ``begun`` scores anew; None: all of them."""
    if not options.asked:
        return None
    last = last_scored(folder.parent, stage)
    return Anew(
        Rescoring(**part_of(options, Rescoring)), folder, folder / f"{TRAINING}{EARLIER}", last,
        [] if last is None else entries(last, f"{TRAINING}*"), others=others,
        spent=lambda: time.monotonic() - begun, say=logger.info,
    )  # fmt: skip


def _too_few(able: int, chosen: int, usable: int, least: int) -> TooFewLeft:
    """The error where a generation batch takes more prompts than are ``chosen`` of those that are ``able`` to be."""
    few = f"{able} of the {usable} prompts whose rewards differ have a gradient"
    if able >= least:
        few = (
            f"of {able} prompts with a gradient {chosen} can be chosen (min_score, dedup or a quota leaves the others "
            "out)"
        )
    return TooFewLeft(f"{few}, and one generation batch takes {least}")


def _warn_of_more(options: Curriculum, stage: int, size: int, chosen: int) -> None:
    """Say where more prompts are chosen than the options ask for, of a pool of ``size``."""
    if chosen > (options.count or math.floor(size * options.fraction + 1e-9)):
        logger.warning(
            "stage %d: fraction %g of %d prompts chooses fewer than one generation batch takes; %d are chosen",
            stage, options.fraction, size, chosen,
        )  # fmt: skip


def setup_of(options: Curriculum, stage: int, seed: int) -> Setup:
    """How the prompts of a stage are chosen."""
    job = SketchJob(
        (), None, spec=options.spec, exclude=options.exclude, estimator=options.estimator_used(),
        behaviour=options.behaviour, layout=options.layout, tokens_per_batch=options.tokens_per_batch, stage=str(stage),
        verify=options.verify, zero_check=options.zero_check, tools=options.tools, skip_bad=options.skip_bad,
        chat_template_kwargs=options.chat_template_kwargs,
        # Later the policy has moved away on purpose, and a run in the middle of its training is not stopped for it.
        behaviour_check="warn" if stage and options.behaviour_check == "error" else options.behaviour_check,
    )  # fmt: skip
    compare = Influence(**part_of(options, Comparing), valid_seed=seed)
    return Setup(job, compare, Selecting(**part_of(options, Choosing), select_seed=seed))


@as_keywords(KEYWORDS)
def check_files(
    options: Curriculum, opened: Mapping[str, Any], known: Callable[[str], bool]
) -> dict[str, Scan]:
    """Check the trajectory files of a curriculum before a model is loaded, as every selection will.

    Args:
        options: its options.
        opened: "train" and "valid", as :meth:`Curriculum.opened` gives them.
        known: whether a training prompt is in the dataset.

    Returns:
        What was read of those that are files, by "train" (its prompts in the dataset) and "valid".

    Raises:
        CropiError: what :func:`choose_prompts` would raise for these files in stage 0, or log-probs that the files lack
            and rollouts of this run, which are to replace some of theirs, have.
    """
    train, valid, estimator = opened["train"], opened["valid"], options.estimator_used()
    pool, scans = Scan(), {}
    if train is not None:
        scans["train"] = scan(
            train,
            skip_bad=options.skip_bad,
            on_group=lambda group: pool.add(group) if known(group.id) else None,
        )
    if valid is not None:
        scans["valid"] = scan(valid, skip_bad=options.skip_bad)
    for part in scans.values():
        behaviour_source(options.behaviour, part, estimator.ratio)
    choice, alone = Selecting(**part_of(options, Choosing)), ""
    if "valid" in scans:
        sets = options.valid_sets or ()
        sizes = check_covered({DEFAULT_SET: scans["valid"]}, sets, option="valid_sets", before="stage 0: ")
        alone = one_alone(sizes, options.max_valid)
    check_selecting(choice, draws=options.draws, alone=alone)
    if train is None:
        return scans
    names = ", ".join(map(str, options.files("train") or ()))
    try:
        check_pool(pool, names, known=True, before="stage 0: ", otherwise=OTHERWISE)
    except NothingToSelect:
        if options.on_nothing != "keep":
            raise
    else:
        check_selecting(choice, prompts=pool.prompts, usable=pool.usable, groups=fixed_groups(pool, choice))
    recorded = options.recording is not None and options.recording.logprobs
    stored = scans["train"].with_logprobs > 0
    if options.use_recorded and options.behaviour == "auto" and estimator.ratio and recorded != stored:
        raise CropiError(
            f"use_recorded mixes the rollouts in {names}, {'with' if stored else 'without'} log-probs, with "
            f"recorded ones {'with' if recorded else 'without'}: ratios of two kinds would be ranked against "
            f"each other; set behaviour='current'{'' if stored else ', or Recording(logprobs=False)'}"
        )
    return scans | {"train": pool}


def folder_of(stage: int) -> str:
    """The name of a stage's folder."""
    return f"stage-{stage:04d}"


def last_scored(folder: Path, before: int) -> Path | None:
    """The folder of the newest stage before one that sketched within a budget; one that kept its prompts did not."""
    made = (folder / folder_of(stage) for stage in reversed(range(before)))
    return next((stage for stage in made if is_file(stage / PLAN)), None)


def forget_plan(folder: Path) -> None:
    """Of a stage that keeps its prompts: an attempt before a resume may have left a plan, and the next stage would look
    for its sketches; a choice of too few prompts is not what is trained on."""
    for name in (PLAN, SELECTED):
        (folder / name).unlink(missing_ok=True)


def forget_sketches(folder: Path, wanted: Iterable[int], before: int) -> None:
    """Remove the sketches that stages before one have kept for those after them, but what its successor needs, and
    those of the ``wanted`` ones."""
    needed = [last_scored(folder, stage + 1) for stage in (before, *wanted)]
    for stage in range(before):
        if (one := folder / folder_of(stage)) not in needed:
            _clean(one)


def _clean(folder: Path, but: Sequence[str] = ()) -> None:
    for pattern in ("sketches-*-*", "train-*.jsonl", "valid-*.jsonl"):
        for left in entries(folder, pattern):
            if not left.name.startswith(tuple(but)):
                shutil.rmtree(left) if is_folder(left) else left.unlink()


@contextmanager
def own_randomness(device: torch.device, seed: int | None = None) -> Iterator[None]:
    """Give torch's random state back as it was, so that training goes on as if nothing had happened in between.

    Args:
        device: its state is kept too, if it is a CUDA device.
        seed: of the draws inside; None: go on from the present state.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A model in ``eval`` mode inside; its mode and the random state are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with own_randomness(next(model.parameters()).device):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
