"""Stores of noise (:mod:`cropi.gradient.noise`) beside the stores of gradients: all validation prompts, and some
training prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cropi.data.readers import PromptGroups
from cropi.data.scan import Scan
from cropi.data.share import Share
from cropi.model.policy import Policy
from cropi.sketching.job import SketchJob
from cropi.sketching.run import sketch
from cropi.sketching.summary import Summary
from cropi.store.rows import OK
from cropi.store.store import SketchStore

SAMPLE = 256  # training prompts: a variance over so many is known to sqrt(2 / 256) = 9 %


def sketch_noise(
    policy: Policy,
    job: SketchJob,
    scan: Scan,
    *,
    of: Sequence[str] | None = None,
    progress: bool = True,
    by: Callable[..., Summary] = sketch,
) -> Summary:
    """Sketch a draw of the noise of every gradient of a job into ``job.out``.

    Args:
        policy: the current policy.
        job: that of the gradients, with a store of its own; its trajectories are prompt groups.
        scan: what they hold.
        of: the ids of the prompts, in their order; None: all of the job.
        progress: show a bar.
        by: how a job becomes a store: :func:`cropi.sketching.run.sketch`, or that of several processes together, every
            one of which calls this with the same ids.
    """
    job = replace(job, noise=True, behaviour_check="off", limit=None if of is not None else job.limit)
    if of is not None:
        groups: PromptGroups = job.trajectories
        some = Scan(
            fingerprint=scan.fingerprint, texts_checked=scan.texts_checked, texts_kept=scan.texts_kept
        )
        for group in groups.take(of):
            some.add(group)
        job, scan = replace(job, trajectories=Share(groups, of, some)), some
    return by(policy, job, scan=scan, progress=progress)


def sampled(store: SketchStore) -> list[str]:
    """At most :data:`SAMPLE` prompts that have a sketch in a store, always the same, in their order."""
    ids = [row.id for row in store.rows() if row.status == OK]
    if len(ids) <= SAMPLE:
        return ids
    places = np.random.default_rng(0).choice(len(ids), SAMPLE, replace=False)
    return [ids[i] for i in sorted(places.tolist())]
