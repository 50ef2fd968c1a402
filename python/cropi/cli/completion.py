"""``cropi completion``: a script by which a shell completes commands, options, choices and files."""

from __future__ import annotations

import argparse

from cropi.cli.parser import FILES
from cropi.errors import optional

SHELLS = ("bash", "zsh")

EXAMPLE = "cropi completion bash"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument("shell", choices=SHELLS, help="which shell")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from cropi.cli import make_parser

    shtab = optional("shtab")
    parser = make_parser()
    _with_files(parser, shtab)
    script = shtab.complete(parser, shell=args.shell)
    print(script, end="")
    return 0


def _with_files(parser: argparse.ArgumentParser, shtab: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                _with_files(inner, shtab)
        elif action.nargs != 0 and not action.choices:
            words = str(action.metavar or action.dest).upper()
            if any(word in words for word in FILES) or action.dest in ("model", "folder"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
