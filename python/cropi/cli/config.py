"""A config file in place of a long command line."""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cropi.cli.parser import FILES, Parser
from cropi.errors import CropiError, did_you_mean, optional, printable, shown
from cropi.files import check_name, meant, reading
from cropi.option_fields import MARKS, words_of

# Options that make no sense inside a config file.
UNUSABLE = ("config", "help", "dry_run", "json", "quiet", "verbose", "debug")
# What says nothing about the result.
NOT_KEPT = (*UNUSABLE, "progress")
CONFIG = "config.yaml"
MOST_VALUES = 10_000
LARGEST = 2**20  # bytes
DEEPEST = 64  # as of records
WIDEST = 128  # bits of an integer


def apply_config(args: argparse.Namespace, tables: Sequence[str] = ()) -> None:
    """Set the options that the file ``args.config`` gives and the command line does not.

    Keys are the long option names, with ``-`` or ``_``; tables group them freely (``[sketch]`` / ``dim = 4096``), but
    those of :data:`~cropi.option_fields.MARKS`, which are values (``[groups]`` / ``mlp = ["*mlp*"]``), and those named
    in ``tables``, which become attributes of ``args`` as they are.

    Raises:
        CropiError: no such file, not TOML or YAML, or a key that is not an option, which is named with the nearest one.
    """
    path = Path(args.config)
    content = _read(path)
    for name in tables:
        table = content.pop(name, {}) if isinstance(content, dict) else {}
        if not isinstance(table, dict):
            raise CropiError(f"{path}: {name!r} should be a table of keys and values, got {shown(table)}")
        setattr(args, name, table)
    values = _flat(path, content)
    parser: Parser = args.parser
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    words, given = list[str](), dict[argparse.Action, str]()
    for key, value in values.items():
        option = f"--{key.replace('_', '-')}"
        action = actions.get(key) or next((a for a in actions.values() if option in a.option_strings), None)
        if action is None or key in UNUSABLE:
            known = [name for name in [*actions, *tables] if name not in UNUSABLE]
            raise CropiError(
                f"{path}: {shown(key)} is not an option of `{parser.prog}`; {did_you_mean(key, known)}see "
                f"`{parser.prog} --help`"
            )
        if given.setdefault(action, key) != key:  # the name of a value and that of its switch
            raise CropiError(f"{path}: {given[action]!r} and {key!r} are one option; leave one of them out")
        words += _words(path, key, value, action)
    # The file's options first, the command line's after them: what is parsed last wins. In two passes, because a list
    # at the end of the one would swallow a positional argument at the beginning of the other.
    positional = [str(getattr(args, a.dest)) for a in parser._actions if not a.option_strings]
    parser.source = str(path)
    parser.parse_args([*positional, *words], namespace=args)
    parser.source = ""
    parser.parse_args(args.words, namespace=args)


def write_config(args: argparse.Namespace, out: Path) -> Path:
    """Write every option of a command to ``out``'s :data:`CONFIG`, for ``--config``.

    Options that name files have their absolute paths, where those are there, so that the file works from any folder.
    """
    import cropi
    from cropi.atomic import write_atomic

    parser: Parser = args.parser
    held: dict[str, Any] = {}
    for action in parser._actions:
        if not action.option_strings or action.dest in NOT_KEPT:
            continue
        value = getattr(args, action.dest, None)
        if value is None and action.default is not None:
            value = "full"  # a width without a fold
        if value is None or value == []:
            continue
        if value != action.default and any(name in str(action.metavar) for name in FILES):
            several = isinstance(value, (list, tuple))
            value = [_absolute(one) for one in value] if several else _absolute(value)
        held[action.dest] = list(value) if isinstance(value, tuple) else value
        if action.dest in ("out", "export"):
            held[action.dest] = os.path.abspath(str(value))
    text = optional("yaml").safe_dump(held, sort_keys=False, allow_unicode=True, width=120)
    words = shlex.join(["cropi", args.command, *args.words])
    head = f"# cropi {cropi.__version__}; made by: {printable(words)}\n"
    head += f"# `cropi {args.command} --config {CONFIG}` repeats it\n"
    path = out / CONFIG
    write_atomic(path, head + text)
    return path


def _absolute(value: Any) -> Any:
    return os.path.abspath(value) if isinstance(value, str) and os.path.exists(value) else value


def _words(path: Path, key: str, value: Any, action: argparse.Action) -> list[str]:
    """One config entry as command-line words, so that both are checked by the same rules."""
    option = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise CropiError(f"{path}: {key!r} must be true or false, got {shown(value)}")
        # `eos: false` names the value, `no_eos: true` the switch; both give --no-eos.
        given = value != action.default if key == action.dest else value
        return [option] if given else []
    if value is None:
        raise CropiError(f"{path}: {key!r} has no value; give one, or remove the line")
    values = [_word(path, key, one) for one in (value if isinstance(value, list) else [value])]
    if action.nargs is None:
        if len(values) != 1:
            raise CropiError(f"{path}: {key!r} takes one value, got {shown(value)}")
        if isinstance(value, float) and action.type in (None, str):  # 1.10 is 1.1
            raise CropiError(f"{path}: {key!r} is text, got the number {value!r}; put it into quotes")
        return [f"{option}={values[0]}"]  # in one word, so that a value may begin with a dash
    return [option, *values] if values else []


