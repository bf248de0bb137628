"""Published models in MLflow's registry, with the real client over a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tawin_nemo.config.load import load_recipe
from tawin_nemo.config.schema import Recipe
from tawin_nemo.run.sinks import opened
from tawin_nemo.tools.retrain.publish_root import GATE_FILE, PublishRoot
from tawin_nemo.tools.retrain.registry import ALIAS, check_registry, registered
from tawin_nemo.util.errors import ConfigError

FIRST, SECOND = "2018-03-31", "2018-05-31"


@pytest.fixture(autouse=True)
def folder_in_place_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer versions of MLflow want to be asked for it."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    store = f"sinks.mlflow_uri={(tmp_path / 'store').as_uri()}"
    return load_recipe(None, ["sinks.mlflow_model=shop", store, "name=shop", *overrides])


def published(root: PublishRoot, day: str) -> Path:
    version = root.version(day)
    version.mkdir(parents=True)
    (version / "model.safetensors").write_text(day)
    (version / GATE_FILE).write_text(
        json.dumps({"date": day, "passed": True, "against": "", "metrics": {"ndcg@3": 0.5}})
    )
    return version


def client(tmp_path: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient((tmp_path / "store").as_uri())


def test_every_published_date_is_one_version_and_the_newest_has_the_alias(tmp_path: Path):
    root = PublishRoot(tmp_path / "root")
    for number, day in enumerate((FIRST, SECOND), start=1):
        version = published(root, day)
        for _ in range(2):  # the second time there is nothing to do
            assert registered(recipe(tmp_path), root.folder, version) == {"registered": f"shop/{number}"}
    found = client(tmp_path).get_model_version_by_alias("shop", ALIAS)
    assert (int(found.version), found.source) == (2, root.version(SECOND).resolve().as_uri())
    assert found.tags["date"] == SECOND
    assert json.loads(found.tags["metrics"]) == {"ndcg@3": 0.5}
    assert len(client(tmp_path).search_model_versions("name='shop'")) == 2


def test_the_files_are_uploaded_to_the_run_that_trained_them(tmp_path: Path):
    root = PublishRoot(tmp_path / "root")
    uploads = recipe(tmp_path, "sinks.mlflow_upload=true", "trainer.metric_sinks=mlflow")
    check_registry(uploads)
    version, run_dir = published(root, FIRST), root.run_dir(FIRST)
    run_dir.mkdir(parents=True)
    opened("mlflow", uploads, run_dir).close()
    assert registered(uploads, root.folder, version) == {"registered": "shop/1"}
    found = client(tmp_path).get_model_version("shop", "1")
    assert found.run_id == (run_dir / "mlflow_run").read_text()
    listed = client(tmp_path).list_artifacts(found.run_id, "model")
    assert "model/model.safetensors" in {file.path for file in listed}
    assert found.source.endswith("/artifacts/model")


def test_what_mlflow_refuses_leaves_the_model_published(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = PublishRoot(tmp_path / "root")
    (tmp_path / "store").write_text("a file where the registry should be")
    result = registered(recipe(tmp_path), root.folder, published(root, FIRST))
    assert result.keys() == {"registry_error"}
    assert "is published, but MLflow did not register it" in caplog.text
    assert registered(load_recipe(None), root.folder, root.version(FIRST)) == {}


def test_what_a_registry_needs_is_checked_before_the_night_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for words, message in (
        (["sinks.mlflow_uri="], "^sinks.mlflow_model=shop needs an MLflow server, but sinks.mlflow_uri and"),
        (["sinks.mlflow_upload=true"], "add mlflow to it"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_registry(recipe(tmp_path, *words))
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(
        ConfigError, match=r"sinks\.mlflow_model=shop needs the package mlflow.*pip install 'mlflow-skinny"
    ):
        check_registry(recipe(tmp_path))
