"""``cropi env``: versions, machine and kernels, for a report of a fault."""

from __future__ import annotations

import argparse

from cropi.cli.manners import tell

EXAMPLE = "cropi env"


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options: none of its own."""


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from cropi.bench.machine import machine, versions

    facts = versions() | machine()
    tell(args, **facts)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return 0
