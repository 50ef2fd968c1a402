"""``cropi store merge | verify | compact | export``: what is done with stores of sketches."""

from __future__ import annotations

import argparse
from pathlib import Path

from cropi.cli import manners
from cropi.cli.manners import tell
from cropi.cli.parser import about, count
from cropi.files import is_there

_SIZE = 1 << 28
EXAMPLES = {
    "merge": "cropi store merge sketches/all sketches/part-1 sketches/part-2",
    "verify": "cropi store verify out/sketches/train",
    "compact": "cropi store compact out/sketches/train",
    "export": "cropi store export out/sketches/train --out sketches.npy",
}
EXAMPLE = EXAMPLES["merge"]


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    merge = _action(actions, "merge", "copy the rows of several stores of one model into one")
    merge.add_argument("out", metavar="OUT", help="the new store")
    merge.add_argument("stores", nargs="+", metavar="FOLDER", help="the stores to merge")
    verify = _action(actions, "verify", "read stores and exports, and check their checksums")
    verify.add_argument(
        "stores", nargs="+", metavar="PATH",
        help="stores; files and data sets that cropi wrote, with NAME.sha256 beside them",
    )  # fmt: skip
    compact = _action(actions, "compact", "join small shards to large ones")
    compact.add_argument("store", metavar="FOLDER", help="a store that no other process writes to")
    for action in (merge, compact):
        action.add_argument(
            "--shard-bytes", type=count, default=_SIZE, metavar="N",
            help=f"about the size of a file of the store (default: {_SIZE})",
        )  # fmt: skip
    export = _action(
        actions, "export", "write the sketches as a NumPy or parquet file, the prompts' ids with them"
    )
    export.add_argument("store", metavar="FOLDER", help="a store")
    export.add_argument(
        "--out", required=True, metavar="FILE", help="the file; of npy, the ids go to FILE.rows.jsonl"
    )
    export.add_argument(
        "--to", choices=("npy", "parquet"),
        help="a float32 matrix for np.load(FILE, mmap_mode='r'), or a table (default: as FILE ends)",
    )  # fmt: skip
    export.add_argument(
        "--normalise",
        action="store_true",
        help="divide every sketch by its length: inner products are cosines",
    )


def _action(
    actions: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str
) -> argparse.ArgumentParser:
    action = actions.add_parser(name, **about(what, EXAMPLES[name]))
    manners.add_options(action, inner=True)
    return action


def run(args: argparse.Namespace) -> int:
    """Do it, and say what was done."""
    return {"merge": _merge, "verify": _verify, "compact": _compact, "export": _export}[args.action](args)


def _merge(args: argparse.Namespace) -> int:
    from cropi.store.merging import merge

    made = merge(args.out, args.stores, shard_bytes=args.shard_bytes)
    tell(args, out=args.out, prompts=len(made), stores=args.stores)
    print(f"merged        {len(made)} prompts of {len(args.stores)} stores: {args.out}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from cropi.sealed import check_sums
    from cropi.store.manifest import MANIFEST
    from cropi.store.store import SketchStore

    for path in args.stores:
        if is_there(Path(path)) and not is_there(Path(path) / MANIFEST):
            count = check_sums(path, whole=True)
            tell(args, **{str(path): {"files": count}})
            print(f"checksums     {count} files are intact: {path}")
            continue
        store = SketchStore.open(path)
        tell(args, **{str(path): {"prompts": len(store), "expected": store.expected}})
        part = "" if len(store) >= store.expected else f" of {store.expected} (unfinished)"
        print(f"checksums     {store.verify()} shards with {len(store)} prompts{part} are intact: {path}")
    return 0


def _compact(args: argparse.Namespace) -> int:
    from cropi.store.store import SketchStore

    with SketchStore.resume(args.store, shard_bytes=args.shard_bytes) as store:
        before, after = store.compact()
    tell(args, store=args.store, shards_before=before, shards=after)
    print(f"compacted     {before} shards to {after}: {args.store}")
    return 0


def _export(args: argparse.Namespace) -> int:
    from cropi.store.exporting import export
    from cropi.store.store import SketchStore

    made = export(SketchStore.open(args.store), args.out, to=args.to, normalise=args.normalise)
    tell(args, exported=made)
    for path in made:
        print(f"exported      {path}")
    return 0
