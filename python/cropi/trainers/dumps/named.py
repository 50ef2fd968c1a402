"""Prompts of a dump that names none: found in the dataset of the run, by what the policy read of each row."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cropi.data.chat import last_text
from cropi.data.export import read_dataset
from cropi.data.identity import PROMPT_KEYS, dataset_ids
from cropi.data.prompt_ids import column_values
from cropi.data.rows_out import rows_of
from cropi.data.values import without_empty
from cropi.errors import CropiError
from cropi.form import nested
from cropi.trainers.dumps.fields import BadSample, shown
from cropi.trainers.dumps.rollout import Rollout

# The columns of questions in trainers' datasets; 'input' is the default of NeMo-RL, slime and OpenRLHF, beside which an
# instruction may be the same in every row.
COLUMNS = (*PROMPT_KEYS, "query", "input", "instruction")


class DatasetPrompts:
    """The ids and prompts of a dataset, by their tokens and texts.

    Args:
        rows: the dataset's, with text or messages under one of :data:`COLUMNS`.
        ids: their prompt ids.
        tokenizer: the policy's, whose chat template rendered the prompts.
        column: the one with the prompts, dots leading into nested ones; None: the first of :data:`COLUMNS`.

    Raises:
        CropiError: a row without a prompt, or two prompts that no dump tells apart: the policy reads the same tokens.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        ids: Iterable[str],
        tokenizer: Any,
        column: str | None = None,
    ) -> None:
        # By what a dump may hold of a prompt: the ids of its rows, and the prompt as a record has it. Several rows may
        # share a text without its outer blanks; token ids, or the whole text, tell them apart.
        self._found: dict[Any, list[tuple[str, Any]]] = {}
        for name, row in zip(ids, rows, strict=True):
            keys = COLUMNS if column is None else (column,)
            prompt = next((held for key in keys if (held := row.get(key) or nested(row, key))), None)
            if prompt is None:
                raise CropiError(
                    f"dataset: the row {name!r:.100} has no prompt ({', '.join(keys)}); its columns are "
                    f"{', '.join(map(str, row)):.300}: name the one with the prompt by --columns prompt=NAME"
                )
            prompt = without_empty(prompt)
            held, tokens, texts = _read_as(prompt, tokenizer)
            if tokens in self._found:
                raise CropiError(
                    f"the prompts {self._found[tokens][0][0]!r} and {name!r} have the same text, so the dump does not "
                    "tell them apart; record exact rollouts instead (docs/trainers.md)"
                )
            for key in {tokens, *texts}:
                self._found.setdefault(key, []).append((name, held))

    @classmethod
    def of(
        cls,
        dataset: str,
        id_key: str | None,
        tokenizer: Any,
        first: str | None = None,
        column: str | None = None,
    ) -> DatasetPrompts:
        """Those of a file, folder or data set of the hub; its ids are in the column ``id_key``.

        Args:
            dataset, tokenizer, column: see there.
            id_key: None: the column ``first``, if it is there, else as exports find it.
        """
        table = read_dataset(dataset)
        if id_key is None and first is not None and column_values(table, first)[1][0] is not None:
            id_key = first
        ids = dataset_ids(table, dataset, id_key)
        return cls(rows_of(table, range(len(ids.names))), ids.names, tokenizer, column)

    def named(self, rollout: Rollout) -> Rollout:
        """The rollout with the id and the prompt of its row.

        Raises:
            BadSample: no row is its prompt.
        """
        read = rollout.prompt if rollout.prompt_ids is None else tuple(rollout.prompt_ids)
        found = self._found.get(_hashable(read), [])
        if len(found) != 1 and isinstance(read, str):
            found = self._found.get(read.strip(), [])
        if not found:
            read = rollout.prompt if rollout.prompt is not None else rollout.prompt_ids
            raise BadSample(
                rollout.where, "prompt", f"no row of the dataset renders to {shown(read)}",
                "give the dataset and the model that the rollouts were made with, or pass --skip-bad",
            )  # fmt: skip
        if len(found) > 1:
            names = " and ".join(repr(name) for name, _ in found[:2])
            raise BadSample(
                rollout.where, "prompt", f"the rows {names} of the dataset are {shown(read)} but for outer blanks",
                "record token ids (docs/trainers.md), or pass --skip-bad",
            )  # fmt: skip
        return replace(rollout, id=found[0][0], prompt=found[0][1])


def _read_as(prompt: Any, tokenizer: Any) -> tuple[Any, tuple[int, ...], Iterable[Any]]:
    """A prompt as a record holds it, its tokens, and what else dumps hold: its text with and without special tokens and
    itself, as they are and without outer blanks.

    Of a dump a record's text gets no template, so that with one it is messages.
    """
    if getattr(tokenizer, "chat_template", None):
        held = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = tokenizer.apply_chat_template(held, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        held = text = last_text(prompt)
        tokens = tokenizer(text)["input_ids"]
    keys = {text, tokenizer.decode(tokens, skip_special_tokens=True), _hashable(prompt)}
    return held, tuple(tokens), keys | {key.strip() for key in keys}


def _hashable(prompt: Any) -> Any:
    return prompt if isinstance(prompt, (str, tuple)) else json.dumps(prompt, sort_keys=True)
