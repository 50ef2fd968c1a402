"""``cropi convert``: a trainer's rollout dumps to trajectory records."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cropi.amounts import counted
from cropi.cli.manners import tell
from cropi.cli.parser import Parser, positive
from cropi.files import is_folder, is_there
from cropi.options import SOURCES

if TYPE_CHECKING:
    from cropi.trainers.dumps.reading import Reading

EXAMPLE = "cropi convert rollouts/*.jsonl --out train.jsonl"


def add_options(command: Parser) -> None:
    """Declare the options."""
    command.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="dumps of one run, of any number of steps; a folder stands for its files, without those of validation",
    )
    command.add_argument(
        "--source", default="auto", choices=SOURCES,
        help="which program wrote them; auto recognises it by their content and prints it (default: auto)",
    )  # fmt: skip
    command.add_argument(
        "--out", required=True, metavar="FILE.jsonl", help="where the trajectories are written"
    )
    command.add_argument(
        "--id-key", metavar="KEY",
        help="which field holds the prompt's id: a column of the file (dots lead into nested ones), or a key of "
        "slime's metadata (default: verl's extra_info.index, slime's id, prime-rl's task and example_id, else a hash "
        "of the prompt)",
    )  # fmt: skip
    command.add_argument(
        "--temperature",
        type=positive,
        metavar="X",
        help="temperature of the sampling, on which log-probs depend (default: what the dump says, as prime-rl's, "
        "ROLL's and requests do)",
    )
    command.add_argument(
        "--steps", default="newest", choices=("newest", "all"),
        help="which rollouts of a prompt are taken, if it has some of several steps: those of its newest step, or all, "
        "which needs log-probs (default: newest)",
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
        metavar="X",
        help="size of the largest dump that is read, in GiB (default: 16)",
    )
    command.add_argument(
        "--columns",
        metavar="NAME=COLUMN,...",
        help="of records and tables: names of the columns, where they are other ones: "
        "prompt=question,response=answer,reward=score; of dumps, reward=NAME: what the reward is, or a sum a+b of "
        "several: a column of TRL's file (default: the sum of all functions), a key of slime's table of rewards, a "
        "column of verl's text (default: score); with --dataset, prompt=NAME: its column with the prompts",
    )
    command.add_argument(
        "--reward", metavar="FILE.py:FUNCTION",
        help="score vLLM's outputs and chat completions by this function, as `cropi rollout --reward` does (default: "
        "the rewards in the file)",
    )  # fmt: skip
    _add_text_options(command)


def _add_text_options(command: Parser) -> None:
    """Options of dumps that lack prompts or token ids."""
    text = command.add_argument_group("dumps that lack prompts or token ids")
    text.add_argument(
        "--dataset", metavar="FILE",
        help="the dataset of the run, to find the ids and messages of prompts that the dump does not name; for a batch "
        "of requests: its input file, which has the prompts",
    )  # fmt: skip
    text.add_argument(
        "--model", metavar="PATH_OR_ID",
        help="the model whose tokenizer rendered the prompts, or wrote the tokens of chat completions",
    )  # fmt: skip
    text.add_argument(
        "--trust-remote-code", action="store_true",
        help="let the model's folder or hub repository bring code of its own, WHICH IS RUN (default: no)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Convert, and say what came out."""
    from cropi.errors import printable
    from cropi.files import LINES, check_outputs
    from cropi.trainers.dumps.auto import groups_of
    from cropi.trainers.dumps.fields import Left
    from cropi.trainers.dumps.rollout import write_groups

    if args.trust_remote_code and not args.model:
        args.parser.error("--trust-remote-code is for --model, which is not given; leave it out")
    check_outputs({"--out": args.out}, {"FILE": args.files, "--dataset": [args.dataset]}, {"--out": LINES})
    source = _source(args)
    reading = _reading(args, source)
    if args.allow_pickle:
        print(f"pickles       --allow-pickle: code that {', '.join(map(printable, args.files))} names is run")
    left = Left(args.skip_bad)
    written = write_groups(args.out, groups_of(args.files, args.source, reading, left, print))
    print(
        f"trajectories  {args.out}: {counted(written.prompts, 'prompt')}, {counted(written.responses, 'response')}; "
        f"token ids in {written.with_ids} records, log-probs in {written.with_logprobs}"
    )
    tell(
        args, out=args.out, prompts=written.prompts, responses=written.responses, with_ids=written.with_ids,
        with_logprobs=written.with_logprobs, left_out=dict(left.counts),
    )  # fmt: skip
    if left.counts:
        reasons = ", ".join(f"{count} by {name}" for name, count in sorted(left.counts.items()))
        print(f"left out      {counted(left.counts.total(), 'sample')}: {reasons}")
        for error in left.first.values():
            print(printable(f"  the first   {error.where}: {error.problem}"))
    return 0


