"""Published models in MLflow's model registry (``sinks.mlflow_model``): one version per date, alias ``published``.

The registry follows what was published and never decides it: when it cannot be reached, the model stays published, the
log says so, and the same command registers it later.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tawin_nemo.config.schema import Recipe
from tawin_nemo.config.sinks import check_installed, mlflow_uri
from tawin_nemo.run.sinks import mlflow_name
from tawin_nemo.tools.retrain.publish_root import GATE_FILE
from tawin_nemo.util.errors import ConfigError
from tawin_nemo.util.log import get_logger

log = get_logger(__name__)

#: The alias of the version that is published.
ALIAS = "published"


def check_registry(recipe: Recipe) -> None:
    """Raises ConfigError when MLflow is asked for and not installed, or no server is named."""
    name = recipe.sinks.mlflow_model
    if not name:
        return
    check_installed("sinks.mlflow_model", ["mlflow"], value=name)
    mlflow_uri(recipe, f"sinks.mlflow_model={name}")
    if recipe.sinks.mlflow_upload and "mlflow" not in recipe.trainer.metric_sinks:
        raise ConfigError(
            "sinks.mlflow_upload=true uploads to the MLflow run of the training, but trainer.metric_sinks="
            f"{list(recipe.trainer.metric_sinks)} makes none; add mlflow to it"
        )


def registered(recipe: Recipe, root: Path, version: Path) -> dict[str, str]:
    """Register the published folder ``version`` (``ROOT/versions/DATE``) unless its date is; part of retrain's result.

    ``root``: ``retrain.root``. Empty without ``sinks.mlflow_model``; ``registry_error`` instead of ``registered`` when
    MLflow fails.
    """
    if not recipe.sinks.mlflow_model:
        return {}
    try:
        number = _register(recipe, root, version)
    except Exception as error:  # MLflow's own types, those of its network and of its stores
        log.warning("%s is published, but MLflow did not register it: %s", version, error)
        return {"registry_error": f"{type(error).__name__}: {error}"}
    return {"registered": f"{recipe.sinks.mlflow_model}/{number}"}


def _register(recipe: Recipe, root: Path, version: Path) -> str:
    """The number of the model version in the registry, which gets the alias ``published``."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    name, day = recipe.sinks.mlflow_model, version.name
    uri = mlflow_uri(recipe, f"sinks.mlflow_model={name}")
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.get_registered_model(name)
    except MlflowException:
        client.create_registered_model(name, description="published by tawin-nemo retrain")
    known = [model for model in client.search_model_versions(f"name='{name}'") if model.tags.get("date") == day]
    if known:
        number = known[0].version
    else:
        run_file = root / "runs" / day / "mlflow_run"
        run = run_file.read_text(encoding="utf-8") if run_file.is_file() else None
        source = _uploaded(client, run, version) if recipe.sinks.mlflow_upload else version.resolve().as_uri()
        number = client.create_model_version(name, source, run, tags=_tags(version)).version
    client.set_registered_model_alias(name, ALIAS, number)
    return str(number)


def _tags(version: Path) -> dict[str, str]:
    """The date, the folder and the gate's figures of a published model."""
    gate: dict[str, Any] = json.loads((version / GATE_FILE).read_text(encoding="utf-8"))
    figures = {mlflow_name(key): json.dumps(value) for key, value in gate.items() if key != "date"}
    return {"date": version.name, "folder": str(version.resolve()), **figures}


def _uploaded(client: Any, run: str | None, version: Path) -> str:
    """Upload the folder to the run that trained it; its URI in the artifact store."""
    client.log_artifacts(run, str(version), "model")
    return f"{client.get_run(run).info.artifact_uri}/model"
