"""Stores that hold a share of their job's prompts (``--shard 2/4``), and which shares are missing beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cropi.sealed import digest
from cropi.store.manifest import job_fingerprint


def share_text(manifest: Mapping[str, Any]) -> str:
    """The share of a job's prompts that a store holds, as it was asked for: ``2/4``; "" for all of them."""
    share = manifest.get("share")
    return f"{share['number']}/{share['count']}" if share else ""


def shared_job(manifest: Mapping[str, Any]) -> str:
    """What the shares of one job have in common; "" for a store that is no share."""
    share = manifest.get("share")
    if not share:
        return ""
    return f"{job_fingerprint(manifest)} {digest({k: v for k, v in share.items() if k != 'number'})}"


def joined_share(manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The share that some stores hold together: None where they are all shares of their jobs, else one that is not
    whole, with the numbers that are ``missing``."""
    jobs: dict[str, dict[int, Mapping[str, Any]]] = {}
    for manifest in manifests:
        if job := shared_job(manifest):
            jobs.setdefault(job, {})[int(manifest["share"]["number"])] = manifest
    for parts in jobs.values():
        share = dict(next(iter(parts.values()))["share"])
        missing = [number for number in range(1, share["count"] + 1) if number not in parts]
        held = sum(int(manifest["prompts"]) for manifest in parts.values())
        if missing or held < share["prompts"]:
            return share | {"missing": missing or sorted(parts)}
    return None


def lacking_shares(manifest: Mapping[str, Any]) -> list[str]:
    """The shares of its job that a store does not hold, as they were asked for: ``["1/4", "3/4", "4/4"]``."""
    share = manifest.get("share")
    if not share or share["count"] == 1:
        return []
    others = (number for number in range(1, share["count"] + 1) if number != share["number"])
    return [f"{number}/{share['count']}" for number in share.get("missing") or others]
