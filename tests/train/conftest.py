"""The generated dataset and the finished run that all tests of this folder share."""

from pathlib import Path

import pytest

from tests.train.runs import SMALL, prepare_dataset, run


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def finished_run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never interrupted; its recipe is SMALL."""
    directory = tmp_path_factory.mktemp("finished_run")
    run(*SMALL, f"data.root={small_dataset}", f"run_dir={directory}")
    return directory
