"""Arguments of another type than a public function takes: an error that names the argument, its type and the remedy."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from . import _native

F = TypeVar("F", bound=Callable[..., Any])
FAILURES = (AttributeError, TypeError, RuntimeError)


def named(function: F) -> F:
    """``function``, whose failures because of a wrong type are a ValueError that names the argument. Where nothing
    fails, nothing is checked."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except (*FAILURES, ValueError) as error:
            # A check of shapes may have come first, which those of a nested tensor fail in words of PyTorch's.
            problem = _without_memory(function, args, kwargs)
            if isinstance(error, FAILURES):
                problem = problem or wrong_argument(function, args, kwargs)
            if not problem:
                raise
            raise ValueError(problem) from error

    return call  # type: ignore[return-value]


def wrong_argument(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """What is wrong with the type of an argument; "" where nothing is.

    >>> def f(x: torch.Tensor, n: int | None = None, sizes: list[int] | None = None) -> None: ...
    >>> wrong_argument(f, ([1.0],), {})
    'x is of type list: give a torch.Tensor (torch.as_tensor(x))'
    >>> wrong_argument(f, (torch.ones(1), "2"), {})
    'n is of type str: give an int or None'
    >>> wrong_argument(f, (torch.ones(1), 2, [3]), {})
    ''
    """
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:  # too few or too many arguments: Python says which
        return ""
    hints = get_type_hints(function)
    for name, value in given.items():
        hint = hints.get(name, Any)
        if get_origin(hint) is Callable and not callable(value):
            return f"{name} is of type {type(value).__name__}: give a function"
        wanted = _classes(hint)
        if wanted and not isinstance(value, tuple(wanted)):
            shown = " or ".join(_in_words(one) for one in wanted)
            more = f" (torch.as_tensor({name}))" if torch.Tensor in wanted else ""
            return f"{name} is of type {type(value).__name__}: give {shown}{more}"
    return ""


def _without_memory(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> str:
    """Which argument is nested, a DTensor or another wrapper, and what to give; "" where none is."""
    try:
        given = inspect.signature(function).bind(*args, **kwargs).arguments
    except TypeError:
        return ""
    for name, x in tensors_of(given.items()).items():
        if x.is_nested or x.layout is torch.strided:
            if (reason := _native.not_plain(x)) is not None:
                return f"{name}: {reason}"
    return ""


def tensors_of(given: Iterable[tuple[str, Any]]) -> dict[str, torch.Tensor]:
    """The tensors among arguments by what messages call them, and those in the fields of a `CsrRows`."""
    tensors: dict[str, Any] = {}
    for name, value in given:
        fields = value._asdict() if hasattr(value, "_asdict") else {}
        tensors |= {f"{name}.{field}": x for field, x in fields.items()} or {name: value}
    return {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}


def _classes(hint: Any) -> list[type]:
    """The classes that an annotation names; none where it says more than that."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    classes: list[type] = []
    for part in parts:
        # Python 3.10 takes list[int] for a type.
        if not isinstance(part, type) or get_origin(part) is not None or part is object:
            return []
        classes.append(part)
    if float in classes:
        classes.append(int)
    return classes


def _in_words(wanted: type) -> str:
    if wanted is type(None):
        return "None"
    name = f"{wanted.__module__}.{wanted.__qualname__}" if wanted is torch.Tensor else wanted.__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
