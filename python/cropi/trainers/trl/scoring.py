"""One selection: sketch the stored trajectories under the current policy, compare, choose.

The ranks share the prompts: every rank holds the whole model and sketches every ``world``-th prompt into a store of its
own; rank 0 reads all stores, scores and chooses, and every rank gets the ids.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cropi.data.readers import read_trajectories
from cropi.data.records import PromptGroup
from cropi.data.rewards import no_gradient_reason
from cropi.data.scan import NothingToSelect, Scan, check_covered, scan
from cropi.errors import CropiError
from cropi.files import replacing
from cropi.gradient.behaviour import behaviour_source
from cropi.model.policy import Policy
from cropi.ranking.influence import DEFAULT_SET, influence, write_scores
from cropi.ranking.selection import select, write_selection
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.store.store import SketchStore
from cropi.trainers.trl.options import Curriculum
from cropi.trainers.trl.ranks import Ranks


@dataclass
class Chosen:
    """The result of one selection: prompt ids, best first, and figures for the log."""

    ids: list[str]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """The trajectories that one rank sketches: a file, and the number of records in it."""

    path: Path
    count: int
    behaviour: str


def choose_prompts(
    model: Any,
    tokenizer: Any,
    options: Curriculum,
    *,
    stage: int,
    folder: Path,
    train: Sequence[Path],
    valid: Sequence[Path],
    known: Callable[[str], bool],
    ranks: Ranks,
    seed: int,
    progress: bool = True,
) -> Chosen:
    """Choose the prompts of a stage by the influence of their stored trajectories under ``model``.

    Args:
        model: the current policy, whole on every rank; its mode and the random state are left as they were.
        tokenizer: its tokenizer.
        options: see :class:`Curriculum`.
        stage: its number, which the sketches carry.
        folder: for this stage's files: ``selected.jsonl``, ``scores.parquet`` and, while it runs, the stores.
        train, valid: files of trajectories.
        known: whether a training prompt is in the dataset; the others are left out.
        ranks: the processes that share the work.
        seed: of the draws.
        progress: show bars (on rank 0).

    Raises:
        NothingToSelect: all rewards are equal, prompt by prompt.
        CropiError: a validation set that nothing usable covers, no training prompt that the dataset knows, or bad
            records. Raised on every rank, before anything is sketched.
    """
    begun = time.monotonic()
    estimator = options.estimator_used()

    def prepare() -> tuple[Share, Share, dict[str, Any]]:
        scans = [scan(files) for files in (train, valid)]
        check_valid(scans[1], options.valid_sets, stage)
        mine, pool = _share(train, folder / f"train-{ranks.rank:05d}.jsonl", ranks, known)
        check_pool(pool, train, stage)
        theirs, _ = _share(valid, folder / f"valid-{ranks.rank:05d}.jsonl", ranks, lambda name: True)
        sources = [behaviour_source(options.behaviour, found, estimator.ratio) for found in scans]
        return Share(mine[0], mine[1], sources[0]), Share(theirs[0], theirs[1], sources[1]), pool

    # A run that was killed right here may have left stores of another policy, or of another number of ranks.
    ranks.agree(lambda: _clean(folder) if ranks.first else None)
    train_share, valid_share, pool = ranks.agree(prepare)

    policy = Policy(model, tokenizer)

    def compute() -> None:
        for name, share in (("train", train_share), ("valid", valid_share)):
            if share.count:
                job = SketchJob(
                    trajectories=[share.path], out=folder / f"sketches-{name}-{ranks.rank:05d}", spec=options.spec,
                    exclude=options.exclude, estimator=estimator, behaviour=share.behaviour, layout=options.layout,
                    tokens_per_batch=options.tokens_per_batch, stage=str(stage),
                )  # fmt: skip
                if sketch(policy, job, progress=progress and ranks.first).interrupted:
                    raise KeyboardInterrupt

    with _evaluating(model):
        ranks.agree(compute)

    chosen = ranks.agree(lambda: _select(options, folder, seed) if ranks.first else None)
    result = Chosen(ranks.share(chosen))
    ranks.barrier()
    if ranks.first and not options.keep_sketches:
        _clean(folder)
    result.figures = {
        "pool": pool["prompts"], "usable": pool["usable"], "unknown": pool["unknown"], "selected": len(result.ids),
        "seconds": time.monotonic() - begun,
    }  # fmt: skip
    return result


def check_files(options: Curriculum, known: Callable[[str], bool]) -> dict[str, Scan]:
    """Check the trajectory files of a curriculum before a model is loaded, as every selection will.

    Returns:
        What was found of those that are files, by "train" and "valid".

    Raises:
        CropiError: what :func:`choose_prompts` would raise for these files in stage 0, or log-probs that the files lack
            and rollouts of this run, which are to replace some of theirs, have.
    """
    train, valid, estimator = options.files("train"), options.files("valid"), options.estimator_used()
    found = {name: scan(files) for name, files in (("train", train), ("valid", valid)) if files is not None}
    for part in found.values():
        behaviour_source(options.behaviour, part, estimator.ratio)
    if "valid" in found:
        check_valid(found["valid"], options.valid_sets, 0)
    if train is None:
        return found
    try:
        check_pool(_count(train, known), train, 0)
    except NothingToSelect:
        if options.on_nothing == "error":
            raise
    recorded = options.recording is not None and options.recording.logprobs
    stored = found["train"].with_logprobs > 0
    if options.use_recorded and options.behaviour == "auto" and estimator.ratio and recorded != stored:
        raise CropiError(
            f"use_recorded mixes the rollouts in {_names(train)}, {'with' if stored else 'without'} log-probs, with "
            f"recorded ones {'with' if recorded else 'without'}: ratios of two kinds would be ranked against "
            f"each other; set behaviour='current'{'' if stored else ', or Recording(logprobs=False)'}"
        )
    return found


def check_pool(pool: Mapping[str, Any], files: Sequence[Path], stage: int) -> None:
    """Check that there is something to select.

    Raises:
        NothingToSelect: all rewards are equal, prompt by prompt.
        CropiError: no trajectory belongs to a prompt of the dataset.
    """
    if not pool["prompts"]:
        raise CropiError(
            f"stage {stage}: none of the trajectories in {_names(files)} belongs to a prompt of the dataset; their "
            "ids must be those of its id column"
        )
    if not pool["usable"]:
        raise NothingToSelect(
            pool["prompts"],
            pool["reasons"],
            before=f"stage {stage}: ",
            otherwise=", or set on_nothing='keep'",
        )


def check_valid(found: Scan, wanted: Sequence[str] | None, stage: int) -> None:
    """Check that every validation set has a trajectory with a gradient: see :func:`cropi.data.scan.check_covered`."""
    check_covered({DEFAULT_SET: found}, wanted or (), option="valid_sets", before=f"stage {stage}: ")


def _names(files: Sequence[Path]) -> str:
    return ", ".join(map(str, files))


def _clean(folder: Path) -> None:
    for left in (*folder.glob("sketches-*-*"), *folder.glob("train-*.jsonl"), *folder.glob("valid-*.jsonl")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _share(
    files: Sequence[Path], out: Path, ranks: Ranks, known: Callable[[str], bool]
) -> tuple[tuple[Path, int], dict[str, Any]]:
    """Write this rank's share of the known prompts to ``out``; its path and size, and counts over all shares."""
    taken: list[int] = []
    with replacing(out) as temporary, open(temporary, "w", encoding="utf-8") as file:

        def take(number: int, group: PromptGroup) -> None:
            if number % ranks.world == ranks.rank:
                file.write(group.raw + "\n")
                taken.append(number)

        counts = _count(files, known, take)
    return (out, len(taken)), counts


