"""``cropi info``: what a file or a folder holds, of all that these commands read and write."""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cropi.amounts import counted, setting
from cropi.cli import options
from cropi.cli.manners import tell
from cropi.cli.parser import option_group
from cropi.errors import printable
from cropi.files import is_folder, is_there
from cropi.options import Reading, Tokens

if TYPE_CHECKING:
    from cropi.gradient.tokenize import TokenGroup

EXAMPLE = "cropi info train.jsonl"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "path",
        help="trajectories and prompts in any format that is read, trainers' dumps, stores, score tables, selections, "
        "exports, reports, checks, benches, configs, and the folders of `cropi run` and `cropi curriculum`",
    )
    options.add(command, Reading)
    command.add_argument(
        "--skip-bad", action="store_true", help="count bad records instead of stopping at the first"
    )
    options.add(command, Tokens, leave=("max_length", "too_long"))
    tokens = option_group(command, "tokens")
    tokens.add_argument(
        "--show-tokens", type=int, metavar="N",
        help="show the tokens of the first N prompts, and which are scored",
    )  # fmt: skip
    tokens.add_argument(
        "--model", metavar="PATH_OR_ID",
        help="the model whose tokenizer and chat template make the tokens (for --show-tokens)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Describe whatever the path is."""
    path = Path(args.path)
    if args.show_tokens is not None:
        _tokens(args)
        return 0
    for action in args.parser._actions:
        of_tokens = action.dest in ("model", "chat_template", "template_date", "eos")
        if of_tokens and getattr(args, action.dest) != action.default:
            flag = action.option_strings[0]
            args.parser.error(f"{flag} is for --show-tokens N; give it too, or leave {flag} out")
    described = _described(args, path)
    tell(args, path=args.path, **described)
    return 0


def _described(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    from cropi.cli import contents
    from cropi.data.tables import is_saved
    from cropi.trainers.dumps.folders import files_of

    _check_reading(args, path)
    described = contents.describe_folder(path) if is_folder(path) else None
    if described is not None:
        return described
    if is_folder(path) and not is_saved(path):
        if is_there(path / "manifest.json") or not files_of(path):
            return _store(path)
        return _trajectories(args)  # a trainer's dumps
    if path.suffix == ".parquet" and _is_scores(path):
        return _scores(path)
    if args.source == "auto" and not args.columns:
        described = contents.describe_file(path)
        if described is None and is_there(path):
            described = contents.describe_rows(path)
        if described is not None:
            return described
    return _trajectories(args)


def _check_reading(args: argparse.Namespace, path: Path) -> None:
    """What says how trajectories are read is an error for what holds none."""
    given = [
        action.option_strings[0]
        for action in args.parser._actions
        if action.dest in ("source", "columns", "skip_bad") and getattr(args, action.dest) != action.default
    ]
    if not given:
        return
    # Not before: some of these import torch.
    from cropi.cli.contents import STAGES
    from cropi.curriculum.state import NAME
    from cropi.data.tables import is_saved
    from cropi.ranking.selection_files import SELECTED
    from cropi.ranking.table import SCORES
    from cropi.store.manifest import MANIFEST

    what = ""
    if path.suffix == ".parquet" and _is_scores(path):
        what = "a table of scores"
    elif is_folder(path) and not is_saved(path):
        made = (MANIFEST, NAME, SCORES, SELECTED, "sketches", STAGES, f"cropi/{STAGES}")
        what = "a store, or results" if any(is_there(path / name) for name in made) else ""
    if what:
        args.parser.error(
            f"{' and '.join(given)}: {path} holds no trajectories but {what}; leave "
            f"{'it' if len(given) == 1 else 'them'} out"
        )


def _is_scores(path: Path) -> bool:
    """Whether a table was written by ``cropi influence``."""
    from cropi.errors import optional

    try:
        schema = optional("pyarrow.parquet").read_schema(path)
    except (OSError, ValueError):
        return False
    return b"cropi" in (schema.metadata or {}) or any(name.startswith("score[") for name in schema.names)


def _tokens(args: argparse.Namespace) -> None:
    """Show what the first prompts become, as ``cropi sketch`` would read them."""
    from cropi.data.readers import read
    from cropi.errors import CropiError
    from cropi.gradient.tokenize import Tokenize
    from cropi.model.policy import Policy

    if args.show_tokens < 1:
        raise CropiError(f"show_tokens must be at least 1, got {args.show_tokens}")
    policy = Policy(args.model, eos=args.eos) if args.model else None  # its weights are not loaded
    tokenizer, ends = (policy.tokenizer, policy.ends) if policy else (None, ())
    tokens = Tokenize(
        tokenizer, 2**31, chat_template=args.chat_template, eos=args.eos, ends=ends, template_date=args.template_date
    )  # fmt: skip
    opened = options.opened(args, args.path, policy)
    groups = read(opened, skip_bad=args.skip_bad, columns=args.columns, rewards=None)
    for group in islice(groups, args.show_tokens):
        print("\n".join(token_lines(tokens(group), tokenizer)))


def token_lines(group: TokenGroup, tokenizer: Any) -> Iterator[str]:
    """Lines that show a group: its prompt, and every response in pieces of scored tokens and of tokens only read.

    Text is shown as Python writes strings, so that line ends and odd characters can be seen; without a tokenizer the
    token ids are shown.
    """
    record, scored = group.group, group.scored
    exact = "stored token ids" if record.response_ids is not None else "tokenised from text"
    yield f"prompt {group.id} ({record.where}): {len(group.prompt)} tokens, {scored} tokens scored ({exact})"
    yield f"  prompt    {_shown(group.prompt, tokenizer)}"
    for k, (ids, reward) in enumerate(zip(group.responses, record.rewards, strict=True)):
        yield f"  response {k}" + ("" if record.demonstrations else f", reward {reward:g}")
        mask = group.masks[k] if group.masks is not None else [1] * len(ids)
        for kept, part in groupby(zip(mask, ids, strict=True), key=lambda pair: bool(pair[0])):
            yield f"    {'scored ' if kept else 'read   '} {_shown([token for _, token in part], tokenizer)}"


def _shown(ids: list[int], tokenizer: Any) -> str:
    if tokenizer is None:
        return str(ids)
    return repr(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _store(path: Path) -> dict[str, Any]:
    from cropi.store.rows import FAILED
    from cropi.store.store import SketchStore

    store = SketchStore.open(path)
    rows = store.rows()
    print(f"store         {path}")
    _print_settings(store.manifest)
    counts = Counter((row.status, row.reason if row.status != "ok" else "") for row in rows)
    for (status, reason), count in sorted(counts.items()):
        print(f"{status:<13} {counted(count, 'prompt')}{f' ({reason})' if reason else ''}")
    if len(store) < store.expected:
        print(
            f"unfinished    {len(store)} of {store.expected} prompts; the same command goes on with the rest"
        )
    for name, count in sorted(Counter(row.set for row in rows if row.set).items()):
        print(f"set           {printable(name)}: {counted(count, 'prompt')}")
    for row in rows:
        if row.status == FAILED:
            print(f"  failed      {printable(row.id)}: {row.reason}")
    return {
        "kind": "store", "prompts": len(store), "expected": store.expected, "manifest": store.manifest,
        "status": dict(Counter(row.status for row in rows)),
    }  # fmt: skip


def _scores(path: Path) -> dict[str, Any]:
    from cropi.ranking.table import read_scores

    scores = read_scores(path)
    print(f"scores        {path}: {int(scores.usable.sum())} of {len(scores.rows)} prompts have scores")
    for v, name in enumerate(scores.sets):
        column = scores.table[scores.usable, v]
        least, mean, most = (column.min(), column.mean(), column.max()) if len(column) else [math.nan] * 3
        print(f"{printable(name):<13} lowest {least:.4f}, mean {mean:.4f}, highest {most:.4f}")
    _print_settings(scores.meta)
    return {
        "kind": "scores", "prompts": len(scores.rows), "usable": int(scores.usable.sum()), "sets": scores.sets,
        "meta": scores.meta,
    }  # fmt: skip


def _print_settings(settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        # A list of tables, as of validation sets: a line for each.
        for one in value if isinstance(value, list) and all(isinstance(v, dict) for v in value) else [value]:
            if text := setting(one):
                print(f"{key:<13} {printable(text)}")


def _trajectories(args: argparse.Namespace) -> dict[str, Any]:
    from cropi.data.readers import read
    from cropi.data.rewards import IDS_OF_RESPONSES, ONE_RESPONSE
    from cropi.data.scan import scan

    path = args.path
    opened = options.opened(args, path)
    found = scan(read(opened, skip_bad=args.skip_bad, columns=args.columns, rewards=None))
    print(
        f"trajectories  {path}: {counted(found.prompts, 'prompt')}, {counted(found.responses, 'response')}, "
        f"{counted(found.usable, 'prompt')} usable"
    )
    if found.demonstrations:
        print(
            f"no rewards    in {found.demonstrations} records: demonstrations, for --estimator sft; name rewards in "
            "a column of another name with --columns"
        )
    for reason, count in sorted(found.without_gradient.items()):
        hint = f"; {IDS_OF_RESPONSES}" if reason == ONE_RESPONSE and count == found.prompts else ""
        print(f"no gradient   {counted(count, 'prompt')}: {reason}{hint}")
    for name, count in sorted(found.sets.items()):
        print(f"set           {printable(name)}: {counted(count, 'prompt')}")
    print(f"token ids     in {found.with_ids} records; log-probs in {found.with_logprobs}")
    for error in found.bad:
        print(f"bad record    {error.of_left_out}")
    print(f"fingerprint   {found.fingerprint}")
    return {
        "kind": "trajectories", "prompts": found.prompts, "responses": found.responses, "usable": found.usable,
        "demonstrations": found.demonstrations, "without_gradient": dict(found.without_gradient),
        "sets": found.sets, "with_ids": found.with_ids, "with_logprobs": found.with_logprobs,
        "bad": [error.of_left_out for error in found.bad], "fingerprint": found.fingerprint,
    }  # fmt: skip
