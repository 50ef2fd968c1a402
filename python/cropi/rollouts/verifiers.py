"""Built-in rewards: 1 for a right answer, else 0. The reference answer is the row's ``answer``."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

from cropi.data.rewards import final_answer
from cropi.errors import optional, shown
from cropi.rollouts.formulas import latex, plain, plain_formulas, unmarked_formulas

SECONDS = 5  # for one expression; beyond, the answer counts as wrong

# A formula in marks without LaTeX, as x**2 or 2e-5 in a box.
_MARKED = re.compile(r"(\\boxed\{|(?<![\\$])\$)([^{}$\\\n]+)(\}|\$(?!\$))")


class Exact:
    """The whole response is the answer, but for blanks around it."""

    needs = ("answer",)

    def __call__(self, prompt: Any, response: str, answer: Any) -> float:
        return float(response.strip() == _text(answer))

    def check(self, answer: Any) -> None:
        """Whether the answer can be compared with.

        Raises:
            ValueError: it cannot.
        """
        _text(answer)


class Math:
    """The response's last mathematical expression equals the answer, by the package math-verify.

    The answer may be a number or an expression in LaTeX or plain text, with or without ``$`` or ``\\boxed``: without
    them the whole of it is one expression. Of a number with its unit in words (``18 dollars``) it is the number, of a
    solution that ends in ``#### 42`` (GSM8K) what stands there.

    Raises:
        ModuleNotFoundError: the package is not installed; names the pip command.
        ValueError: the answer is not a mathematical expression.
    """

    needs = ("answer",)

    def __init__(self) -> None:
        self._verify = optional("math_verify")
        self._gold = functools.lru_cache(maxsize=4096)(self._parsed)

    def __call__(self, prompt: Any, response: str, answer: Any) -> float:
        gold = self._gold(_written(answer))
        symbolic = any(getattr(part, "free_symbols", None) for part in gold)
        said = self._said(response, symbolic)
        return float(self._verify.verify(gold, said, timeout_seconds=self._limit()))

    def check(self, answer: Any) -> None:
        """Whether the answer can be compared with.

        Raises:
            ValueError: it cannot.
        """
        self._gold(_written(answer))

    def _said(self, response: str, symbolic: bool) -> Any:
        """What the package reads of a response in which every formula that is not marked is one number: where it takes
        such a number, the whole formula."""
        response = _MARKED.sub(lambda found: f"{found[1]}{latex(plain(found[2]))}{found[3]}", response)
        if "\\boxed" in response:
            return self._parse(response)
        response = plain(response)
        places = [*unmarked_formulas(response), *self._read_in_part(response, symbolic)]
        if not places:
            return self._parse(response)
        places.sort(key=lambda place: place.start)
        number = 7530918246135
        while any(str(number + i) in response for i in range(len(places))):
            number += 1_000_003
        text, end = "", 0
        for i, place in enumerate(places):
            text += f"{response[end : place.start]} {number + i} "
            end = place.stop
        said = self._parse(text + response[end:])
        for i, place in enumerate(places):
            if said and str(number + i) in str(said[0]):
                alone = str(said[0]) == str(number + i)
                return self._whole(response[place]) if alone else []
        return said

    def _read_in_part(self, response: str, symbolic: bool) -> Iterator[slice]:
        """Formulas in plain text of which the package takes a number; others, as a unit's ``m*s``, it leaves. Where the
        answer has variables itself, all."""
        for place in plain_formulas(response, symbolic=symbolic):
            if symbolic or not re.search("[A-Za-z]", response[place]) or self._parse(response[place]):
                yield place

    def _parsed(self, text: str) -> Any:
        # Of LaTeX that is not marked the package takes one number: 2 of 2\sqrt{3}.
        whole = text and not _is_marked(text) and not _is_prose(text)
        parsed = self._whole(plain(text).lstrip("€£¥₹").rstrip("°")) if whole else self._parse(text)
        if not parsed:
            raise ValueError(f"the answer {shown(text)} is not a mathematical expression")
        return parsed

    def _whole(self, formula: str) -> Any:
        """What the package reads of one formula, which it is not to look for numbers in."""
        return self._parse(
            f"\\boxed{{{latex(formula)}}}", extraction_config=[self._verify.LatexExtractionConfig()]
        )

    def _parse(self, text: str, **options: Any) -> Any:
        return self._verify.parse(text, parsing_timeout=self._limit(), **options)

    @staticmethod
    def _limit() -> int | None:
        # The package's clock is a signal, which only the main thread gets.
        return SECONDS if threading.current_thread() is threading.main_thread() else None


def _text(answer: Any) -> str:
    """A reference answer as text; of a list with one answer, that one.

    Raises:
        ValueError: it is several answers, or an object.
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, (list, dict)):
        raise ValueError(f"the answer {shown(answer)} is not one text or number")
    return str(answer).strip()


def _written(answer: Any) -> str:
    return final_answer(_text(answer)).removesuffix(".")


def _is_marked(text: str) -> bool:
    """Whether it says itself where its expressions are."""
    return re.search(r"\\boxed|\\\(|\\\[|(?<!\\)\$.*(?<!\\)\$", text, re.DOTALL) is not None


def _is_prose(text: str) -> bool:
    """Words without LaTeX, which a parser takes for a product of letters; also the unit of a number."""
    words = (
        r"[A-Za-z]{5,}|[A-Za-z]{2,}\s+[A-Za-z]{2,}|\d\s+(?!(?:and|or|pi|sin|cos|tan|log|ln)\b)[A-Za-z]{2,}"
    )
    return "\\" not in text and re.search(words, text) is not None


VERIFIERS: dict[str, Callable[[], Callable[..., Any]]] = {"math": Math, "exact": Exact}
