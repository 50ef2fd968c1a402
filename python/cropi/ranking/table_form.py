"""The form (:mod:`cropi.form`) of what a score table says of how it was made."""

from __future__ import annotations

from typing import Any

from cropi.checked import fits
from cropi.form import is_number, wrong_form

_SET = {
    "name": str, "prompts": lambda count: fits(count, int) and count > 1, "stderr": is_number,
    "stderr_at_cut": is_number, "signal": is_number, "from_responses?": is_number, "own?": is_number,
}  # fmt: skip
_UNCERTAINTY = {
    "sets": [_SET], "overlap": is_number, "halves": is_number, "overlap_of_set": {str: is_number}, "draws": int,
    "fraction": float, "own_signal?": is_number,
}  # fmt: skip
_PATHS = {"path?": str, "paths?": [str]}
META = {
    "metric?": str, "mean?": str, "uncertainty_missing?": str, "selection?": dict,
    "train?": {
        **_PATHS, "stage?": str | None, "model?": (str | None, {"weights?": str | None}),
    },
    "valid?": ([_PATHS | {"path": str}], None),
    "groups?": lambda names: fits(names, list[str]) and len(set(names)) == len(names),
    "uncertainty?": lambda held: not wrong_form(held, _UNCERTAINTY) and _is_whole(held),
}  # fmt: skip


def _is_whole(held: dict[str, Any]) -> bool:
    # A set that is subtracted has an overlap, and no scores of its own.
    names = [one["name"] for one in held["sets"]]
    return len(set(names)) == len(names) and set(names) <= held["overlap_of_set"].keys()
