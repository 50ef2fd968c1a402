"""What all tests share: one thread, known random numbers, the fixtures of support/fixtures.py, and `--quick`."""

from support.fixtures import (  # noqa: F401
    fresh_warnings,
    level,
    one_rank,
    poisoned,
    pytest_collection,
    pytest_collection_modifyitems,
    surroundings,
)
from support.quick import pytest_addoption, pytest_ignore_collect  # noqa: F401
