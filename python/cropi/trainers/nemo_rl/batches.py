"""The function that NeMo-RL's ``data.custom_dataloader`` names.

::

    data.use_multiple_dataloader=true data.custom_dataloader=cropi.trainers.nemo_rl.selected_batches
    CROPI_INDICES=selected.json      # `cropi select --export selected.json --format indices --dataset THE_SAME`

Before every batch it looks whether the file has been replaced (one ``stat``). Its rows go through NeMo-RL's own dataset
and collate function. NeMo-RL has no place for its state in the checkpoints, so a run that is continued begins
the selection anew.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cropi.errors import CropiError
from cropi.files import reading
from cropi.sealed import check_sums

VARIABLE = "CROPI_INDICES"
_ORDERS: weakref.WeakKeyDictionary[Any, Order] = weakref.WeakKeyDictionary()


class Order:
    """Row numbers in a file, epoch by epoch, in an order drawn anew; the file may be replaced."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path, self.rows = path, rows
        self._seen: tuple[int, ...] = ()
        self.chosen: list[int] = []
        self._left: list[int] = []
        self._epoch = 0

    def take(self, count: int) -> list[int]:
        """The next rows.

        Raises:
            CropiError: the file is missing, no list of row numbers, names rows that the dataset has not, or fewer than
                a batch takes.
        """
        self._refresh()
        if len(self.chosen) < count:
            raise CropiError(
                f"${VARIABLE}: {self.path} names {len(self.chosen)} rows, fewer than one batch of {count}, which would "
                "hold some of them twice; select a larger fraction, or lower grpo.num_prompts_per_step"
            )
        taken: list[int] = []
        while len(taken) < count:
            if not self._left:
                order = np.random.default_rng(self._epoch).permutation(len(self.chosen))
                self._left, self._epoch = [self.chosen[i] for i in order], self._epoch + 1
            missing = count - len(taken)
            taken, self._left = taken + self._left[:missing], self._left[missing:]
        return taken

    def _refresh(self) -> None:
        try:
            with reading(f"{self.path} (${VARIABLE})", missing=True):
                state = os.stat(self.path)
                seen = (state.st_ino, state.st_size, state.st_mtime_ns)
                if seen == self._seen:
                    return
                check_sums(self.path)
                held = json.loads(self.path.read_text(encoding="utf-8"))
        except CropiError:
            raise
        except (ValueError, RecursionError) as error:
            raise CropiError(f"${VARIABLE}: {self.path} cannot be read: {error}") from error
        if not isinstance(held, list) or not held or not all(type(row) is int and row >= 0 for row in held):
            raise CropiError(
                f"${VARIABLE}: {self.path} is not a list of row numbers; write it by `cropi select --format indices`"
            )
        if max(held) >= self.rows:
            raise CropiError(
                f"${VARIABLE}: {self.path} names row {max(held)}, and the dataset has {self.rows}; give `cropi select` "
                "the dataset that is trained on"
            )
        self._seen, self.chosen, self._left, self._epoch = seen, held, [], 0


def selected_batches(
    data_iterators: Mapping[str, Any], dataloaders: Mapping[str, Any], **records: Any
) -> tuple[Any, Mapping[str, Any]]:
    """A batch of the selection; NeMo-RL calls it.

    Args:
        data_iterators: given back as they are.
        dataloaders: NeMo-RL's, one.
        records: what the training loop has noted; not used.

    Raises:
        CropiError: no file, several dataloaders, or one that is not of the kind that is known.
    """
    if len(dataloaders) != 1:
        raise CropiError(
            f"selected_batches: there are {len(dataloaders)} dataloaders ({', '.join(dataloaders)}), and row numbers "
            "are of one dataset"
        )
    (loader,) = dataloaders.values()
    for name in ("dataset", "collate_fn", "batch_size"):
        if getattr(loader, name, None) is None:
            raise CropiError(
                f"selected_batches: the dataloader has no {name!r}; it was written for NeMo-RL 0.6, use `cropi select "
                "--format jsonl` instead"
            )
    path = os.environ.get(VARIABLE)
    if not path:
        raise CropiError(f"selected_batches: set ${VARIABLE} to the file of `cropi select --format indices`")
    order = _ORDERS.setdefault(loader, Order(Path(path), len(loader.dataset)))
    rows = order.take(int(loader.batch_size))
    return loader.collate_fn([loader.dataset[row] for row in rows]), data_iterators
