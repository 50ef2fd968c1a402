"""Prompt groups of a table, checked column by column: token ids and log-probs become Python objects when they are asked
for, and not before. A first pass asks for none of them.

A batch of rows is taken this way if every value in it is as simple as it can be. Any other batch goes through
:func:`cropi.data.records.make_group` row by row, which accepts it or says in words what is wrong; so both ways give the
same groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cropi.data.chat import plain_messages
from cropi.data.checks import LARGEST_TOKEN, LOGPROB_SLACK, LONGEST_ID, check_depth
from cropi.data.keys import ALIASES, FIELDS, REFUSED
from cropi.data.records import PromptGroup
from cropi.data.rewards import LARGEST_REWARD
from cropi.data.values import without_empty
from cropi.errors import RecordError, optional

HEAVY = ("responses", "prompt_ids", "response_ids", "logprobs", "loss_mask", "extra")
# Columns whose values need checks of their own, row by row.
BY_ROW = ("tools", "chat_template_kwargs")
DEEPEST_TYPE = 16


class TableGroup(PromptGroup):
    """A prompt group in a batch of rows. Its heavy fields are made when they are first read."""

    _columns: Columns
    _row: int

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """Given fields, as by ``dataclasses.replace``, make a plain group, which has no table behind it."""
        return PromptGroup(*args, **fields)

    def __reduce__(self) -> Any:
        names = ("where", "line", "extra", *FIELDS)
        return _plain_group, ({name: getattr(self, name) for name in names},)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PromptGroup):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in (*FIELDS, "extra", "where"))

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> tuple[int | None, list[int] | None]:
        return self._columns.lengths(self._row)

    @property
    def has_logprobs(self) -> bool:
        return self._columns.logprobs is not None

    @property
    def largest(self) -> int:
        return int(self._columns.largest[self._row])


def _lazy(name: str) -> property:
    def get(self: TableGroup) -> Any:
        held = self.__dict__
        if name not in held:
            held[name] = self._columns.value(name, self._row)
        return held[name]

    return property(get)


for _name in HEAVY:
    setattr(TableGroup, _name, _lazy(_name))


def _plain_group(fields: dict[str, Any]) -> PromptGroup:
    return PromptGroup(**fields)


class NotSimple(Exception):
    """The batch has something that the row by row way has to look at."""


class Nested:
    """Lists of numbers, or lists of such lists, in one array: ``depth`` 1 or 2."""

    def __init__(self, column: Any, depth: int, whole: bool) -> None:
        types = optional("pyarrow").types
        self.starts: list[np.ndarray] = []
        for _ in range(depth):
            if not (types.is_list(column.type) or types.is_large_list(column.type)) or column.null_count:
                raise NotSimple
            sizes = optional("pyarrow.compute").list_value_length(column).to_numpy(zero_copy_only=False)
            self.starts.append(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
            column = column.flatten()
        kind = column.type
        good = types.is_integer(kind) if whole else types.is_floating(kind) or types.is_integer(kind)
        if column.null_count or not good:
            raise NotSimple
        self.values = column.to_numpy(zero_copy_only=False)

    def sizes(self, level: int = -1) -> np.ndarray:
        """The lengths of the lists of a level."""
        return np.diff(self.starts[level])

    def row(self, i: int) -> list[Any]:
        """The list of a row, as Python values."""
        a, b = self.starts[0][i], self.starts[0][i + 1]
        if len(self.starts) == 1:
            return list(self.values[a:b].tolist())
        ends = self.starts[1]
        return [self.values[ends[k] : ends[k + 1]].tolist() for k in range(a, b)]

    def of_rows(self, level_values: np.ndarray, reduce: Any, empty: float) -> np.ndarray:
        """A reduction over all numbers of each row."""
        ends = self.starts[0] if len(self.starts) == 1 else self.starts[1][self.starts[0]]
        reduced = np.full(len(ends) - 1, empty, dtype=np.int64)
        some = np.diff(ends) > 0
        if some.any():
            reduced[some] = reduce.reduceat(level_values, ends[:-1][some])
        return reduced


class Columns:
    """A batch of rows, checked.

    Raises:
        NotSimple: a column is of another type, or a value breaks a rule.
    """

    def __init__(self, batch: Any) -> None:
        self.types = optional("pyarrow").types
        names = batch.schema.names
        if len(set(names)) < len(names) or any(
            name in ALIASES or name in REFUSED or name in BY_ROW for name in names
        ):
            raise NotSimple
        batch.validate(full=True)  # text that is not UTF-8, offsets out of order
        self.batch = batch
        self.held: dict[str, Any] = {name: batch.column(i) for i, name in enumerate(names)}
        self.count = batch.num_rows
        self.light: dict[str, list[Any]] = {}
        for name in [name for name in names if self.held[name].null_count == self.count]:
            del self.held[name]  # a column without a value is left out
        if "id" not in self.held or "rewards" not in self.held:
            raise NotSimple
        self.rewards = Nested(self.held["rewards"], 1, whole=False)
        self.ids = self._nested("response_ids", 2, True)
        self.prompt_ids = self._nested("prompt_ids", 1, True)
        self.logprobs = self._nested("logprobs", 2, False)
        self.loss_mask = self._nested("loss_mask", 2, True)
        self._check_numbers()
        self._check_texts()
        self.extra = [name for name in self.held if name not in FIELDS]
        if any(
            _depth(self.held[name].type, self.types) > DEEPEST_TYPE
            for name in (*self.extra, "answer")
            if name in self.held
        ):
            raise NotSimple
        self.largest = self._largest()

    def _nested(self, name: str, depth: int, whole: bool) -> Nested | None:
        return Nested(self.held[name], depth, whole) if name in self.held else None

    def _check_numbers(self) -> None:
        counts = self.rewards.sizes()
        values = self.rewards.values
        # In float16 the largest reward would be infinity, which is not above itself.
        if (counts < 1).any() or not (np.abs(values.astype(np.float64)) <= LARGEST_REWARD).all():
            raise NotSimple
        for ids in (self.ids, self.prompt_ids):
            if ids is not None and ((ids.sizes() < 1).any() or not _within(ids.values, 0, LARGEST_TOKEN)):
                raise NotSimple
        for part in (self.ids, self.logprobs, self.loss_mask):
            if part is not None and (part.sizes(0) != counts).any():
                raise NotSimple
        if (self.logprobs is not None or self.loss_mask is not None) and self.ids is None:
            raise NotSimple
        for part in (self.logprobs, self.loss_mask):
            if (
                part is not None
                and self.ids is not None
                and not np.array_equal(part.starts[1], self.ids.starts[1])
            ):
                raise NotSimple
        if self.logprobs is not None and not _log_probs(self.logprobs.values):
            raise NotSimple
        if self.loss_mask is not None:
            scored = np.add.reduceat(self.loss_mask.values.astype(np.int64), self.loss_mask.starts[1][:-1])
            if not _within(self.loss_mask.values, 0, 1) or (scored < 1).any():
                raise NotSimple

    def _check_texts(self) -> None:
        pc = optional("pyarrow.compute")
        counts = self.rewards.sizes()
        kinds = {"task": "text", "set": "text", "policy": "text", "temperature": "number", "id": "name"}
        for name, kind in kinds.items():
            if name in self.held:
                column = self.held[name]
                text = self.types.is_string(column.type) or self.types.is_large_string(column.type)
                good = {
                    "text": text, "number": self.types.is_floating(column.type) or self.types.is_integer(column.type),
                    "name": (text or self.types.is_integer(column.type)) and not column.null_count,
                }  # fmt: skip
                if not good[kind]:
                    raise NotSimple
                self.light[name] = column.to_pylist()
        if not all(0 < len(str(name).strip()) and len(str(name)) <= LONGEST_ID for name in self.light["id"]):
            raise NotSimple
        warm = [value for value in self.light.get("temperature", ()) if value is not None]
        if not all(0 < value < float("inf") for value in warm):
            raise NotSimple
        if "truncated" in self.held:
            column = self.held["truncated"]
            flags = self.types.is_list(column.type) and self.types.is_boolean(column.type.value_type)
            if column.null_count or not flags:
                raise NotSimple
            self.light["truncated"] = column.to_pylist()
            if any(len(row) != n or None in row for row, n in zip(self.light["truncated"], counts)):
                raise NotSimple
        prompt = self.held.get("prompt")
        if prompt is None and self.prompt_ids is None:
            raise NotSimple
        if prompt is not None:
            if prompt.null_count:
                raise NotSimple
            if self.types.is_string(prompt.type) or self.types.is_large_string(prompt.type):
                if self.prompt_ids is None and pc.min(pc.binary_length(prompt)).as_py() < 1:
                    raise NotSimple
            self.light["prompt"] = _plain_prompts(prompt)
        responses = self.held.get("responses")
        if responses is None:
            if self.ids is None:
                raise NotSimple
            return
        inner = responses.flatten() if self.types.is_list(responses.type) else None
        if inner is None or responses.null_count or inner.null_count or not self.types.is_string(inner.type):
            raise NotSimple
        sizes = pc.list_value_length(responses).to_numpy(zero_copy_only=False)
        if (sizes != counts).any() or (
            self.ids is None and (pc.min(pc.binary_length(inner)).as_py() or 0) < 1
        ):
            raise NotSimple

    def _largest(self) -> np.ndarray:
        """The largest token id of every row, -1 where there is none."""
        largest = np.full(self.count, -1, dtype=np.int64)
        for ids in (self.ids, self.prompt_ids):
            if ids is not None:
                largest = np.maximum(largest, ids.of_rows(ids.values, np.maximum, -1))
        return largest

    def lengths(self, row: int) -> tuple[int | None, list[int] | None]:
        """Tokens of the prompt and of every response of a row."""
        prompt = None if self.prompt_ids is None else int(self.prompt_ids.sizes()[row])
        if self.ids is None:
            return prompt, None
        a, b = self.ids.starts[0][row : row + 2]
        return prompt, np.diff(self.ids.starts[1][a : b + 1]).tolist()

    def value(self, name: str, row: int) -> Any:
        """A heavy field of a row."""
        if name == "extra":
            return {key: self.held[key][row].as_py() for key in self.extra if self.held[key][row].is_valid}
        if name == "responses":
            return self.held[name][row].as_py() if name in self.held else None
        part: Nested | None = self.ids if name == "response_ids" else getattr(self, name)
        return None if part is None else part.row(row)

    def groups(self, name: str, numbers: Sequence[int]) -> Iterator[tuple[str, TableGroup]]:
        """``(file, row n)`` and the group of every row; ``numbers`` are those of the rows."""
        rewards = [self.rewards.row(i) for i in range(self.count)]
        texts = [
            key
            for key in ("prompt", "truncated", "temperature", "set", "task", "policy")
            if key in self.light
        ]
        answers = self.held["answer"].to_pylist() if "answer" in self.held else [None] * self.count
        empty = dict.fromkeys(field for field in FIELDS if field not in HEAVY)
        for i in range(self.count):
            where = f"{name}, row {numbers[i]}"
            group: TableGroup = object.__new__(TableGroup)
            held = empty | {key: self.light[key][i] for key in texts}
            held |= {"id": str(self.light["id"][i]), "rewards": rewards[i], "answer": answers[i]}
            held |= {"where": where, "line": None, "_columns": self, "_row": i}
            group.__dict__.update(held)
            yield where, group


def table_groups(batch: Any, name: str, numbers: Sequence[int]) -> Iterator[tuple[str, TableGroup]] | None:
    """The groups of a batch of rows with these numbers, or None where it is not simple."""
    try:
        return Columns(batch).groups(name, numbers) if batch.num_rows else iter(())
    except (NotSimple, RecordError, UnicodeDecodeError, optional("pyarrow").ArrowInvalid):
        return None


def _plain_prompts(column: Any) -> list[Any]:
    prompts = without_empty(column.to_pylist())
    if prompts and isinstance(prompts[0], str):
        return list(prompts)
    made = []
    for prompt in prompts:
        check_depth({"prompt": prompt}, "")
        made.append(plain_messages(prompt, "prompt", ""))
    if not all(made):
        raise NotSimple
    return made


def _within(values: np.ndarray, low: int, high: int) -> bool:
    return not values.size or bool(values.min() >= low and values.max() <= high)


def _log_probs(values: np.ndarray) -> bool:
    return not values.size or bool(np.isfinite(values.min()) and values.max() <= LOGPROB_SLACK)


def _depth(kind: Any, types: Any) -> int:
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return 1 + _depth(kind.value_type, types)
    if types.is_struct(kind):
        return 1 + max((_depth(field.type, types) for field in kind), default=0)
    return DEEPEST_TYPE + 1 if types.is_map(kind) or types.is_union(kind) else 0
