"""Models by hub name: from a hub on this machine, from the cache, offline, and the errors where the hub gives none.

Each case runs in a process of its own, because huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.hub import is_hub_name
from tests.util.fake_hub import COMMIT, fake_hub

NAME = "Acme/tiny-lm"
FETCH = """
import sys
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.hub import fetch, local_folder
try:
    fetch(*sys.argv[1:])
except ConfigError as error:
    sys.exit(f"refused: {error}")
print(local_folder(*sys.argv[1:]))
"""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "hub" / NAME
    (folder / "onnx").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "pytorch_model.bin", "onnx/model.safetensors"):
        (folder / name).write_text(f"{{}} of {name}" if name != "config.json" else "{}", encoding="utf-8")
    return tmp_path / "hub"


def fetched(
    tmp_path: Path, endpoint: str, *words: str, offline: bool = False, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "1"} if offline else {}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", FETCH, *words], env=environment, cwd=folder or tmp_path, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_a_hub_model_is_downloaded_once_and_then_read_from_the_cache(tmp_path: Path, models: Path) -> None:
    with fake_hub(models) as (endpoint, asked):
        first = fetched(tmp_path, endpoint, NAME)
        assert first.returncode == 0, first.stderr
        folder = Path(first.stdout.strip())
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
        assert (folder / "tokenizer.json").read_text() == "{} of tokenizer.json"
        assert folder.name == COMMIT
        requests = len(asked)
        assert requests > 0
        again = fetched(tmp_path, endpoint, NAME)
        assert (again.returncode, again.stdout) == (0, first.stdout)
        assert len(asked) == requests  # the cache is whole: nobody is asked
    offline = fetched(tmp_path, "http://127.0.0.1:9", NAME, offline=True)
    assert (offline.returncode, offline.stdout) == (0, first.stdout)


@pytest.mark.slow
def test_an_incomplete_cache_is_completed(tmp_path: Path, models: Path) -> None:
    with fake_hub(models) as (endpoint, _):
        folder = Path(fetched(tmp_path, endpoint, NAME).stdout.strip())
        (folder / "model.safetensors").unlink()
        assert fetched(tmp_path, endpoint, NAME).returncode == 0
    assert (folder / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_error_says_what_was_tried_and_the_remedy(tmp_path: Path, models: Path) -> None:
    with fake_hub(models) as (endpoint, _):
        unknown = fetched(tmp_path, endpoint, "Acme/other")
        revision = fetched(tmp_path, endpoint, NAME, "v7")
    nobody = fetched(tmp_path, "http://127.0.0.1:9", NAME)
    offline = fetched(tmp_path, "http://127.0.0.1:9", NAME, offline=True)
    reasons = ["no such model is public", "it has no revision v7", "127.0.0.1:9", "HF_HUB_OFFLINE=1 forbids"]
    for done, reason in zip((unknown, revision, nobody, offline), reasons, strict=True):
        assert done.returncode == 1
        assert "refused: model.init=Acme/" in done.stderr
        assert reason in done.stderr
        assert str(tmp_path / "home") in done.stderr
        assert "set model.init=DIR" in done.stderr


@pytest.mark.slow
def test_pickled_weights_alone_are_refused(tmp_path: Path, models: Path) -> None:
    (models / NAME / "model.safetensors").unlink()
    with fake_hub(models) as (endpoint, _):
        done = fetched(tmp_path, endpoint, NAME)
    assert done.returncode == 1
    assert "lacks config.json or safetensors files" in done.stderr


def test_a_folder_of_that_name_is_that_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(NAME)
    (tmp_path / NAME).mkdir(parents=True)
    assert not is_hub_name(NAME)


def test_a_revision_belongs_to_a_hub_name() -> None:
    with pytest.raises(ConfigError, match=r"model.revision=main belongs to a model of the hub.*clear model.revision"):
        load_recipe(None, ["model.revision=main", "model.init=/some/folder"])
    assert load_recipe(None, ["model.revision=main", f"model.init={NAME}"]).model.revision == "main"
