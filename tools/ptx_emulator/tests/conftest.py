"""One thread, known random numbers and poisoned memory, as in tests/."""

from support.fixtures import poisoned, surroundings  # noqa: F401
