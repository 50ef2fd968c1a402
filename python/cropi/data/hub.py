"""Data sets of the Hugging Face hub, through the ``datasets`` library."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from cropi.errors import CropiError, optional
from cropi.files import meant

PREFIX = "hf://"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_FILES = (
    ".jsonl",
    ".json",
    ".parquet",
    ".arrow",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".txt",
    ".csv",
    ".pt",
    ".pkl",
)
FORM = "owner/name[@revision][?split=train&config=main], or hf://datasets/owner/name[@revision]/FILE"


def is_hub_name(name: str | Path) -> bool:
    """Whether a name is written as a data set of the hub, ``hf://...`` or ``owner/name``, and not as a file's path."""
    if isinstance(name, Path):
        return False
    plain = name.partition("?")[0].partition("@")[0]
    return name.startswith(PREFIX) or (bool(_ID.fullmatch(plain)) and not plain.lower().endswith(_FILES))


def from_hub(name: str, of_path: Callable[[Path, str], Any], of_object: Callable[[Any, str], Any]) -> Any:
    """The source behind a hub name: one file of a data set, or one split of it.

    Args:
        name: see :data:`FORM`.
        of_path: makes a source of a file that was fetched, and its name.
        of_object: makes a source of a ``datasets.Dataset``, and its name.

    Raises:
        CropiError: not such a name, no such data set, several splits, or the hub cannot be reached.
    """
    words, _, query = name.removeprefix(PREFIX).removeprefix("datasets/").partition("?")
    options = dict(parse_qsl(query))
    parts = words.split("/", 2)
    if len(parts) < 2 or not all(parts[:2]) or not options.keys() <= {"split", "config"}:
        raise CropiError(f"{name}: a data set of the hub is named as {FORM}")
    owner, (called, _, revision) = parts[0], parts[1].partition("@")
    repository = f"{owner}/{called}"
    try:
        if len(parts) == 3 and parts[2]:
            fetched = optional("huggingface_hub").hf_hub_download(
                repository, parts[2], repo_type="dataset", revision=revision or None
            )
            return of_path(Path(fetched), name)
        held = optional("datasets").load_dataset(
            repository, options.get("config"), split=options.get("split"), revision=revision or None
        )
    except ModuleNotFoundError as error:
        if name.startswith(PREFIX):
            raise
        raise CropiError(
            f"{name}: there is no such file here; {meant(name)}if a data set of the hub is meant: {error}"
        ) from error
    except Exception as error:  # the libraries raise what requests, fsspec and their own code raise
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise CropiError(
            f"{name}: there is no such file here, and the data set cannot be loaded from the hub ({why[:300]}); "
            f"{meant(name)}check the name ({FORM}) and the network, or give files"
        ) from error
    if not hasattr(held, "column_names") or isinstance(held, dict):
        splits = list(held)
        if not splits:
            raise CropiError(f"{name} has no splits, so no rows; check the name ({FORM}), or give files")
        if len(splits) != 1:
            raise CropiError(
                f"{name} has the splits {', '.join(map(str, splits))}; name one: {repository}?split={splits[0]}"
            )
        held = held[splits[0]]
    return of_object(held, name)
