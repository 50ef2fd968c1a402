"""What all tests share: one thread, known random numbers, and the fixtures of support/fixtures.py."""

from support.fixtures import (  # noqa: F401
    fresh_warnings,
    level,
    poisoned,
    pytest_collection_modifyitems,
    surroundings,
)
