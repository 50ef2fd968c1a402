"""A config file in place of a long command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cropi.errors import CropiError, optional


def apply_config(args: argparse.Namespace) -> None:
    """Set the options that the file ``args.config`` gives and the command line does not.

    Keys are the long option names, with ``-`` or ``_``; tables group them freely (``[sketch]`` / ``dim =
    4096``).

    Raises:
        CropiError: no such file, not TOML or YAML, or a key that is no option; the key is named.
    """
    path = Path(args.config)
    values = _flat(path, _read(path))
    parser: argparse.ArgumentParser = args.parser
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    words: list[str] = []
    for key, value in values.items():
        action = actions.get(key) or next(
            (a for a in actions.values() if f"--{key.replace('_', '-')}" in a.option_strings), None
        )
        if action is None or key in ("config", "help"):
            raise CropiError(
                f"{path}: {key!r} is not an option of `{parser.prog}`; see `{parser.prog} --help`"
            )
        words += _words(path, key, value, action)
    # The file's options first, the command line's after them: argparse lets the last one win.
    parser.parse_args([*words, *args.words], namespace=args)


def _words(path: Path, key: str, value: Any, action: argparse.Action) -> list[str]:
    """One config entry as command-line words, so that both are checked by the same rules."""
    option = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise CropiError(f"{path}: {key!r} must be true or false, got {value!r}")
        return [option] if value != action.default else []
    values = value if isinstance(value, list) else [value]
    if action.nargs is None and len(values) != 1:
        raise CropiError(f"{path}: {key!r} takes one value, got {value!r}")
    return [option, *map(str, values)]


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CropiError(f"there is no config file {path}")
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".toml":
            return optional("tomllib" if sys.version_info >= (3, 11) else "tomli").loads(text)
        if path.suffix in (".yaml", ".yml"):
            return optional("yaml").safe_load(text) or {}
    except ImportError:
        raise
    except Exception as error:  # both parsers have errors of their own
        raise CropiError(
            f"{path}: not valid {path.suffix[1:].upper()}: {' '.join(str(error).split())}"
        ) from error
    raise CropiError(f"{path}: a config file ends in .toml, .yaml or .yml")


def _flat(path: Path, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CropiError(f"{path}: keys and values are expected")
    flat: dict[str, Any] = {}
    for key, value in values.items():
        for name, inner in (
            _flat(path, value).items() if isinstance(value, dict) else [(key.replace("-", "_"), value)]
        ):
            if name in flat:
                raise CropiError(f"{path}: {name!r} is given twice")
            flat[name] = inner
    return flat
