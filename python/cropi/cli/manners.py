"""What every command has: ``--json``, ``-q``, ``-v``, ``--debug``, and where their output goes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from cropi.errors import printable_lines


class Plain:
    """A stream whose control characters are escaped: ids, tasks and names come from files that others made."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream's, the whole text at once."""
        self._stream.write(printable_lines(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def add_options(command: argparse.ArgumentParser, *, inner: bool = False) -> None:
    """Declare the options; ``inner``: of an action of a command, whose own values stay where nothing is given."""
    group = command.add_argument_group("output")
    off: Any = argparse.SUPPRESS if inner else False
    for flags, dest, text in (
        (
            ("--json",),
            "json",
            "print what was done as one JSON object, and everything else to standard error",
        ),
        (("-q", "--quiet"), "quiet", "print warnings and errors only, and no progress"),
        (
            ("-v", "--verbose"),
            "verbose",
            "say which versions and kernels run, and where a warning comes from",
        ),
        (("--debug",), "debug", "show the traceback of an error"),
    ):
        group.add_argument(*flags, dest=dest, action="store_true", default=off, help=text)


def tell(args: argparse.Namespace, **figures: Any) -> None:
    """What ``--json`` prints of a command, beside its name and whether it succeeded."""
    vars(args).setdefault("figures", {}).update(figures)


@contextlib.contextmanager
def speaking(args: argparse.Namespace) -> Iterator[None]:
    """Inside, prints go where they are wanted, control characters are escaped, and warnings are one line each."""
    if args.quiet:
        args.progress = False
    if args.verbose:
        print(versions(), file=sys.stderr)

    said = set[str]()

    def warn(message: Any, category: Any, filename: str, lineno: int, *rest: Any, **more: Any) -> None:
        if str(message) in said:  # by another pass over the same files
            return
        said.add(str(message))
        where = f" ({category.__name__}, {filename}:{lineno})" if args.verbose else ""
        print(printable_lines(f"warning: {message}{where}"), file=sys.stderr)

    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = warn
        target: Any = sys.stderr if args.json else sys.stdout
        if args.quiet:
            target = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(Plain(target)))
        yield


def conclude(args: argparse.Namespace, status: int, error: BaseException | None = None) -> None:
    """Print the JSON object, where it is wanted."""
    if not getattr(args, "json", False):
        return
    outcome: dict[str, Any] = {"command": args.command, "status": status, **getattr(args, "figures", {})}
    if error is not None:
        outcome["error"] = str(error)
    print(json.dumps(_plain(outcome), ensure_ascii=True, indent=2))


def _plain(value: Any) -> Any:
    """In JSON's types: paths and dates as text, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and value != value or value in (float("inf"), -float("inf")):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def versions() -> str:
    """Versions, threads and the CPU's kernels, in one line."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import cropi

    words = [f"cropi {cropi.__version__}", f"Python {sys.version.split()[0]}", f"torch {torch.__version__}"]
    for name in ("transformers", "datasets", "pyarrow", "peft", "trl"):
        with contextlib.suppress(PackageNotFoundError):
            words.append(f"{name} {version(name)}")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{', '.join(words)}; {torch.get_num_threads()} threads; {device}"
