"""The two kinds of trouble a user can mend, and how to say that an optional package is missing."""

from __future__ import annotations

import copyreg
import importlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from types import ModuleType
from typing import Any

# The extra of the distribution that brings each optional package.
EXTRAS = {
    **dict.fromkeys(("safetensors", "tqdm", "transformers", "pyarrow", "xxhash", "msgspec", "scipy"), "run"),
    **dict.fromkeys(("matplotlib", "jinja2", "markupsafe", "huggingface_hub", "yaml", "tomli"), "run"),
    **{name: name for name in ("trl", "ray", "peft", "sklearn")},
    "shtab": "completion", "bitsandbytes": "quantize", "math_verify": "rollout",
}  # fmt: skip


# Longer messages are cut in the middle: a value of a megabyte must not become a message of a megabyte.
LONGEST_MESSAGE = 1900


# C0 and C1 control characters, line and paragraph ends, marks that turn the direction of writing.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class CropiError(ValueError):
    """Something in the input or the options is wrong; the message names it, its value and the remedy, in less than
    2 kB, whatever the value.

    >>> issubclass(CropiError, ValueError)
    True
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(_with_keywords(message)))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled as a call with their message, which the constructors of subclasses do not take.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class RecordError(CropiError):
    """One bad trajectory record. ``--skip-bad`` goes on without it.

    >>> str(RecordError("train.jsonl:3", "'rewards' is missing"))
    "train.jsonl:3: 'rewards' is missing; mend or remove the record, or pass --skip-bad"
    """

    def __init__(
        self, where: str, problem: str, remedy: str = "mend or remove the record, or pass --skip-bad"
    ):
        super().__init__(f"{where}: {problem}; {remedy}")
        self.where = where
        self.problem = problem
        self.remedy = remedy

    @property
    def of_left_out(self) -> str:
        """The message without the advice to pass ``--skip-bad``, for a record that is left out by it.

        >>> RecordError("train.jsonl:3", "'rewards' is missing").of_left_out
        "train.jsonl:3: 'rewards' is missing; mend or remove the record"
        """
        remedy = _SKIP_BAD.sub("", self.remedy)
        return shortened(_with_keywords("; ".join(filter(None, (f"{self.where}: {self.problem}", remedy)))))


def shortened(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """A text of at most ``limit`` UTF-8 bytes: a longer one loses its middle."""
    if len(text) * 4 <= limit or len(text.encode("utf-8", "backslashreplace")) <= limit:
        return text
    data, half = text.encode("utf-8", "backslashreplace"), (limit - 5) // 2
    return f"{data[:half].decode(errors='ignore')} ... {data[-half:].decode(errors='ignore')}"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` with a message of less than 2 kB, whatever the values in it, at the line of the user's that
    called this package; in a command, at the line that warns. Inside :func:`once` only what was not said before."""
    if (said := _SAID.get()) is not None:
        if message in said:
            return
        said.add(message)
    warnings.warn(shortened(_with_keywords(message)), category, stacklevel=_outside())


@contextmanager
def once(said: set[str]) -> Iterator[None]:
    """Inside, :func:`warn` leaves out what is in ``said``, and adds what it says: of work that is done again and again.

    >>> said = set()
    >>> for _ in range(2):
    ...     with once(said), warnings.catch_warnings(record=True) as caught:
    ...         warn("of these prompts")
    ...     print(len(caught))
    1
    0
    """
    token = _SAID.set(said)
    try:
        yield
    finally:
        _SAID.reset(token)


def _outside() -> int:
    """The ``stacklevel`` of the innermost frame outside of this package, for the function that called this one; of
    that function's caller in a command, where every warning would come from the script ``cropi``."""
    frame, level = sys._getframe(1), 1
    while (
        frame.f_back is not None and (name := frame.f_globals.get("__name__", "")).partition(".")[0] in _OURS
    ):
        if name.startswith("cropi.cli"):
            return 2
        frame, level = frame.f_back, level + 1
    return level


