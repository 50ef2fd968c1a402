"""The command line: ``cropi rollout``, ``sketch``, ``run`` and the others; a module each."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from cropi.cli import manners
from cropi.cli.manners import Plain, conclude, speaking
from cropi.cli.parser import Parser, ShowVersion, about
from cropi.cli.streams import lasting_streams
from cropi.errors import printable_lines, shortened
from cropi.temporary import removed_by_signals

__all__ = ["COMMANDS", "Plain", "main", "make_parser"]

COMMANDS = {
    "rollout": "sample responses to prompts and score them by a reward function: trajectories for the other commands",
    "sketch": "sketch the policy gradient of every prompt in trajectory files",
    "influence": "score training sketches against validation sketches",
    "select": "choose the best fraction of the prompts",
    "run": "sketch, influence and select in one, from a command line or a config file",
    "check": "compare sketches with exact gradients on some of the prompts: the error, what a pool costs, a verdict",
    "report": "write one HTML page: what was chosen, why, and whether to believe it",
    "convert": "write a trainer's rollout dumps as trajectory records",
    "curriculum": "select and train in stages, from one config file",
    "store": "merge, verify, compact or export stores of sketches",
    "bench": "time the kernels on this machine, beside the least that they could take",
    "env": "show versions, machine and kernels, for a report of a fault",
    "info": "show what a file or a folder holds, of all that these commands read and write",
    "completion": "print a script by which bash or zsh completes commands, options and files",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 where its output was lost (a full disk, a reader that has gone)
    and the work is done even so, 2 for bad input, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else list(argv)
    parser = make_parser()
    if not words:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(words)
    args.words = words[1:]
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal without a prompt's letters must not end the work.
        sys.stdout.reconfigure(errors="backslashreplace")
    with lasting_streams() as out, removed_by_signals():
        status = _run(args)
    return 1 if out.lost and not status and not args.quiet else status


def _run(args: Any) -> int:
    try:
        _check_words(args.words)
        with speaking(args):
            status: int = args.run(args)
        conclude(args, status)
        return status
    except KeyboardInterrupt:
        print(f"cropi {args.command}: stopped; what was stored is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if args.debug:
            raise
        from cropi.files import in_words

        told = in_words(error)
        # Errors of the kernels, of torch and of transformers are as long as they like.
        print(printable_lines(f"cropi {args.command}: error: {shortened(str(told))}"), file=sys.stderr)
        conclude(args, 2, told)
        return 2


def _check_words(words: Sequence[str]) -> None:
    """Check that what was given can be noted in files, before work whose results could not name it."""
    from cropi.files import PATHS, beyond_paths
    from cropi.form import check_noted, is_writable

    for word in words:
        if PATHS != "utf-8" and not is_writable(word):
            raise beyond_paths(os.fsencode(word).decode(errors="replace"))
        check_noted(word)


def make_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="cropi",
        description="Choose the training prompts that help most, from stored rollouts, by sketched policy gradients.",
        epilog="`cropi COMMAND --help` explains a command and its options.",
    )
    parser.add_argument("-V", "--version", action=ShowVersion, nargs=0, help="show the version")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = import_module(f"cropi.cli.{name}")
        command = commands.add_parser(name, **about(summary, module.EXAMPLE))
        module.add_options(command)
        manners.add_options(command)
        command.set_defaults(run=module.run, parser=command)
    return parser
