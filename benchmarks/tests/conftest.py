"""One thread and known random numbers, as in tests/."""

from support.fixtures import surroundings  # noqa: F401