# Python's and torch's context managers stand between as decorators, a trainer's own code under its callbacks, and PEFT
# or a model's own code (which transformers imports as transformers_modules) under hooks.
_OURS = (
    "cropi", "cropi_kernels", "contextlib", "torch", "accelerate", "transformers", "transformers_modules", "peft",
    "trl",
)  # fmt: skip
# The keywords that stand for flags in the function that was called from Python.
_CALLED: ContextVar[Mapping[str, str] | None] = ContextVar("called", default=None)
_SAID: ContextVar[set[str] | None] = ContextVar("said", default=None)
NEAR = 80  # characters: a clause
# A clause of a remedy, up to the next one.
_SKIP_BAD = re.compile(r"[,;]? ?(?:or )?(?:pass )?--skip-bad[^,;]*")
_FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z-]*")


@contextmanager
def as_keywords(flags: Mapping[str, str]) -> Iterator[None]:
    """Inside, an error or warning that names flags of the command line names the keywords of a Python call, too.

    >>> with as_keywords({"--skip-bad": "skip_bad=True"}):
    ...     print(CropiError("bad; mend it, or pass --skip-bad"))
    bad; mend it, or pass --skip-bad (in Python skip_bad=True)
    """
    token = _CALLED.set(flags)
    try:
        yield
    finally:
        _CALLED.reset(token)


def _with_keywords(message: str) -> str:
    called = _CALLED.get()
    if not called:
        return message
    new: dict[str, str] = {}
    for found in _FLAG.finditer(message):
        if (word := called.get(found[0])) and word not in message:
            # A flag far from the end is named again, or the keyword would seem to belong to the last words.
            far = len(message) - found.end() > NEAR
            new[word] = f"{word} for {found[0]}" if far else word
    return f"{message} (in Python {', '.join(new.values())})" if new else message


def article(name: str) -> str:
    """A name behind "a" or "an".

    >>> article("list"), article("Influence"), article("uint8"), article("ndarray")
    ('a list', 'an Influence', 'a uint8', 'an ndarray')
    """
    return f"{'an' if name[:1] in (*'aeioAEIO',) or name[:2] == 'nd' else 'a'} {name}"


def shown(value: Any, limit: int = 60) -> str:
    """A value's repr in at most ``limit`` characters; a longer one ends in dots."""
    if isinstance(value, (str, bytes)):
        value = value[: limit + 1]
    elif isinstance(value, int) and value.bit_length() > 4000:
        return f"an integer of {value.bit_length()} bits"
    elif isinstance(value, (list, tuple)):
        value = value[: limit // 2]  # every item takes two characters at least, so that this is enough
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits inside, or thousands of brackets
        return article(type(value).__name__)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: object) -> str:
    """A text on one line of a terminal: control characters, line ends and marks that turn the direction are escaped."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def printable_lines(text: object) -> str:
    """The same for a text of several lines, whose ends stay."""
    return "\n".join(map(printable, str(text).split("\n")))


def did_you_mean(name: object, known: Iterable[str], shown: str = "{!r}") -> str:
    """``"did you mean 'x'? "`` with the known name that is nearest to a misspelt one, or nothing if none is near.

    Args:
        name: what was written; what is no string is near to none.
        known: what could have been meant.
        shown: a format for the name, where it is not one in quotes.
    """
    words = list(known)
    # Of six letters four are those of many other words (`scores` and `source`); of three, two may be all that is right.
    near = (
        get_close_matches(name, words, n=1, cutoff=0.7 if len(name) > 4 else 0.6)
        if isinstance(name, str)
        else []
    )
    # `outputs` and `output_dir` are nearer to `out` than to `groups`, by what they begin with.
    begun = [word for word in words if len(word) > 2 and isinstance(name, str) and name.startswith(word)]
    if begun and not (near and near[0][0] == name[0]):  # type: ignore[index]
        near = [max(begun, key=len)]
    return f"did you mean {shown.format(near[0])}? " if near else ""


def optional(module: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Raises:
        ModuleNotFoundError: naming the package and the pip command.
        CropiError: transformers under ``python -OO``.
    """
    if module == "transformers" and sys.flags.optimize > 1:
        raise CropiError(
            "transformers reads its docstrings as it is imported, and python -OO (PYTHONOPTIMIZE=2) strips them: run "
            "without it, or with -O"
        )
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or not error.name.startswith(package):
            raise
        extra = EXTRAS.get(package)
        command = f"pip install 'cropi-kernels[{extra}]'" if extra else f"pip install {package}"
        raise ModuleNotFoundError(
            f"the package {package!r} is needed here: {command}", name=package
        ) from error
