"""The metric sinks of the product that ``trainer.metric_sinks`` may name: what each needs to be installed and set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from tawin_nemo.config.schema import SINKS, Recipe
from tawin_nemo.util.errors import ConfigError


@dataclass(frozen=True)
class Library:
    """What a sink imports, and the words behind ``pip install`` that bring it."""

    module: str
    requirement: str


LIBRARIES = {
    "tensorboard": Library("tensorboard", "'tensorboard>=2.18'"),
    "wandb": Library("wandb", "'wandb>=0.21'"),
    "mlflow": Library("mlflow", "'mlflow-skinny>=3.1'"),
    "prometheus": Library("prometheus_client", "'prometheus_client>=0.21'"),
    "otlp": Library("opentelemetry.exporter.otlp.proto.http", "'opentelemetry-exporter-otlp-proto-http>=1.30'"),
}
assert LIBRARIES.keys() == {*SINKS}


def sink_combinations(r: Recipe) -> Iterator[tuple[bool, str]]:
    """(is wrong, message) of every combination that makes no sense; the message names a remedy."""
    named = r.trainer.metric_sinks
    twice = sorted({name for name in named if named.count(name) > 1})
    yield bool(twice), f"trainer.metric_sinks={list(named)} names {', '.join(twice)} twice; name each sink once"
    yield (
        "prometheus" in named and not r.sinks.pushgateway,
        "trainer.metric_sinks=prometheus needs the address of a Pushgateway, but sinks.pushgateway is empty; set "
        "sinks.pushgateway=HOST:9091",
    )


def check_installed(key: str, names: Iterable[str], value: str = "") -> None:
    """Raises ConfigError for the first sink in ``names`` whose library is missing.

    The message names recipe key ``key`` and its ``value`` (by default the sink's name). Nothing is imported: that takes
    seconds. Other names (import paths) are not looked at.
    """
    for name in names:
        library = LIBRARIES.get(name)
        if library is not None and not _is_there(library.module):
            raise ConfigError(
                f"{key}={value or name} needs the package {library.module}, which is not installed; "
                f"pip install {library.requirement}"
            )


def check_sinks(recipe: Recipe) -> None:
    """Raises ConfigError for a sink of ``trainer.metric_sinks`` whose library or whose MLflow server is missing."""
    key, names = "trainer.metric_sinks", recipe.trainer.metric_sinks
    check_installed(key, names)
    if "mlflow" in names:
        mlflow_uri(recipe, f"{key}=mlflow")


def mlflow_uri(recipe: Recipe, asked: str) -> str:
    """MLflow's tracking URI: ``sinks.mlflow_uri``, else MLFLOW_TRACKING_URI.

    Raises ConfigError, for what ``asked`` for it (``key=value``), when neither is set.
    """
    uri = recipe.sinks.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        raise ConfigError(
            f"{asked} needs an MLflow server, but sinks.mlflow_uri and MLFLOW_TRACKING_URI are empty; set one of them, "
            "for example sinks.mlflow_uri=http://HOST:5000"
        )
    return uri


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False
