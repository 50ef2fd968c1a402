"""How many made-up inputs the fuzz tests take: a fixed few in every run, or CROPI_FUZZ random ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings


def inputs(few: int, share: float = 1.0) -> settings:
    """Settings for ``few`` inputs, the same in every run.

    With ``CROPI_FUZZ`` in the environment: that many times ``share``, other ones in every run; a failure prints its
    input and the line that repeats it.
    """
    asked = os.environ.get("CROPI_FUZZ")
    return settings(
        max_examples=few if asked is None else max(1, round(int(asked) * share)),
        derandomize=asked is None,
        print_blob=asked is not None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
