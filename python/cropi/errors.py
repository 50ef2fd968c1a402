"""The two kinds of trouble a user can mend, and how to say that an optional package is missing."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from difflib import get_close_matches
from types import ModuleType

# The extra of the distribution that brings each optional package.
EXTRAS = {
    "safetensors": "run",
    "tqdm": "run",
    "transformers": "run",
    "pyarrow": "run",
    "xxhash": "run",
    "matplotlib": "run",
    "yaml": "run",
    "tomli": "run",
    "trl": "trl",
    "datasets": "trl",
}


class CropiError(ValueError):
    """Something in the input or the options is wrong; the message names it, its value and the remedy."""


class RecordError(CropiError):
    """One bad trajectory record. ``--skip-bad`` goes on without it."""

    def __init__(
        self, where: str, problem: str, remedy: str = "mend or remove the record, or pass --skip-bad"
    ):
        super().__init__(f"{where}: {problem}; {remedy}")
        self.where = where
        self.problem = problem


def did_you_mean(name: str, known: Iterable[str], shown: str = "{!r}") -> str:
    """``"did you mean 'x'? "`` with the known name that is nearest to a misspelt one, or nothing if none is near.

    Args:
        name: what was written.
        known: what could have been meant.
        shown: a format for the name, where it is not one in quotes.
    """
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {shown.format(near[0])}? " if near else ""


def optional(module: str) -> ModuleType:
    """Import an optional package, or say how to install it.

    Raises:
        ModuleNotFoundError: naming the package and the pip command.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or not error.name.startswith(package):
            raise
        extra = EXTRAS.get(package)
        command = f"pip install 'cropi-kernels[{extra}]'" if extra else f"pip install {package}"
        raise ModuleNotFoundError(
            f"the package {package!r} is needed here: {command}", name=package
        ) from error
