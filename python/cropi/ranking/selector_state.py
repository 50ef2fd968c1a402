"""What a state of a `Selector` must be before a selector takes any of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from cropi.checked import fits
from cropi.errors import CropiError
from cropi.form import check_form, is_number
from cropi.ranking.origin import is_text

OTHER = "go on from another checkpoint, or begin with a new Selector"


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(name, Hashable) for name in given)


def _is_count(given: Any) -> bool:
    return fits(given, int) and 0 <= given < 1 << 62


_FORM = {
    "version": int, "settings": {str: (str, is_number, None)}, "ids": _are_ids,
    "step": _is_count, "refreshed": _is_count, "origin": lambda text: is_text(text),
    "failing": [lambda held: fits(held, list[int]) and len(held) == 3 and min(held) >= 0],
    "noise": lambda noise: fits(noise, list[float]) and min(noise, default=0) >= 0,
}  # fmt: skip


def check_state(given: Any, mine: Mapping[str, Any]) -> dict[str, Any]:
    """The state ``given``, whole, if it can go into a selector whose own is ``mine``.

    Raises:
        CropiError: it is no state, of another version, other settings or another pool, or damaged; names what differs.
    """
    missing = [key for key in mine if not isinstance(given, Mapping) or key not in given]
    if missing:
        raise CropiError(
            f"this is not a state of a Selector: {missing[0]!r} is missing; save selector.state_dict() with every "
            "checkpoint, or begin with a new Selector"
        )
    state = dict(given)
    check_form(state, _FORM, "the state is damaged", OTHER)
    if state["version"] != mine["version"]:
        raise CropiError(
            f"the state is of version {state['version']!r}: this release reads version {mine['version']}"
        )
    if max((held[0] for held in state["failing"]), default=-1) >= len(state["ids"]):
        raise CropiError(f"the state is damaged: failing names a place beyond the pool; {OTHER}")
    for key in {**mine["settings"], **state["settings"]}:
        theirs, ours = state["settings"].get(key), mine["settings"].get(key)
        if theirs != ours:
            raise CropiError(
                f"the state was saved with {key} = {theirs!r}, but this Selector has {ours!r}: make it with the same, "
                "or begin with a new one"
            )
    for here, there, where in ((mine, state, "state"), (state, mine, "pool")):
        known = set(there["ids"])
        lost = [name for name in here["ids"] if name not in known]
        if lost:
            raise CropiError(
                f"{len(lost)} prompts are not in the {where}, for example {lost[0]!r}: a Selector goes on with the "
                "pool that it was saved with"
            )
    for key in mine:
        if key not in ("settings", "failing"):  # of any length
            _check_kind(key, state[key], mine[key])
    return state


def _check_kind(name: str, given: Any, mine: Any) -> None:
    """``given`` is of the type of ``mine``; lists and tensors of its size too, so that nothing is spread or cut."""
    if isinstance(mine, Mapping) and isinstance(given, Mapping):
        for key in mine:
            _check_kind(f"{name}[{key!r}]", given.get(key), mine[key])
        return
    right, wanted = type(given) is type(mine), type(mine).__name__
    if isinstance(mine, torch.Tensor):
        shape = list(mine.shape)
        if name == "valid" and right and given.ndim == 2:
            shape[0] = len(given)  # as many sets as there are
        right = right and given.dtype == mine.dtype and list(given.shape) == shape
        wanted = f"{mine.dtype} {shape}"
    elif isinstance(mine, list) and mine:
        right = right and len(given) == len(mine)
        wanted = f"a list of {len(mine)}"
    if not right:
        got = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else f"{given!r:.60}"
        raise CropiError(f"the state is damaged: {name} is {got}, and should be {wanted}; {OTHER}")
