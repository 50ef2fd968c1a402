"""The forms (:mod:`cropi.form`) of the JSON files that a report page is made from."""

from __future__ import annotations

from typing import Any

from cropi.checked import fits
from cropi.form import is_number

# Of `cropi check --out`.
CHECK = {
    "findings": [{"name": str, "level": str, "text": str}],
    "spec?": dict,
    "model?": dict,
    "by_type?": {str: float},
    "by_layer?": lambda held: fits(held, dict) and all(map(_is_layer, held.items())),
}
CHECKED = CHECK | {"error": is_number, "theory": is_number, "method": str}


def _is_layer(pair: tuple[str, Any]) -> bool:
    return pair[0].isascii() and pair[0].isdigit() and len(pair[0]) < 10 and fits(pair[1], float)


def _is_pair(kind: Any) -> Any:
    return lambda value: fits(value, list[kind]) and len(value) == 2


# Of a curriculum: what its stages have found out, in its state and in its report.
def is_amount(value: Any) -> bool:
    """Seconds or tokens, which are added up."""
    return fits(value, float) and 0 <= value < 1e15


BESIDE = {"selected": float, "pool": float}  # means over the chosen prompts, and over all
# Before and after a training; None where nothing was logged.
TRAINED = {
    "reward?": _is_pair(float | None),
    "equal_rewards?": _is_pair(float | None),
    "steps?": _is_pair(int),
}
ROW = {
    "stage": int, "prompts?": int, "usable?": int, "selected?": int, "overlap?": float | None, "training?": TRAINED,
    "seconds": {str: is_amount}, "select_seconds?": is_amount, "select_share?": float, "cut_short?": [str],
    "anew?": int, "left?": int, "pass_rate?": BESIDE, "scores?": {str: BESIDE},
}  # fmt: skip
REPORT = {
    "stages": [ROW], "settings": {"train": {"steps": int}, "sketch": {"model": str}}, "fingerprint": str,
    "planned?": int, "warnings?": [str],
}  # fmt: skip
