"""Stores of noise (:mod:`cropi.gradient.noise`) beside the stores of gradients: all validation prompts, and some
training prompts."""

from __future__ import annotations

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
    policy: Policy, job: SketchJob, scan: Scan, *, of: SketchStore | None = None, progress: bool = True
) -> Summary:
    """Sketch a draw of the noise of every gradient of a job into ``job.out``.

    Args:
        policy: the current policy.
        job: that of the gradients, with a store of its own; its trajectories are prompt groups.
        scan: what they hold.
        of: the store of the gradients, of whose prompts :data:`SAMPLE` are drawn; None: all of the job.
        progress: show a bar.
    """
    job = replace(job, noise=True, behaviour_check="off", limit=None if of is not None else job.limit)
    if of is not None:
        groups: PromptGroups = job.trajectories
        ids = _drawn([row.id for row in of.rows() if row.status == OK])
        some = Scan(
            fingerprint=scan.fingerprint, texts_checked=scan.texts_checked, texts_kept=scan.texts_kept
        )
        for group in groups.take(ids):
            some.add(group)
        job, scan = replace(job, trajectories=Share(groups, ids, some)), some
    return sketch(policy, job, scan=scan, progress=progress)


def _drawn(ids: list[str]) -> list[str]:
    """At most :data:`SAMPLE` of them, always the same, in their order."""
    if len(ids) <= SAMPLE:
        return ids
    places = np.random.default_rng(0).choice(len(ids), SAMPLE, replace=False)
    return [ids[i] for i in sorted(places.tolist())]
