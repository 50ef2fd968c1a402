"""``cropi env``: versions, machine and kernels, for a report of a fault."""

from __future__ import annotations

import argparse
import json


def add_options(command: argparse.ArgumentParser) -> None:
    """Declare the options."""
    command.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    from cropi.bench.machine import machine, versions

    found = versions() | machine()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")
    return 0
