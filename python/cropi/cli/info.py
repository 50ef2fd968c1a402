"""``cropi info``: what a store, a score table or a trajectory file holds."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

from cropi.errors import printable


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "path", help="a store's folder, a score table (.parquet) or trajectories (.jsonl, .jsonl.gz)"
    )
    command.add_argument("--verify", action="store_true", help="read every shard and check its checksum")
    command.add_argument(
        "--skip-bad", action="store_true", help="count bad records instead of stopping at the first"
    )


def run(args: argparse.Namespace) -> int:
    """Describe whatever the path is."""
    path = Path(args.path)
    if path.is_dir():
        _store(path, args.verify)
    elif path.suffix == ".parquet":
        _scores(path)
    else:
        _trajectories(path, args.skip_bad)
    return 0


def _store(path: Path, verify: bool) -> None:
    from cropi.store.shards import FAILED
    from cropi.store.store import SketchStore

    store = SketchStore.open(path)
    rows = store.rows()
    print(f"store         {path}")
    for key, value in store.manifest.items():
        print(f"{key:<13} {value if isinstance(value, str) else json.dumps(value)}")
    counts = Counter((row.status, row.reason if row.status != "ok" else "") for row in rows)
    for (status, reason), count in sorted(counts.items()):
        print(f"{status:<13} {count} prompts{f' ({reason})' if reason else ''}")
    if len(store) < store.expected:
        print(
            f"unfinished    {len(store)} of {store.expected} prompts; the same command goes on with the rest"
        )
    for name, count in sorted(Counter(row.set for row in rows if row.set).items()):
        print(f"set           {printable(name)}: {count} prompts")
    for row in rows:
        if row.status == FAILED:
            print(f"  failed      {printable(row.id)}: {row.reason}")
    if verify:
        print(f"checksums     {store.verify()} shards are intact")


def _scores(path: Path) -> None:
    from cropi.ranking.influence import read_scores

    scores = read_scores(path)
    print(f"scores        {path}: {int(scores.usable.sum())} of {len(scores.rows)} prompts have scores")
    for v, name in enumerate(scores.sets):
        column = scores.table[scores.usable, v]
        print(f"{name:<13} lowest {column.min():.4f}, mean {column.mean():.4f}, highest {column.max():.4f}")
    print(json.dumps(scores.meta, indent=2))


def _trajectories(path: Path, skip_bad: bool) -> None:
    from cropi.data.scan import scan

    found = scan([path], skip_bad=skip_bad)
    print(
        f"trajectories  {path}: {found.prompts} prompts, {found.responses} responses, {found.usable} prompts usable"
    )
    for reason, count in sorted(found.without_gradient.items()):
        print(f"no gradient   {count} prompts: {reason}")
    for name, count in sorted(found.sets.items()):
        print(f"set           {printable(name)}: {count} prompts")
    print(f"token ids     in {found.with_ids} records; log-probs in {found.with_logprobs}")
    for error in found.bad:
        print(f"bad record    {error}")
    print(f"fingerprint   {found.fingerprint}")
