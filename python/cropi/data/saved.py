"""Rows as a data set of the ``datasets`` library: in memory, in a folder (``save_to_disk``), on the hub."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cropi.atomic import leftovers, make_folder, remove, sync, sync_all, temporary_path
from cropi.data.tables import is_saved
from cropi.errors import CropiError, optional, shown
from cropi.files import entries, is_folder, is_there, writing


def dataset_of(table: Any) -> Any:
    """A pyarrow table as a ``datasets.Dataset``."""
    datasets = optional("datasets")
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def table_of_dataset(dataset: Any) -> Any:
    """The rows of a ``datasets.Dataset`` as a pyarrow table, in its order."""
    return dataset.with_format("arrow")[:]


def table_in(folder: Path) -> Any:
    """The rows of a folder that ``save_to_disk`` wrote, as a pyarrow table.

    Raises:
        CropiError: ``datasets`` cannot load it: a file beside the rows is missing or damaged.
    """
    try:
        return table_of_dataset(optional("datasets").load_from_disk(str(folder)))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CropiError(
            f"{folder}: datasets cannot load this folder ({shown(str(error), 200)}); save the dataset again"
        ) from error


def check_folder(out: Path) -> None:
    """Check that a data set can be saved in a folder.

    Raises:
        CropiError: something else stands there.
    """
    if is_there(out) and not is_saved(out) and not (is_folder(out) and not entries(out)):
        raise CropiError(
            f"format save_to_disk: {out} is there already and is not a saved data set; give another folder"
        )


def save_folder(out: Path, dataset: Any) -> None:
    """``save_to_disk``, whole or not at all; a data set that was saved there before is replaced.

    Raises:
        CropiError: something else stands there.
    """
    check_folder(out)
    made = temporary_path(out)
    old = made.with_name(f"{made.name}.old")
    with writing(out, made, old):
        make_folder(out.parent)
        for left in leftovers(out, ".old"):  # the one before, where a kill came between the two renames
            if not is_there(out):
                os.replace(left, out)
        for left in (*leftovers(out), *leftovers(out, ".old")):
            remove(left)
        try:
            dataset.save_to_disk(str(made))
            sync_all(made)
            _swap(made, out, old)
            sync(out.parent)
        finally:
            remove(made)
            if is_there(old) and not is_there(out):
                os.replace(old, out)
            remove(old)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Inside, ``datasets`` shows no progress bars."""
    bars = optional("datasets.utils")
    enabled = not bars.are_progress_bars_disabled()
    bars.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            bars.enable_progress_bars()


def _swap(made: Path, out: Path, old: Path) -> None:
    """Put a folder into its place, and what stood there to ``old``; of several processes at once the last one wins."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.replace(out, old)
        try:
            os.replace(made, out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        remove(old)  # another process has put its own there since


def push(dataset: Any, name: str, *, private: bool | None = None, **options: Any) -> str:
    """Push a data set to the Hugging Face hub; returns where it is.

    Args:
        dataset: a ``datasets.Dataset``.
        name: ``owner/name``.
        private: make the repository private; None: what the owner's settings say.
        options: of ``datasets.Dataset.push_to_hub`` (``token``, ``split``, ``commit_message``, ...).

    Raises:
        CropiError: the hub refuses it or cannot be reached.
    """
    try:
        pushed = dataset.push_to_hub(name, private=private, **options)
    except Exception as error:  # the libraries raise what their HTTP clients and their own code raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise CropiError(
            f"push_to_hub {name!r}: {why[:400]}; log in with `hf auth login` (or set HF_TOKEN), and check the name and "
            "the network"
        ) from error
    return str(getattr(pushed, "repo_url", "") or name)


def check_hub_name(name: str) -> None:
    """Check the name of a repository to push to, and that somebody is logged in.

    Raises:
        CropiError: the name is not of the form ``owner/name``, or no token is set.
    """
    hub, utils = optional("huggingface_hub"), optional("huggingface_hub.utils")
    try:
        utils.validate_repo_id(name)
    except utils.HFValidationError as error:
        raise CropiError(f"push_to_hub {name!r}: {error}; give owner/name") from None
    if "/" not in name:
        raise CropiError(f"push_to_hub {name!r}: give owner/name")
    if not hub.get_token():
        raise CropiError(
            f"push_to_hub {name!r}: nobody is logged in to the hub; run `hf auth login`, or set HF_TOKEN"
        )