def _word(path: Path, key: str, value: Any) -> str:
    """A value as a word of the command line.

    Raises:
        CropiError: nothing, a list or a table; or what the file's language makes of a word without quotes (YAML of no,
            off and 12:30:00), so that it cannot be told what was written.
    """
    if isinstance(value, datetime.datetime) or not isinstance(value, (str, int, float, datetime.date)):
        raise CropiError(
            f"{path}: {key!r} must be text or a number, got {shown(value)}; put text into quotes"
        )
    if isinstance(value, bool):
        raise CropiError(
            f"{path}: {key!r} must be text or a number, got {value}, which YAML makes of yes, no, on and off, too; put "
            "text into quotes"
        )
    return str(value)


def read_config(path: Path) -> dict[str, Any]:
    """What a config file holds, by the names of its options; tables are groups.

    Raises:
        CropiError: as :func:`apply_config`.
    """
    return _flat(path, _read(path))


def _read(path: Path) -> Any:
    if not os.path.isfile(path):
        check_name(path)
        raise CropiError(f"there is no config file {path}; {meant(path)}give the path of one")
    try:
        with reading(path, missing=True):
            if os.path.getsize(path) > LARGEST:
                raise CropiError(f"{path} has more than {LARGEST >> 20} MiB, which no config file has")
            text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            return _bounded(path, optional("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text))
        if path.suffix in (".yaml", ".yml"):
            return _bounded(path, _yaml(path, text) or {})
    except (ImportError, CropiError):
        raise
    except Exception as error:  # both parsers have errors of their own
        raise CropiError(
            f"{path}: not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}"
        ) from error
    raise CropiError(f"{path}: a config file ends in .toml, .yaml or .yml")


# What YAML 1.2 takes for a number, too; the rest stays text, which the command line reads.
_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?(0|[1-9][0-9]*)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+][0-9]+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
}


def _yaml(path: Path, text: str) -> Any:
    """As ``yaml.safe_load``, which takes the last of several values of one key without a word, and reads numbers to the
    base of 8 and of 60."""
    yaml = optional("yaml")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                name = str(key.value)  # a table may stand for a key, too
                if name in seen and name != "<<":
                    raise CropiError(f"{path}: {shown(name)} is given twice; leave one of them out")
                seen.add(name)
            return super().construct_mapping(node, deep)

    # 010 would be 8, and 1:30 would be 90.
    Loader.yaml_implicit_resolvers = {
        first: [(tag, _NUMBERS.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, Loader)


def _bounded(path: Path, content: Any) -> Any:
    """The content, if it is of a size that a person writes: a few YAML aliases of aliases make billions of values."""
    waiting, count, deepest = [(content, 0)], 0, 0
    while waiting:
        value, depth = waiting.pop()
        deepest = max(deepest, depth)
        if isinstance(value, int) and value.bit_length() > WIDEST:
            raise CropiError(
                f"{path} holds {shown(value)}; no option takes an integer of more than {WIDEST} bits"
            )
        if isinstance(value, dict):
            waiting += [(one, depth + 1) for pair in value.items() for one in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(one, depth + 1) for one in value]
        else:
            continue
        count += len(value)
        if count > MOST_VALUES:
            raise CropiError(f"{path} holds more than {MOST_VALUES} values once its aliases are filled in")
    if deepest > DEEPEST:
        raise CropiError(f"{path} holds tables or lists nested deeper than {DEEPEST}")
    return content


def _flat(path: Path, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CropiError(f"{path}: keys and values are expected")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str):  # YAML reads `no:` and `1:` as a truth value and a number
            raise CropiError(f"{path}: the key {shown(key)} is not a string; put it into quotes")
        own = key.replace("-", "_")
        if isinstance(value, dict) and own in MARKS:
            value = _pairs(path, own, value)
        for name, inner in _flat(path, value).items() if isinstance(value, dict) else [(own, value)]:
            if name in flat:
                raise CropiError(f"{path}: {shown(name)} is given twice; leave one of them out")
            flat[name] = inner
    return flat


def _pairs(path: Path, option: str, table: dict[Any, Any]) -> Any:
    """A table as the words of an option of :data:`~cropi.option_fields.MARKS`.

    Raises:
        CropiError: a name or a value that is no text and no number, or holds what would separate it.
    """
    texts: dict[str, list[str]] = {}
    for name, value in table.items():
        if not isinstance(name, str):
            raise CropiError(
                f"{path}: the key {shown(name)} in {option!r} is not a string; put it into quotes"
            )
        values = value if isinstance(value, list) else [value]
        texts[name] = [_word(path, f"{option}.{name}", one) for one in values]
    try:
        return words_of(option, texts)
    except CropiError as error:
        raise CropiError(f"{path}: {error}") from None
