"""Made-up inputs of the fuzz tests: so many fixed ones in every run, or CROPI_FUZZ others.

Every input is made from the random numbers of its seed alone. A failure names the seed, and ``CROPI_FUZZ_SEED`` repeats
that input. With ``CROPI_FUZZ`` the seeds are other ones in every run.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import random
import struct
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cropi.errors import CropiError

FIRST = 6_800  # the seed of the first fixed input
LONGEST = 2_000  # bytes of a message
NUMBERS = (
    0, 1, -1, 2, 3, 5, 2**31, 2**63, -(2**70), 10**400, -0.0, 0.5, 1e31, 1e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
TEXTS = (
    "", "x", "0", "nan", "\ud800", "\u202e\x1b[31m", "\ufeff", "\x00", "2024-01-01", "é" * 50, "y" * 5000, "aborted",
    "a_0_1", "a_0_0", "'; --", "[]", "../x",
)  # fmt: skip
LETTERS = 'abcdef0123 "\\/\n\t\x00\x7f\x85é漢\u202e'


def seeds(many: int) -> range:
    """The seeds of this run: ``many`` fixed ones, CROPI_FUZZ others, or the one of CROPI_FUZZ_SEED."""
    repeat, asked = os.environ.get("CROPI_FUZZ_SEED"), os.environ.get("CROPI_FUZZ")
    if repeat:
        return range(int(repeat), int(repeat) + 1)
    first = random.SystemRandom().getrandbits(60) if asked else FIRST
    return range(first, first + (int(asked) if asked else many))


def run(many: int, one: Callable[[random.Random], object]) -> Counter[Any]:
    """``one`` on the random numbers of every seed; counts what it gave.

    Raises:
        AssertionError: ``one`` raised; the message names the seed.
    """
    ends: Counter[Any] = Counter()
    for seed in seeds(many):
        try:
            ends[one(random.Random(seed))] += 1
        except Exception as error:
            raise AssertionError(f"CROPI_FUZZ_SEED={seed}: {type(error).__name__}: {error}") from error
    return ends


def ended(work: Callable[[], Any], *names: str) -> tuple[str, Any]:
    """How work ended: with "" and its value, or with the words of an error in words, which has one of the names.

    Words are short, those of warnings too.
    """
    told, value, printed = "", None, io.StringIO()
    with (
        warnings.catch_warnings(record=True) as warned,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("always")
        try:
            value = work()
        except (CropiError, ModuleNotFoundError) as error:
            told = str(error) or "an error without words"
        except SystemExit as error:
            assert error.code == 2
            told = printed.getvalue()
    for text in (told, *(str(one.message) for one in warned)):
        assert len(text.encode("utf-8", "surrogatepass")) < LONGEST, text[:300]
    assert not told or not names or any(name in told for name in names), told
    return told, value


def outcome(work: Callable[[], Any], *names: str) -> str:
    """ "words" or "taken": see `ended`."""
    return "words" if ended(work, *names)[0] else "taken"


def repeats() -> bool:
    """Whether this run repeats one input, so that shares of outcomes say nothing."""
    return bool(os.environ.get("CROPI_FUZZ_SEED"))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder in memory, where there is one: tens of thousands of files would wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="cropi-fuzz-", dir=memory if os.access(memory, os.W_OK) else None
    ) as made:
        yield Path(made)


def text(rng: random.Random, least: int = 0, most: int = 5) -> str:
    """Characters of every plane, odd ones and half ones among them."""
    made = []
    for _ in range(rng.randint(least, most)):
        code = rng.randrange(0x110000) if rng.random() < 0.2 else 0
        whole = code and not 0xD800 <= code < 0xE000
        made.append(chr(code) if whole else "\ud83d" if rng.random() < 0.003 else rng.choice(LETTERS))
    return "".join(made)


def number(rng: random.Random) -> float:
    """An integer or a float: a small one, an odd one, or any bits."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randint(-3, 100)
    if kind == 1:
        return rng.randint(-(10**40), 10**40)
    if kind == 2:
        bits: float = struct.unpack("d", rng.randbytes(8))[0]
        return bits
    return rng.choice(NUMBERS)


def scalar(rng: random.Random) -> Any:
    kind = rng.randrange(8)
    if kind < 2:
        return (None, rng.random() < 0.5)[kind]
    if kind < 5:
        return number(rng)
    return rng.choice(TEXTS) if kind < 7 else text(rng)


def anything(rng: random.Random, depth: int = 3) -> Any:
    """A value of JSON's types."""
    kind = rng.random() if depth else 0.0
    if kind < 0.6:
        return scalar(rng)
    if kind < 0.8:
        return [anything(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {text(rng, 0, 3): anything(rng, depth - 1) for _ in range(rng.randint(0, 3))}


# ------------------------------------------------------------------------------------ changes of what is right
Way = tuple[Any, ...]
HOW = ("put", "put", "put", "remove", "repeat", "wrap", "swap")


def ways(value: Any, path: Way = ()) -> Iterator[Way]:
    """The way to everything inside lists and dictionaries."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in parts:
        yield from ways(inner, (*path, key))


def changed(
    rng: random.Random, content: Any, places: list[Way], value: Callable[[random.Random], Any] = anything
) -> Any:
    """``content`` with one to three of its places replaced, removed, repeated or wrapped."""
    for _ in range(rng.randint(1, 3)):
        content = _one(content, rng.choice(places), rng.choice(HOW), value(rng))
    return content


def _holds(holder: Any, key: Any) -> bool:
    """Whether there is ``key`` inside; a change before may have put something else there."""
    if isinstance(holder, dict):
        return key in holder
    return isinstance(holder, list) and isinstance(key, int) and key < len(holder)


def _one(content: Any, way: Way, how: str, value: Any) -> Any:
    if not way:
        return value
    *before, key = way
    holder = content
    for step in before:
        if not _holds(holder, step):
            return content
        holder = holder[step]
    if not _holds(holder, key):
        return content
    if how == "remove":
        del holder[key]
    elif how == "repeat" and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif how == "wrap":
        holder[key] = [holder[key]]
    elif how == "swap" and isinstance(holder, dict):
        holder[key] = holder[next(iter(holder))]
    else:
        holder[key] = value
    return content


def damaged(rng: random.Random, whole: bytes, first: int, last: int) -> bytes:
    """``whole`` with some bytes between two places replaced, added, or cut away with all that follows."""
    at = rng.randrange(first, min(last, len(whole)))
    new = rng.randbytes(rng.randint(1, 6))
    kind = rng.random()
    if kind < 0.5:
        return whole[:at] + new + whole[at + len(new) :]
    return whole[:at] + new + (whole[at:] if kind < 0.7 else b"")
