"""Built-in rewards: 1 for a right answer, else 0. The reference answer is the row's ``answer``."""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable
from typing import Any

from cropi.errors import optional, shown

SECONDS = 5  # for one expression; beyond, the answer counts as wrong


class Exact:
    """The whole response is the answer, but for blanks around it."""

    needs = ("answer",)

    def __call__(self, prompt: Any, response: str, answer: Any) -> float:
        return float(response.strip() == str(answer).strip())


class Math:
    """The response's last mathematical expression equals the answer, by the package math-verify.

    The answer may be a number or an expression in LaTeX or plain text, with or without ``$`` or ``\\boxed``; of a
    solution that ends in ``#### 42`` (GSM8K) it is what stands there.

    Raises:
        ModuleNotFoundError: the package is not installed; names the pip command.
        ValueError: the answer is not a mathematical expression.
    """

    needs = ("answer",)

    def __init__(self) -> None:
        self._verify = optional("math_verify")
        self._gold = functools.lru_cache(maxsize=4096)(self._parsed)

    def __call__(self, prompt: Any, response: str, answer: Any) -> float:
        said = self._verify.parse(response, parsing_timeout=self._limit())
        gold = self._gold(_written(answer))
        return float(self._verify.verify(gold, said, timeout_seconds=self._limit()))

    def check(self, answer: Any) -> None:
        """Whether the answer can be compared with.

        Raises:
            ValueError: it cannot.
        """
        self._gold(_written(answer))

    def _parsed(self, text: str) -> Any:
        parsed = self._verify.parse(text, parsing_timeout=self._limit())
        if not parsed and not _is_prose(text):
            parsed = self._verify.parse(f"${text}$", parsing_timeout=self._limit())
        if not parsed:
            raise ValueError(f"the answer {shown(text)} is not a mathematical expression")
        return parsed

    @staticmethod
    def _limit() -> int | None:
        # The package's clock is a signal, which only the main thread gets.
        return SECONDS if threading.current_thread() is threading.main_thread() else None


def _written(answer: Any) -> str:
    return str(answer).rpartition("####")[2].strip()


def _is_prose(text: str) -> bool:
    """Words without LaTeX, which a parser takes for a product of letters."""
    return "\\" not in text and re.search(r"[A-Za-z]{5,}|[A-Za-z]{2,}\s+[A-Za-z]{2,}", text) is not None


VERIFIERS: dict[str, Callable[[], Callable[..., Any]]] = {"math": Math, "exact": Exact}
