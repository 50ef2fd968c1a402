"""Stable prompt ids: what ties a stored trajectory, a score and a row of the dataset together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cropi.errors import CropiError


class PromptIds:
    """The id of every row of a dataset, and the row of every id.

    Args:
        dataset: a map-style dataset (``datasets.Dataset``, or a sequence of dictionaries).
        column: where the ids stand, dots leading into nested columns; integers and strings, ``7`` and ``"7"`` being
            the same id.
        name: what the dataset is called in messages.
        option: what the user names another column with, for messages.

    Raises:
        CropiError: the dataset streams, has no such column, or an id is missing or used twice.
    """

    def __init__(
        self, dataset: Any, column: str, name: str = "train_dataset", option: str = "id_key"
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise CropiError(
                f"{name} is a {type(dataset).__name__}, which can only be streamed: prompts that are selected must be "
                "found again by their place; load it as a map-style dataset (streaming=False), or write the stream "
                "to disk first"
            )
        known, values = column_values(dataset, column)
        if values is None:
            raise CropiError(
                f"{name} has no column {column!r} (its columns: {', '.join(known) or 'none'}); selection needs an id "
                f"for every prompt that stays the same from run to run: add one, {_recipe(column)}, or name the column "
                f"that holds it with {option}"
            )
        self.column = column
        self.names = [_checked(value, i, column, name) for i, value in enumerate(values)]
        self.place: dict[str, int] = {}
        for i, prompt in enumerate(self.names):
            if prompt in self.place:
                raise CropiError(
                    f"{name}: rows {self.place[prompt]} and {i} have the same {column} {prompt!r}; every prompt needs "
                    f"an id of its own (over all files, where several are joined): {_recipe(column)}, or name another "
                    f"column with {option}"
                )
            self.place[prompt] = i

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, prompt: str) -> bool:
        return prompt in self.place

    def places(self, prompts: Iterable[str]) -> list[int]:
        """The rows of some prompts, in the order given."""
        return [self.place[prompt] for prompt in prompts]


def column_values(dataset: Any, column: str) -> tuple[list[str], list[Any] | None]:
    """The dataset's columns, and the values of one; None where it has no such column.

    A name with dots leads into nested columns, unless a column is called just so. Rows in which the way ends have the
    value None.
    """
    known = getattr(dataset, "column_names", None)
    if known is None:
        known = list(dataset[0]) if len(dataset) and isinstance(dataset[0], Mapping) else []
    first, *rest = [column] if column in known else column.split(".")
    if first not in known:
        return list(map(str, known)), None
    whole = hasattr(dataset, "column_names")
    values = list(dataset[first]) if whole else [row.get(first) for row in dataset]
    for key in rest:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    return list(map(str, known)), values


def _recipe(column: str) -> str:
    if "." in column:
        return "number the rows through, for example"
    return f'for example dataset.map(lambda row, i: {{"{column}": f"prompt-{{i:06d}}"}}, with_indices=True)'


def _checked(value: Any, row: int, column: str, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise CropiError(
            f"{name}: row {row} has the {column} {value!r}; an id is a string or an integer that no other row has: "
            f"{_recipe(column)}"
        )
    return str(value)