def _count(
    files: Sequence[Path],
    known: Callable[[str], bool],
    take: Callable[[int, PromptGroup], None] | None = None,
) -> dict[str, Any]:
    """Count known prompts and those with a gradient, and hand every known one to ``take`` with its number."""
    prompts = usable = unknown = 0
    reasons: Counter[str] = Counter()
    for group in read_trajectories(files):
        if not known(group.id):
            unknown += 1
            continue
        reason = no_gradient_reason(group.rewards)
        usable += reason is None
        reasons.update([reason] if reason else [])
        if take is not None:
            take(prompts, group)
        prompts += 1
    return {"prompts": prompts, "usable": usable, "unknown": unknown, "reasons": reasons}


def _select(options: Curriculum, folder: Path, seed: int) -> list[str]:
    train, valid = (
        SketchStore.join([SketchStore.open(path) for path in sorted(folder.glob(f"sketches-{name}-*"))])
        for name in ("train", "valid")
    )
    scores = influence(
        train, [valid], metric=options.metric, mean=options.mean, max_valid=options.max_valid, seed=seed
    )
    best = select(scores, fraction=options.fraction, method=options.method, pool=options.pool, seed=seed)
    write_scores(folder / "scores.parquet", scores)
    write_selection(folder / "selected.jsonl", scores, best)
    return [scores.rows[i].id for i in best.chosen]


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
def _evaluating(model: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with own_randomness(next(model.parameters()).device):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