def _source(args: argparse.Namespace) -> str:
    """Which program wrote the files; "auto" where no option depends on it.

    Raises:
        CropiError: an option is for dumps of other programs.
    """
    from cropi.errors import CropiError
    from cropi.trainers.dumps.folders import expanded
    from cropi.trainers.dumps.recognise import RECORDS, SOURCES, recognise

    source: str = args.source
    if source == "auto" and (args.dataset or args.model or args.reward):
        source = recognise(expanded(args.files, lambda line: None)[0])
    if source == RECORDS and (args.dataset or args.model):
        raise CropiError(
            "--dataset and --model are for dumps that do not name their prompts; records have ids"
        )
    if source != "openai" and bool(args.dataset) != bool(args.model):
        raise CropiError(
            "--dataset and --model are needed together: prompts are found by what the model's template makes of them"
        )
    if args.reward and source not in ("vllm", "openai"):
        raise CropiError(
            f"--reward is for vLLM's outputs and chat completions; {SOURCES[source].words} hold rewards"
        )
    return source


def _reading(args: argparse.Namespace, source: str) -> Reading:
    """How the files are read, by the options."""
    from cropi.data.forms import parse_columns
    from cropi.trainers.dumps.reading import Reading
    from cropi.trainers.dumps.scoring import Scorer

    by_text, columns = args.dataset and source != "openai", parse_columns(args.columns)
    # Dumps that need it name no prompt themselves.
    prompt = columns.pop("prompt", None) if by_text else None
    return Reading(
        id_key=None if by_text else args.id_key, temperature=args.temperature, steps=args.steps,
        allow_pickle=args.allow_pickle, largest=int(args.max_gib * 2**30), columns=columns,
        requests=args.dataset if source == "openai" else None,
        prompts=_prompts(args, source, prompt) if by_text else None,
        tokenizer=(lambda: _tokenizer(args)) if args.model else None,
        scorer=Scorer(args.reward) if args.reward else None,
    )  # fmt: skip


def _tokenizer(args: argparse.Namespace) -> Any:
    from pathlib import Path

    from cropi.errors import optional
    from cropi.model.load import load_tokenizer
    from cropi.model.sources import base_of, check_readable, holds_tokenizer

    folder = Path(args.model)
    # A tokenizer alone, or that of an adapter.
    if (
        is_folder(folder)
        and not is_there(folder / "config.json")
        and (holds_tokenizer(folder) or base_of(args.model) is None)
    ):
        check_readable(f"model {args.model!r}", folder)
        return optional("transformers").AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=args.trust_remote_code
        )
    return load_tokenizer(args.model, eos=False, trust_remote_code=args.trust_remote_code)


def _prompts(args: argparse.Namespace, source: str, column: str | None) -> Any:
    from cropi.trainers.dumps.named import DatasetPrompts
    from cropi.trainers.verl.selected import ID_KEY

    first = ID_KEY if source == "verl" else None
    return DatasetPrompts.of(args.dataset, args.id_key, _tokenizer(args), first, column)
