"""Dumps that a trainer wrote by ``torch.save``."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cropi.errors import CropiError


@contextmanager
def opened_dump(path: Path, what: str) -> Iterator[Any]:
    """What the file holds, to be taken apart inside the block. It can run code: read the files of people you trust.

    Raises:
        CropiError: the file cannot be loaded, or taken apart: it is not ``what``.
    """
    import torch

    try:
        yield torch.load(path, map_location="cpu", weights_only=False)
    except (KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CropiError(f"{path} is not {what} ({error!r})") from error
