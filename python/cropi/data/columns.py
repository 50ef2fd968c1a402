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


def _require(simple: Any) -> None:
    if not simple:
        raise NotSimple


class Nested:
    """Lists of numbers, or lists of such lists, in one array: ``depth`` 1 or 2."""

    def __init__(self, column: Any, depth: int, whole: bool) -> None:
        types = optional("pyarrow").types
        self.starts: list[np.ndarray] = []
        for _ in range(depth):
            _require(types.is_list(column.type) or types.is_large_list(column.type))
            _require(not column.null_count)
            sizes = optional("pyarrow.compute").list_value_length(column).to_numpy(zero_copy_only=False)
            self.starts.append(np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]))
            column = column.flatten()
        kind = column.type
        _require(types.is_integer(kind) or (types.is_floating(kind) and not whole))
        _require(not column.null_count)
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
        _require(len(set(names)) == len(names))
        _require(not any(name in ALIASES or name in REFUSED or name in BY_ROW for name in names))
        batch.validate(full=True)  # text that is not UTF-8, offsets out of order
        self.batch = batch
        self.held: dict[str, Any] = {name: batch.column(i) for i, name in enumerate(names)}
        self.count = batch.num_rows
        self.light: dict[str, list[Any]] = {}
        for name in [name for name in names if self.held[name].null_count == self.count]:
            del self.held[name]  # a column without a value is left out
        _require("id" in self.held and "rewards" in self.held)
        self.rewards = Nested(self.held["rewards"], 1, whole=False)
        self.ids = self._nested("response_ids", 2, True)
        self.prompt_ids = self._nested("prompt_ids", 1, True)
        self.logprobs = self._nested("logprobs", 2, False)
        self.loss_mask = self._nested("loss_mask", 2, True)
        self._check_numbers()
        self._check_labels()
        self._check_truncated()
        self._check_prompt()
        self._check_responses()
        self.extra = [name for name in self.held if name not in FIELDS]
        for name in (*self.extra, "answer"):
            _require(name not in self.held or _depth(self.held[name].type, self.types) <= DEEPEST_TYPE)
        self.largest = self._largest()

    def _nested(self, name: str, depth: int, whole: bool) -> Nested | None:
        return Nested(self.held[name], depth, whole) if name in self.held else None

    def _is_text(self, kind: Any) -> bool:
        return bool(self.types.is_string(kind) or self.types.is_large_string(kind))

    def _check_numbers(self) -> None:
        counts = self.rewards.sizes()
        _require((counts >= 1).all())
        # In float16 the largest reward would be infinity, which is not above itself.
        _require((np.abs(self.rewards.values.astype(np.float64)) <= LARGEST_REWARD).all())
        for ids in (self.ids, self.prompt_ids):
            if ids is not None:
                _require((ids.sizes() >= 1).all() and _within(ids.values, 0, LARGEST_TOKEN))
        for part in (self.ids, self.logprobs, self.loss_mask):
            if part is not None:
                _require((part.sizes(0) == counts).all())
        for part in (self.logprobs, self.loss_mask):
            if part is not None:
                _require(self.ids is not None and np.array_equal(part.starts[1], self.ids.starts[1]))
        if self.logprobs is not None:
            _require(_log_probs(self.logprobs.values))
        if self.loss_mask is not None:
            scored = np.add.reduceat(self.loss_mask.values.astype(np.int64), self.loss_mask.starts[1][:-1])
            _require(_within(self.loss_mask.values, 0, 1) and (scored >= 1).all())

    def _check_labels(self) -> None:
        """Columns of one text or number a row."""
        for name in ("task", "set", "policy", "temperature", "id"):
            if name not in self.held:
                continue
            column = self.held[name]
            if name == "temperature":
                _require(self.types.is_floating(column.type) or self.types.is_integer(column.type))
            else:
                _require(self._is_text(column.type) or (name == "id" and self.types.is_integer(column.type)))
            self.light[name] = column.to_pylist()
        _require(not self.held["id"].null_count)
        for name in self.light["id"]:
            _require(0 < len(str(name).strip()) and len(str(name)) <= LONGEST_ID)
        for value in self.light.get("temperature", ()):
            _require(value is None or 0 < value < float("inf"))

    def _check_truncated(self) -> None:
        if (column := self.held.get("truncated")) is None:
            return
        _require(self.types.is_list(column.type) and self.types.is_boolean(column.type.value_type))
        _require(not column.null_count)
        self.light["truncated"] = column.to_pylist()
        for flags, count in zip(self.light["truncated"], self.rewards.sizes(), strict=True):
            _require(len(flags) == count and None not in flags)

    def _check_prompt(self) -> None:
        if (column := self.held.get("prompt")) is None:
            _require(self.prompt_ids is not None)
            return
        _require(not column.null_count)
        if self._is_text(column.type) and self.prompt_ids is None:
            _require(_shortest(column) >= 1)
        self.light["prompt"] = _plain_prompts(column)

    def _check_responses(self) -> None:
        if (column := self.held.get("responses")) is None:
            _require(self.ids is not None)
            return
        _require(self.types.is_list(column.type) and self.types.is_string(column.type.value_type))
        texts = column.flatten()
        _require(not column.null_count and not texts.null_count)
        sizes = optional("pyarrow.compute").list_value_length(column).to_numpy(zero_copy_only=False)
        _require((sizes == self.rewards.sizes()).all())
        _require(self.ids is not None or _shortest(texts) >= 1)

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
    _require(all(made))
    return made


def _shortest(texts: Any) -> int:
    """Bytes of the shortest of some texts; 0 where there is none."""
    pc = optional("pyarrow.compute")
    return pc.min(pc.binary_length(texts)).as_py() or 0


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
