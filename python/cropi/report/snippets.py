"""One line of each prompt for a table: where it begins to differ from the others."""

from __future__ import annotations

from os.path import commonprefix

from cropi.report.rendering import shown

SNIPPET = 70  # characters


class Snippets:
    """Lines for the texts of a table's prompts.

    A few-shot example that all prompts of a task begin with is left out: the line would show it, and no question. What
    is shorter than half of a line stays, since the question is seen behind it.

    >>> made = Snippets()
    >>> for number in range(3):
    ...     made.add(f"p{number}", "sums", f"Solve as in this example: what is 2 + 2? 4. What is {number} + 1?")
    >>> made.lines()["p2"]
    '…What is 2 + 1?'
    """

    def __init__(self) -> None:
        self._shared: dict[str | None, str] = {}  # by task, what all of its texts so far begin with
        self._first: dict[str | None, str] = {}
        self._rest: dict[
            str, tuple[str | None, int, str]
        ] = {}  # what follows what was shared when a text came

    def add(self, name: str, task: str | None, text: str) -> None:
        """A prompt's text; of a long one only what a line may show is kept."""
        text = " ".join(text.split())
        before = self._shared.setdefault(task, self._first.setdefault(task, text))
        shared = before if text.startswith(before) else commonprefix([before, text])
        self._shared[task] = shared
        self._rest[name] = task, len(shared), text[len(shared) : len(shared) + SNIPPET + 1]

    def lines(self) -> dict[str, str]:
        """The line of each prompt."""
        alike = {
            task
            for task, shared, rest in self._rest.values()
            if shared + len(rest) == len(self._shared[task])
        }
        begins = {task: 0 if task in alike else _begin(text) for task, text in self._shared.items()}
        return {
            name: snippet("…" * bool(begins[task]) + self._first[task][begins[task] : shared] + rest)
            for name, (task, shared, rest) in self._rest.items()
        }


def _begin(shared: str) -> int:
    """How much of what texts share is left out: up to the sentence in which they differ, or the word."""
    if len(shared) < SNIPPET // 2:
        return 0
    end = max(shared.rfind(end) for end in (". ", "? ", "! ", ": "))
    return end + 2 if 0 <= end and len(shared) - end - 2 < SNIPPET // 2 else shared.rfind(" ") + 1


def snippet(text: str) -> str:
    """The beginning of a text, on one line of the table."""
    return shown(text if len(text) <= SNIPPET else text[: SNIPPET - 1] + "…")
