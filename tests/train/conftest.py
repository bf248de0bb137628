"""The generated dataset that all runs of this folder share."""

from pathlib import Path

import pytest

from tests.train.runs import prepare_dataset


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_dataset(tmp_path_factory.mktemp("dataset"))
