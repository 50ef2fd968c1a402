"""The argument parser: one line for a mistake, with the option that may have been meant."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from cropi.errors import did_you_mean, printable_lines, shortened

T = TypeVar("T", int, float)
# What `metavar` calls the values that name files and folders.
FILES = ("FILE", "FOLDER", "PATH")
# Options that a usage line names although a config file may hold them: what nearly every call gives.
MAIN = ("config", "model", "train", "valid", "out")


class Parser(argparse.ArgumentParser):
    """As argparse's, without two screens of usage before the message. ``source`` is the file that the words come from,
    if they do not come from the command line."""

    source = ""

    def format_help(self) -> str:
        """As argparse's, with the options that a call needs in the usage line, and not two screens of all of them."""
        named = [a for a in self._actions if a.required or not a.option_strings or a.dest in MAIN]
        if self.usage is None and len(self._actions) > len(named) + 3:
            formatter = self._get_formatter()
            formatter.add_usage(None, named, [])
            self.usage = (
                formatter.format_help().removeprefix("usage: ").strip().replace("%", "%%") + " [options]"
            )
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        """Say it, and leave with status 2."""
        told = printable_lines(shortened(f"{self.source}: {message}" if self.source else message))
        self.exit(2, f"{self.prog}: error: {told}; see `{self.prog} --help`\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            if hint := did_you_mean(str(value), map(str, action.choices or ())):
                error.message = f"{error.message}, {hint.strip()}"
            raise

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """For unknown words, the command that they were given to reports the error."""
        known_args, unknown = super().parse_known_args(args, namespace)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(f"{unknown[0]!r} belongs to no option: write the option's name before it")
            known = [name for action in self._actions for name in action.option_strings]
            hint = did_you_mean(unknown[0].partition("=")[0], known, "{}")
            self.error(f"there is no option {unknown[0]!r}{hint and ', ' + hint.strip()}")
        return known_args, unknown


def about(summary: str, example: str) -> dict[str, Any]:
    """How a command is declared: its summary, and a command line as an example, which stays on its lines."""
    return {
        "help": summary,
        "description": textwrap.fill(f"{summary[0].upper()}{summary[1:]}.", 79),
        "epilog": f"example:\n  {example}",
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        # A prefix of an option is not an option: scripts would break when a longer one is added.
        "allow_abbrev": False,
    }


def option_group(command: argparse.ArgumentParser, title: str) -> Any:
    """The group of options with this title, made where the command has none yet."""
    groups = {made.title: made for made in command._action_groups}
    return groups.get(title) or command.add_argument_group(title)


class ShowVersion(argparse.Action):
    """Print the version; nothing is imported for it."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any) -> NoReturn:
        import cropi

        print(parser.prog, cropi.__version__)
        parser.exit()


def count(text: str) -> int:
    """An integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "give an integer of at least 1")


def share(text: str) -> float:
    """A number in (0, 1]."""
    return _number(text, float, lambda value: 0 < value <= 1, "give a number in (0, 1]")


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, float, lambda value: 0 < value < float("inf"), "give a number above 0")


def width(text: str, largest: int = 1 << 16) -> int | None:
    """A power of two that SketchSpec takes as ``width``, or None for "full"."""
    if text == "full":
        return None
    power = f"give a power of two from 16 to {largest}, or 'full' for no fold"
    return _number(text, int, lambda value: 16 <= value <= largest and value.bit_count() == 1, power)


def vocab_width(text: str) -> int | None:
    """As :func:`width`, for ``vocab_width``."""
    return width(text, 1 << 20)


def shard(text: str) -> tuple[int, int]:
    """``i/n``: share i of n, counted from 1."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give i/n with 1 <= i <= n, such as 1/4, 2/4, 3/4 and 4/4"
        )
    return int(number), int(count)


def _number(text: str, kind: Callable[[str], T], good: Callable[[T], bool], remedy: str) -> T:
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: {remedy}") from None
    if not good(value):
        raise argparse.ArgumentTypeError(f"{text!r}: {remedy}")
    return value
