"""Stable prompt ids: what ties a stored trajectory, a score and a row of the dataset together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cropi.errors import CropiError, article, optional
from cropi.form import nested


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
        self,
        dataset: Any,
        column: str,
        name: str = "train_dataset",
        option: str = "Recording(id_key=...)",
    ) -> None:
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise CropiError(
                f"{name} is {article(type(dataset).__name__)}, which can only be streamed: prompts that are selected "
                "must be found again by their place; load it as a map-style dataset (streaming=False), or write the "
                "stream to disk first"
            )
        known, [values] = column_values(dataset, column)
        if values is None:
            raise CropiError(
                f"{name} has no column {column!r} (its columns: {', '.join(known) or 'none'}); selection needs an id "
                f"for every prompt that stays the same from run to run: add one, {_recipe(column)}, or name the column "
                f"that holds it with {option}"
            )
        self._number(values, column, name, option)

    @classmethod
    def of(cls, values: Sequence[Any], column: str, name: str, option: str) -> PromptIds:
        """The same, of the values of the column."""
        made = cls.__new__(cls)
        made._number(values, column, name, option)
        return made

    def _number(self, values: Sequence[Any], column: str, name: str, option: str) -> None:
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


def column_values(dataset: Any, *columns: str) -> tuple[list[str], list[list[Any] | None]]:
    """The dataset's columns, and the values of some; None where it has no such column.

    A name with dots leads into nested columns, unless a column is called just so. Rows in which the way ends have the
    value None.

    Args:
        dataset: a map-style dataset, or a pyarrow table.
        columns: names; rows without columns are gone through once for all of them.
    """
    known = getattr(dataset, "column_names", None)
    if known is None:
        known = list(dataset[0]) if len(dataset) and isinstance(dataset[0], Mapping) else []
    ways = [[column] if column in known else column.split(".") for column in columns]
    values: list[list[Any] | None] = [[] if way[0] in known else None for way in ways]
    there = [(way, held) for way, held in zip(ways, values) if held is not None]
    if hasattr(dataset, "column_names"):
        for way, held in there:
            held += _nested(dataset[way[0]], way[1:])
    else:
        for row in dataset:
            for way, held in there:
                held.append(nested(row, way))
    return list(map(str, known)), values


def _nested(column: Any, way: Sequence[str]) -> list[Any]:
    """The values in a column, or in nested ones. Of arrow's structures the nested column alone becomes values."""
    if hasattr(column, "to_pylist"):
        for key in way:
            if not optional("pyarrow").types.is_struct(column.type) or column.type.get_field_index(key) < 0:
                return [None] * len(column)
            column = optional("pyarrow.compute").struct_field(column, column.type.get_field_index(key))
        return list(column.to_pylist())
    return [nested(value, way) for value in column]


def _recipe(column: str) -> str:
    if "." in column:
        return "number the rows through, for example"
    return f'for example dataset.map(lambda row, i: {{"{column}": f"prompt-{{i:06d}}"}}, with_indices=True)'


def _checked(value: Any, row: int, column: str, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise CropiError(
            f"{name}: row {row} has the {column} {value!r}; an id is a string or an integer that no other row has: "
            f"{_recipe(column)}"
        )
    return str(value)
