"""Eight families of character-level tasks with graded difficulty and an exact verifier.

A prompt is ``TAG body =`` and its answer is one string of characters, so a program can tell right from wrong. Tags tell
the families apart; difficulty 1 .. 5 sets the length of the body.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from cropi.errors import CropiError

CHARACTERS = "0123456789abcdefghij()[]{}+-*%:=CRSABMNK"
END, OFFSET = 0, 1  # token 0 ends a response and pads; a character's token is its place + 1
DIFFICULTIES = (1, 2, 3, 4, 5)
_IDS = {character: i + OFFSET for i, character in enumerate(CHARACTERS)}
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Problem:
    """One prompt and its only right answer."""

    family: str
    difficulty: int
    prompt: str
    answer: str


def encode(text: str) -> list[int]:
    """Token ids of a text. Raises CropiError for a character outside the alphabet."""
    unknown = sorted(set(text) - _IDS.keys())
    if unknown:
        raise CropiError(f"text {text!r} has the character {unknown[0]!r}; the alphabet is {CHARACTERS!r}")
    return [_IDS[character] for character in text]


def decode(ids: list[int]) -> str:
    """The text of token ids up to the first end token; ids outside the alphabet become "?"."""
    text = ""
    for token in ids:
        if token == END:
            break
        text += CHARACTERS[token - OFFSET] if token - OFFSET < len(CHARACTERS) else "?"
    return text


def verify(problem: Problem, response: list[int]) -> float:
    """1.0 if the response is the answer and was ended by the end token, else 0.0."""
    return float(response[-1:] == [END] and decode(response) == problem.answer)


def _letters(rng: random.Random, count: int, alphabet: str = "abcdefghij") -> str:
    return "".join(rng.choice(alphabet) for _ in range(count))


def _copy(rng: random.Random, d: int) -> tuple[str, str]:
    text = _letters(rng, 2 * d)
    return text, text


def _reverse(rng: random.Random, d: int) -> tuple[str, str]:
    text = _letters(rng, 1 + 2 * d - (d > 1))
    return text, text[::-1]


def _sort(rng: random.Random, d: int) -> tuple[str, str]:
    text = _letters(rng, 2 + d)
    return text, "".join(sorted(text))


def _operands(rng: random.Random, d: int) -> tuple[int, int]:
    digits = {1: (1, 1), 2: (2, 1), 3: (2, 2), 4: (3, 2), 5: (3, 3)}[d]
    first, second = (rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n) for n in digits)
    return first, second


def _add(rng: random.Random, d: int) -> tuple[str, str]:
    a, b = _operands(rng, d)
    return f"{a}+{b}", str(a + b)


def _subtract(rng: random.Random, d: int) -> tuple[str, str]:
    a, b = sorted(_operands(rng, d), reverse=True)
    return f"{a}-{b}", str(a - b)


def _modulo(rng: random.Random, d: int) -> tuple[str, str]:
    m = rng.randrange(2, 10)
    a, b = rng.randrange(10), rng.randrange(10)
    if d == 1:
        return f"{a}%{m}", str(a % m)
    if d in (2, 4):
        value = rng.randrange(10, 100 if d == 2 else 1000)
        return f"{value}%{m}", str(value % m)
    return (f"{a}+{b}%{m}", str((a + b) % m)) if d == 3 else (f"{a}*{b}%{m}", str(a * b % m))


def _count(rng: random.Random, d: int) -> tuple[str, str]:
    text, letter = _letters(rng, 3 * d, "abc"), rng.choice("abc")
    return f"{letter}:{text}", str(text.count(letter))


def _brackets(rng: random.Random, d: int) -> tuple[str, str]:
    """A prefix of 2 d brackets that leaves some open; the answer closes them, the last one first."""
    while True:
        text, stack = "", ""
        for _ in range(2 * d):
            if stack and rng.random() < 0.4:
                text, stack = text + _CLOSING[stack[-1]], stack[:-1]
            else:
                bracket = rng.choice("([{")
                text, stack = text + bracket, stack + bracket
        if stack:
            return text, "".join(_CLOSING[c] for c in reversed(stack))


FAMILIES: dict[str, tuple[str, Callable[[random.Random, int], tuple[str, str]]]] = {
    "copy": ("C", _copy),
    "reverse": ("R", _reverse),
    "sort": ("S", _sort),
    "add": ("A", _add),
    "subtract": ("B", _subtract),
    "modulo": ("M", _modulo),
    "count": ("N", _count),
    "brackets": ("K", _brackets),
}


def make_problem(family: str, difficulty: int, rng: random.Random) -> Problem:
    """One random problem. Raises CropiError for an unknown family or difficulty."""
    if family not in FAMILIES:
        raise CropiError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    if difficulty not in DIFFICULTIES:
        raise CropiError(f"difficulty must be one of {DIFFICULTIES}, got {difficulty!r}")
    tag, build = FAMILIES[family]
    body, answer = build(rng, difficulty)
    return Problem(family, difficulty, f"{tag}{body}=", answer)


def held_out(prompt: str) -> bool:
    """Whether a prompt is kept for validation and test: a fifth of all prompts, by a checksum, whatever the seed.

    Neither supervised training nor the pool ever sees these.
    """
    return zlib.crc32(prompt.encode()) % 5 == 0


def make_set(
    per_cell: int,
    rng: random.Random,
    *,
    evaluation: bool,
    families: tuple[str, ...] = (),
    taken: set[str] | None = None,
) -> list[Problem]:
    """``per_cell`` distinct problems of every family and difficulty, none of them in ``taken``, which grows by them.

    ``evaluation`` says which side of :func:`held_out` they come from. Easy levels that have fewer problems than asked
    for (sums of two digits) give what they have.
    """
    taken = set() if taken is None else taken
    problems = []
    for family in families or tuple(FAMILIES):
        for difficulty in DIFFICULTIES:
            found = tries = 0
            while found < per_cell and tries < 50 * per_cell:
                tries += 1
                problem = make_problem(family, difficulty, rng)
                if problem.prompt not in taken and held_out(problem.prompt) is evaluation:
                    taken.add(problem.prompt)
                    problems.append(problem)
                    found += 1
    return problems
