"""Stable prompt ids: what ties a stored trajectory, a score and a row of the dataset together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cropi.errors import CropiError


class PromptIds:
    """The id of every row of a dataset, and the row of every id.

    Args:
        dataset: a map-style dataset (``datasets.Dataset``, or a sequence of dictionaries).
        column: the column that holds the ids; integers and strings, ``7`` and ``"7"`` being the same id.
        name: what the dataset is called in messages.

    Raises:
        CropiError: the dataset streams, has no such column, or an id is missing or used twice.
    """

    def __init__(self, dataset: Any, column: str, name: str = "train_dataset") -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise CropiError(
                f"{name} is a {type(dataset).__name__}, which can only be streamed: prompts that are selected must be "
                "found again by their place; load it as a map-style dataset (streaming=False), or write the stream "
                "to disk first"
            )
        values = _column(dataset, column, name)
        self.column = column
        self.names = [_checked(value, i, column, name) for i, value in enumerate(values)]
        self.place: dict[str, int] = {}
        for i, prompt in enumerate(self.names):
            if prompt in self.place:
                raise CropiError(
                    f"{name}: rows {self.place[prompt]} and {i} have the same {column} {prompt!r}; every prompt needs "
                    f"an id of its own, for example {_recipe(column)}"
                )
            self.place[prompt] = i

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self.place

    def places(self, prompts: Iterable[str]) -> list[int]:
        """The rows of some prompts, in the order given."""
        return [self.place[prompt] for prompt in prompts]


def _recipe(column: str) -> str:
    return f'dataset.map(lambda row, i: {{"{column}": f"prompt-{{i:06d}}"}}, with_indices=True)'


def _column(dataset: Any, column: str, name: str) -> list[Any]:
    known = getattr(dataset, "column_names", None)
    if known is None and len(dataset) and isinstance(dataset[0], Mapping):
        known = list(dataset[0])
    if known is None or column not in known:
        raise CropiError(
            f"{name} has no column {column!r} (its columns: {', '.join(map(str, known or ['none']))}); selection "
            f"needs an id for every prompt that stays the same from run to run: add one, for example "
            f"{_recipe(column)}, or name the column that holds it with id_column"
        )
    return list(dataset[column]) if hasattr(dataset, "column_names") else [row[column] for row in dataset]


def _checked(value: Any, row: int, column: str, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise CropiError(
            f"{name}: row {row} has the {column} {value!r}; an id is a string or an integer, for example "
            f"{_recipe(column)}"
        )
    return str(value)
