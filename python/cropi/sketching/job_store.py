"""The store that a job fills, and its manifest: what its rows depend on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cropi.data.scan import Scan
from cropi.errors import CropiError, warn
from cropi.files import is_file
from cropi.gradient.behaviour import Behaviour
from cropi.gradient.template import template_text
from cropi.model.moments import SecondMoments
from cropi.model.policy import Policy
from cropi.sketching.job import EqualModels, SketchJob, make_tokenize
from cropi.store.manifest import FOLDER, GROUPS, MANIFEST, NOISE, read_manifest
from cropi.store.memory import MemoryStore
from cropi.store.parts import take_parts
from cropi.store.shares import share_text
from cropi.store.store import SketchStore
from cropi_kernels import Coverage, frozen

PRODUCTS = "products"  # of a manifest's notes: which shapes of weights oneDNN multiplies by


def _text_rules(policy: Policy, job: SketchJob, scan: Scan | None) -> dict[str, Any]:
    """What the tokens of text depend on beyond the options; nothing where all records hold token ids."""
    made: dict[str, Any] = {"columns": job.columns} if job.columns else {}
    if scan is None or policy.tokenizer is None:
        return made
    if scan.with_prompt_ids < scan.prompts:
        rules = ("template_date", "tools", "chat_template_kwargs")
        made |= {name: value for name in rules if (value := getattr(job, name))}
    if scan.with_ids < scan.prompts:
        tokens, own = make_tokenize(policy, job), policy.tokenizer.eos_token_id
        if job.eos and tokens.end not in (None, own):
            made["end"] = tokens.end
        if further := tokens.all_ends - {tokens.end, own}:
            made["ends"] = sorted(further)
    return made


def make_manifest(
    policy: Policy,
    job: SketchJob,
    scan: Scan | None,
    behaviour: Behaviour,
    coverage: Coverage,
    *,
    moments: SecondMoments | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """What the store's rows will depend on; ``notes`` apart, a run with other values may not continue the store.

    Args:
        policy: the current policy.
        job: the options.
        scan: what the files hold; None for prompts that come from no file.
        behaviour: where the behaviour log-probs come from.
        coverage: what is sketched of the model.
        moments: what its gradients are scaled by.
        groups: patterns of the parameters whose sketches are kept apart.
    """
    manifest: dict[str, Any] = {
        "spec": job.spec.to_dict(),
        "spec_fingerprint": job.spec.fingerprint(),
        "hash_version": job.spec.version,
        "stage": job.stage,
        "model": policy.fingerprint,
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
            "model": None if behaviour.model is None else behaviour.model.policy.fingerprint,
        },
        "temperature": job.temperature,
        "tokens": {name: getattr(job, name) for name in ("eos", "max_length", "too_long")}
        | {"chat_template": template_text(job.chat_template)}
        | _text_rules(policy, job, scan),
        "dtype": job.store_dtype,
    }
    if manifest["behaviour"]["model"] == manifest["model"]:
        warn(
            "the behaviour model's weights are those of the policy, so that every ratio is 1: right where the policy "
            "made the responses (behaviour 'current' says so without a second model), and wrong where it was trained "
            "since; then give the model from before",
            EqualModels,
        )
    notes = {
        "trajectories": job.names,
        FOLDER: os.getcwd(),
        PRODUCTS: frozen.choices(policy.model),
        **job.notes,
    }
    return manifest | _of_some_jobs(job, scan, moments, groups) | {"notes": notes}


def _of_some_jobs(
    job: SketchJob,
    scan: Scan | None,
    moments: SecondMoments | None,
    groups: Mapping[str, Sequence[str]] | None,
) -> dict[str, Any]:
    """What a manifest holds where a job differs from the defaults."""
    made: dict[str, Any] = {}
    if groups is not None:
        made[GROUPS] = [{"name": name, "patterns": list(own)} for name, own in groups.items()]
    if moments is not None:
        made["preconditioner"] = moments.fingerprint()
    made |= {
        name: value for name in ("responses", "token_share") if (value := getattr(job, name)) is not None
    }
    if job.noise:
        made[NOISE] = True
    if not job.zero_check:
        made["zero_check"] = False
    if scan is not None:
        made["prompts"] = min(scan.prompts, job.limit or scan.prompts)
    if job.shard is not None:
        number, count = job.shard
        made["share"] = {
            "number": number, "count": count, "prompts": made.get("prompts"), "layout": job.layout,
            "tokens_per_batch": job.tokens_per_batch,
        }  # fmt: skip
    return made


def open_store(job: SketchJob, manifest: Callable[[], dict[str, Any]]) -> SketchStore:
    """The store that a job fills: ``job.out``, continued if it is there, or one in memory.

    Args:
        job: the options.
        manifest: what :func:`manifest_of` gave.

    Raises:
        CropiError: the folder cannot be written, or its store was made with other settings.
    """
    if job.out is None:
        return MemoryStore(manifest())
    # Before the manifest asks who is to multiply: that is measured else.
    if is_file(Path(job.out) / MANIFEST):
        settle_products(read_manifest(Path(job.out)))
    store = SketchStore.create(job.out, manifest(), shard_rows=job.shard_rows, shard_bytes=job.shard_bytes)
    try:
        _check_share(store, job)
        take_parts(store)
        if job.limit is not None and len(store) > job.limit:
            warn(
                f"limit {job.limit}: the store {store.path} holds {len(store)} prompts from before, and all of them "
                "are used; give another --out for fewer",
            )
    except BaseException:
        store.close()
        raise
    return store


def _check_share(store: SketchStore, job: SketchJob) -> None:
    made, wanted = share_text(store.manifest), "" if job.shard is None else "{}/{}".format(*job.shard)
    for name in ("tokens_per_batch", "layout") if made and made == wanted else ():
        if store.manifest["share"][name] != getattr(job, name):
            before = store.manifest["share"][name]
            raise CropiError(
                f"the store {store.path} was made with --shard {made} and {name} = {before}, but this run has "
                f"{getattr(job, name)}: other shares would hold its prompts; run with the same"
            )
    if made != wanted:
        before, now = (f"with --shard {text}" if text else "without --shard" for text in (made, wanted))
        raise CropiError(
            f"the store {store.path} was made {before}, but this run is {now}; give another --out, or run with the same"
        )


def settle_products(manifest: Mapping[str, Any]) -> None:
    """Let this process multiply as the one did that made a store: measured anew, the choice between torch's products
    and oneDNN's may fall otherwise, and the last bits with it."""
    frozen.decide((manifest.get("notes") or {}).get(PRODUCTS) or {})


def manifest_of(
    policy: Policy,
    job: SketchJob,
    behaviour: Behaviour,
    scan: Scan | None = None,
    moments: SecondMoments | None = None,
) -> Callable[[], dict[str, Any]]:
    """What gives the manifest of a job's store, by :func:`make_manifest`. What cannot be sketched of the policy shows
    now.

    Raises:
        UncoveredParameterError: a trainable parameter cannot be sketched.
        CropiError: the moments are those of another model.
    """
    make = functools.partial(
        policy.sketcher, job.spec, tuple(job.exclude), verify=job.verify, fused=job.fused
    )
    sketcher, groups = make(), None
    if job.grouped:
        groups = job.patterns(sketcher.coverage.names)
        sketcher = make(groups=groups)
    with sketcher:
        sketcher.check_model()
    if moments is not None:
        moments.check(policy.model, sketcher.coverage.names)

    return functools.partial(
        make_manifest, policy, job, scan, behaviour, sketcher.coverage, moments=moments, groups=groups
    )
