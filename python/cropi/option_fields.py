"""How options are declared, checked, and taken from mappings: the mechanism under :mod:`cropi.options`.

Nothing here imports torch, so that ``cropi --help`` is quick.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
from inspect import signature
from typing import Any, TypeVar

from cropi.checked import check_fields
from cropi.errors import CropiError, article, did_you_mean, shown

T = TypeVar("T")
# Options of NAME=VALUE words, and what separates their parts: in names, and in values.
MARKS = {"groups": ("=", ","), "quota": ("", ""), "columns": ("=,", ",")}


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    kind: str = "text",
    metavar: str | None = None,
    flag: str | None = None,
    shown: str | None = None,
    many: bool = False,
    table: bool = False,
) -> Any:
    """A field of an options class.

    Args:
        default: its value where nothing is given.
        help: a phrase that stands alone; the default is added to it.
        choices: the strings that it may be.
        kind: how the command line reads it: "text", "count" (an integer of at least 1), "whole" (any integer),
            "number", "positive" (a number above 0), "share" (a number in (0, 1]), "width" or "vocab_width" (a power of
            two, or "full" for None), "switch" (a truth value).
        metavar: what stands for the value in ``--help``.
        flag: the flag, where it is not the name with dashes.
        shown: how ``--help`` words the default, where ``str(default)`` does not say it.
        many: any number of values.
        table: Python may give a dictionary in the place of its NAME=VALUE words, as a config file a table; its name is
            one of :data:`MARKS`.
    """
    about = {
        "help": help,
        "choices": tuple(choices),
        "kind": kind,
        "metavar": metavar,
        "flag": flag,
        "shown": shown,
        "many": many,
        "table": table,
    }
    if many:
        return field(default=tuple(default), metadata=about)
    return field(default=default, metadata=about)


class Options:
    """What all option classes share: every value is checked when an instance is made."""

    def __post_init__(self) -> None:
        for about in fields(self):  # type: ignore[arg-type]
            name, value = about.name, getattr(self, about.name)
            if about.metadata.get("table") and isinstance(value, Mapping):
                table = {str(key): ["" if held is None else str(held)] for key, held in value.items()}
                object.__setattr__(self, name, words_of(name, table))
        # First, because "must be a string" does not say which ones there are: of dtype=torch.float16, for example.
        for about in fields(self):  # type: ignore[arg-type]
            _check_choice(about, getattr(self, about.name))
        check_fields(self)
        for about in fields(self):  # type: ignore[arg-type]
            _check(about, getattr(self, about.name))


def words_of(option: str, table: Mapping[str, Sequence[str]]) -> Any:
    """A table of NAME=VALUE,... as the words of an option of :data:`MARKS`, so that a store does not tell one from the
    other; columns are one word.

    Raises:
        CropiError: a name or a value holds what would separate it.
    """
    words, (in_names, in_values) = [], MARKS[option]
    for name, parts in table.items():
        for text, marks in ((name, in_names), *((part, in_values) for part in parts)):
            if odd := [mark for mark in marks if mark in text]:
                raise CropiError(f"{option}: {shown(text)} holds {odd[0]!r}, which separates names here")
        words.append(f"{name}={','.join(parts)}")
    return ",".join(words) if option == "columns" else words


def _check_choice(about: Field[Any], value: Any) -> None:
    choices = about.metadata.get("choices")
    if not choices or (value is None and about.default is None):
        return
    if not isinstance(value, str) or value not in choices:
        raise CropiError(f"{about.name} must be one of {', '.join(choices)}, got {value!r:.200}")


def _check(about: Field[Any], value: Any) -> None:
    name, kind = about.name, about.metadata.get("kind")
    if value is None or kind is None:
        return
    if kind == "count" and value < 1:
        raise CropiError(f"{name} must be at least 1, got {value!r}")
    if kind == "positive" and not value > 0:
        raise CropiError(f"{name} must be a number above 0, got {value!r}")
    if kind == "share" and not 0 < value <= 1:
        percent = f"; {value:g} % is {value / 100:g}" if 1 < value <= 100 else ""
        raise CropiError(f"{name} must be in (0, 1], got {value!r}{percent}")


def check_used(given: Options, **used: tuple[str, bool]) -> None:
    """Refuse values that nothing reads.

    Args:
        given: the options.
        used: of an option, what it belongs to, and whether that was chosen.

    Raises:
        CropiError: names an option that is not at its default, its value and what it belongs to.
    """
    for about in fields(given):  # type: ignore[arg-type]
        belongs, chosen = used.get(about.name, ("", True))
        if not chosen and (value := getattr(given, about.name)) != about.default:
            raise CropiError(f"{about.name} {value} is of no use here: it is for {belongs}; leave it out")


def names_of(*classes: type[Any]) -> list[str]:
    """The names of the options of some classes."""
    return [about.name for one in classes for about in fields(one)]


def keywords_of(*classes: type[Any], more: Sequence[str] = ()) -> dict[str, str]:
    """What the flags of some classes are in Python, for :func:`cropi.errors.as_keywords`; ``more``: other parameters.

    >>> from cropi.options import Tokens
    >>> made = keywords_of(Tokens)
    >>> made["--no-eos"], made["--too-long"]
    ('eos=False', 'too_long=')
    """
    made = {f"--{name.replace('_', '-')}": f"{name}=" for name in more}
    for about in (about for one in classes for about in fields(one)):
        flag = about.metadata.get("flag") or f"--{about.name.replace('_', '-')}"
        made[flag] = f"{about.name}={not about.default if isinstance(about.default, bool) else ''}"
    return made


def part_of(options: Any, one: type[Any]) -> dict[str, Any]:
    """The options of one class that an instance of another one, which has them too, holds."""
    return {name: getattr(options, name) for name in names_of(one)}


def changed(options: Any, *classes: type[Any], always: Sequence[str] = ()) -> dict[str, Any]:
    """The options of some classes that an instance sets, as JSON values.

    Those are the options that differ from their defaults, and the options that are named in ``always``.

    >>> from cropi.options import Selecting
    >>> changed(Selecting(method="max"), Selecting, always=["fraction"])
    {'fraction': 0.1, 'method': 'max'}
    >>> changed(Selecting(quota=[]), Selecting)   # as the command line has it
    {}
    """

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        about.name: value
        for one in classes
        for about in fields(one)
        if (value := plain(getattr(options, about.name))) != plain(about.default) or about.name in always
    }


def one_of(made: T | None, given: Mapping[str, Any], cls: type[T]) -> T:
    """An instance of an options class: the one that was made, or that of the options that were given by keyword.

    Raises:
        CropiError: both were given, or a name that is not an option.
    """
    if made is None:
        options: T = split(given, cls)[0]
        return options
    if given:
        raise CropiError(f"{next(iter(given))!r} is given beside {article(cls.__name__)}: put it in there")
    return made


# What `n` is called elsewhere: one letter is near to no word.
HOW_MANY = ("prompts", "n_prompts", "num_prompts", "samples", "count")


def split(
    given: Mapping[str, Any],
    *classes: type[Any],
    also: Sequence[str] = (),
    by: Callable[..., Any] | None = None,
) -> list[Any]:
    """Instances of some option classes from one mapping of names to values; ``also``: names that the caller ``by``
    takes, whose parameters may be meant by a misspelt name, too.

    Raises:
        CropiError: a name that none of them has.
    """
    known = [*names_of(*classes), *also]
    for name in given:
        if name not in known:
            taken = {} if by is None else signature(by).parameters
            own = [key for key, one in taken.items() if one.kind is not one.VAR_KEYWORD]
            meant = "n" if name in HOW_MANY and "n" in own else None
            hint = f"did you mean {meant!r}? " if meant else did_you_mean(name, [*own, *known])
            raise CropiError(f"{name!r} is not an option; {hint}known are {', '.join(known)}")
    return [one(**{name: given[name] for name in names_of(one) if name in given}) for one in classes]


def listed(one: type[T]) -> type[T]:
    """A decorator: the docstring gets a line for every option, as ``--help`` of the command line has it."""
    lines = []
    for about in fields(one):  # type: ignore[arg-type]
        if help := about.metadata.get("help"):
            # The text of a switch that is on says what its flag turns off.
            text = f"False: {help}" if about.metadata["kind"] == "switch" and about.default else help
            lines.append(f"{about.name}: {text} (default: {default_in_words(about)})")
    wrapped = (textwrap.fill(line, 110, initial_indent=" " * 8, subsequent_indent=" " * 12) for line in lines)
    one.__doc__ = "\n".join([(one.__doc__ or "").rstrip(), "", "    Options:", *wrapped, "    "])
    return one


def default_in_words(about: Field[Any]) -> str:
    """How ``--help`` words a default."""
    if about.metadata["shown"] is not None:
        return str(about.metadata["shown"])
    default = about.default if about.default is not MISSING else None
    return f"{default:g}" if isinstance(default, float) else str(default)
