"""The user's commands: templates with names in braces, run by the shell, with their output in a log."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from cropi.errors import CropiError, did_you_mean
from cropi.files import writing

# ${NAME} is the shell's own, {{name}} a brace that is meant; {a,b} and {"key": 1} are not names.
NAME = re.compile(r"\{\{(\w+)\}\}|(?<!\$)\{([A-Za-z_]\w*)\}")
LAST_LINES = 15
# What no shell reads as more than a letter.
SAFE = re.compile(r"[\w@%+=:,./-]*")


def check_template(option: str, template: str, allowed: Sequence[str]) -> set[str]:
    """The names in a template.

    Raises:
        CropiError: the template is empty or has an unknown name; the nearest known one is offered.
    """
    if not template.strip():
        raise CropiError(f"{option}: the command is empty; give one, or leave the option out")
    names = {match[2] for match in NAME.finditer(template) if match[2]}
    for name in sorted(names - set(allowed)):
        hint = did_you_mean(name, allowed, "{{{}}}")
        raise CropiError(
            f"{option}: {{{name}}} is not known here; {hint}known are {', '.join(f'{{{n}}}' for n in allowed)} "
            f"(write {{{{{name}}}}} for the braces themselves)"
        )
    return names


def fill(template: str, values: Mapping[str, object], *, quote: bool = True, option: str = "command") -> str:
    """Put values in the places of their names, quoted for the shell.

    Inside quotes of the user's the value goes in as it is, since a second pair of quotes would end the first. There it
    may hold no character that any shell reads as more than a letter: what stands in quotes is often read by another one
    (``sh -c "... {model}"``).

    Args:
        template: with names in braces.
        values: by name.
        quote: for the shell; False for a path.
        option: whose command this is, for messages.

    Raises:
        CropiError: a value with a blank or a special character stands inside quotes.
    """

    def put(match: re.Match[str]) -> str:
        if match[1]:
            return f"{{{match[1]}}}"
        value = str(values[match[2]])
        if not quote:
            return value
        if not _quoted(template[: match.start()]):
            return shlex.quote(value)
        if not SAFE.fullmatch(value):
            raise CropiError(
                f"{option}: {{{match[2]}}} stands inside quotes, and its value {value!r} holds characters that a shell "
                f"would read in its own way; take it out of the quotes, or write ${variable(match[2])} in its place"
            )
        return value

    return NAME.sub(put, template)


def variable(name: str) -> str:
    """The environment variable that holds a name's value while a command runs."""
    return f"CROPI_{name.upper()}"


def _quoted(text: str) -> bool:
    """Whether the shell is inside quotes at the end of ``text``."""
    quote, position = "", 0
    while position < len(text):
        ch = text[position]
        if ch == "\\" and quote != "'":
            position += 1
        elif quote:
            quote = "" if ch == quote else quote
        elif ch in "'\"":
            quote = ch
        position += 1
    return bool(quote)


def run_command(
    option: str,
    command: str,
    log: Path,
    keep_open: Sequence[int] = (),
    values: Mapping[str, object] | None = None,
) -> None:
    """Run a command by ``/bin/sh``, its output appended to ``log``.

    Ctrl-C reaches the command by itself; it is waited for, so that it can save what it has.

    Args:
        option: whose command this is, for messages.
        command: the whole command line.
        log: a file.
        keep_open: file descriptors that the command inherits (a lock that must outlive this process).
        values: what it finds in its environment, ``{model}`` as ``$CROPI_MODEL`` and so on.

    Raises:
        CropiError: it failed; with its exit status and the last lines of its output.
    """
    with contextlib.ExitStack() as stack:
        with writing(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(log, "ab", buffering=0))
            file.write(f"$ {command}\n".encode())
            start = file.tell()
        process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            pass_fds=tuple(keep_open),
            env=os.environ | {variable(name): str(value) for name, value in (values or {}).items()},
        )  # fmt: skip
        try:
            status = process.wait()
        except BaseException:
            process.wait()
            raise
    if status:
        shown = "\n".join(f"  | {line}" for line in _last_lines(log, start)) or "  (it wrote nothing)"
        raise CropiError(
            f"{option}: the command {_ended(status)}\n  $ {command}\n{shown}\nits whole output is in {log}; mend "
            "what is wrong and run the same `cropi curriculum` again: it goes on with this step"
        )


def _ended(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    # The shell reports a child that died by a signal as 128 + its number.
    name = f" ({signal.Signals(status - 128).name})" if status - 128 in set(signal.Signals) else ""
    return f"ended with exit status {status}{name}"


def _last_lines(log: Path, start: int) -> list[str]:
    with open(log, "rb") as file:
        file.seek(max(start, os.path.getsize(log) - 20000))
        text = file.read().decode("utf-8", errors="replace")
    # A progress bar redraws its line; only what it ended with is worth reading.
    return [line.rpartition("\r")[2] for line in text.splitlines() if line.strip()][-LAST_LINES:]
