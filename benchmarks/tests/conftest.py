"""One thread and known random numbers, as in tests/, and the base policy of the miniature experiment."""

from pathlib import Path

import pytest
from support.fixtures import surroundings  # noqa: F401


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the base policy."""
    from support.mini import NANO, base_model

    folder = tmp_path_factory.mktemp("mini")
    base_model(NANO, folder)
    return folder
