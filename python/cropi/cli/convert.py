"""``cropi convert``: a trainer's rollout dumps to trajectory records."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from cropi.cli.parser import positive

SOURCES = ("verl", "slime", "nemo-rl")


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument("files", nargs="+", metavar="FILE", help="dumps of one run, of any number of steps")
    command.add_argument("--source", required=True, choices=SOURCES, help="the trainer that wrote them")
    command.add_argument("--out", required=True, metavar="FILE.jsonl", help="the trajectories")
    command.add_argument(
        "--id-key", metavar="KEY",
        help="where the prompt's id stands: verl (default extra_info.index), a key of slime's metadata, or a column of "
        "NeMo-RL's file; without it the id is a hash of the prompt",
    )  # fmt: skip
    command.add_argument(
        "--temperature", type=float, help="of the sampling; dumps do not hold it, and log-probs depend on it"
    )
    command.add_argument(
        "--keep", default="newest", choices=("newest", "all"),
        help="of a prompt with rollouts of several steps: those of its last step, or all (needs log-probs)",
    )  # fmt: skip
    command.add_argument(
        "--skip-bad", action="store_true",
        help="go on after a sample that cannot be used (no reward, NaN, another type), and count it; samples that the "
        "trainer itself leaves out (aborted, removed, empty) are left out in any case",
    )  # fmt: skip
    command.add_argument(
        "--allow-pickle", action="store_true",
        help="load .pt and .dp files with all that they name, which RUNS THEIR CODE: only for files of people you "
        "trust. Without it plain data, arrays, tensors and the containers of verl and slime are read; no code is run",
    )  # fmt: skip
    command.add_argument(
        "--max-gib",
        type=positive,
        default=16.0,
        metavar="N",
        help="largest dump that is read (default 16 GiB)",
    )
    text = command.add_argument_group("verl's text dumps (.jsonl)")
    text.add_argument(
        "--dataset", metavar="FILE", help="the dataset of the run, to find the prompts' ids and messages"
    )
    text.add_argument("--model", metavar="PATH_OR_ID", help="whose tokenizer rendered the prompts")
    text.add_argument(
        "--trust-remote-code", action="store_true",
        help="let the model's folder or hub repository bring code of its own, WHICH IS RUN (default: no)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Convert, and say what came out."""
    from cropi.errors import CropiError, printable
    from cropi.files import check_outputs
    from cropi.trainers.dumps.fields import Left
    from cropi.trainers.dumps.rollout import group_rollouts, write_groups

    if bool(args.dataset) != bool(args.model):
        raise CropiError(
            "--dataset and --model are needed together: prompts are found by their rendered text"
        )
    if args.dataset and args.source != "verl":
        raise CropiError(
            f"--dataset is for verl's text dumps; the dumps of {args.source} hold the prompts' tokens"
        )
    check_outputs({"--out": args.out}, {"FILE": args.files, "--dataset": [args.dataset]})
    if args.allow_pickle:
        print(f"pickles       --allow-pickle: code that {', '.join(map(printable, args.files))} names is run")
    left = Left(args.skip_bad)
    groups = group_rollouts(_rollouts(args, left), keep=args.keep, left=left)
    write_groups(args.out, groups)
    exact = sum(group.response_ids is not None for group in groups)
    print(
        f"trajectories  {args.out}: {len(groups)} prompts, {sum(group.size for group in groups)} responses; token "
        f"ids in {exact} records, log-probs in {sum(group.logprobs is not None for group in groups)}"
    )
    if left.counts:
        reasons = ", ".join(f"{count} by {name}" for name, count in sorted(left.counts.items()))
        print(f"left out      {left.counts.total()} samples: {reasons}")
        for error in left.first.values():
            print(printable(f"  the first   {error.where}: {error.problem}"))
    return 0


def _rollouts(args: argparse.Namespace, left: Any) -> Iterator[Any]:
    options: dict[str, Any] = {
        "id_key": args.id_key, "temperature": args.temperature, "left": left, "largest": int(args.max_gib * 2**30),
    }  # fmt: skip
    if args.source != "nemo-rl":
        options["allow_pickle"] = args.allow_pickle
    if args.source == "verl":
        from cropi.trainers.dumps.verl import read_dump

        if args.dataset:
            options |= {"id_key": None, "prompts": _prompts(args)}
    elif args.source == "slime":
        from cropi.trainers.dumps.slime import read_dump  # type: ignore[assignment]
    else:
        from cropi.trainers.dumps.nemo_rl import read_dump  # type: ignore[assignment]
    for path in args.files:
        yield from read_dump(path, **options)


def _prompts(args: argparse.Namespace) -> Any:
    from cropi.data.export import read_dataset
    from cropi.data.prompt_ids import PromptIds
    from cropi.errors import optional
    from cropi.trainers.dumps.verl import prompts_by_text
    from cropi.trainers.verl.selected import ID_KEY

    table = read_dataset(args.dataset)
    rows = table if isinstance(table, list) else table.to_pylist()
    tokenizer = optional("transformers").AutoTokenizer.from_pretrained(
        args.model, trust_remote_code=args.trust_remote_code
    )
    ids = PromptIds(rows, args.id_key or ID_KEY, args.dataset, "--id-key")
    return prompts_by_text(rows, ids.names, tokenizer)
